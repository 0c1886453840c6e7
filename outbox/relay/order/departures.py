"""Which ready messages are sent next: one alone after a loss, suspects without company, of a topic in trouble only its probe.

Pure: the clock is a function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.relay.order.item import Item
    from outbox.relay.order.lanes import Lanes
    from outbox.relay.order.suspects import Caution
    from outbox.relay.order.topic_probes import Topics

#: How long the first message after a loss flies alone before messages of other topics may show that the broker is well.
_ALONE_SECONDS = 1.0


class Departures:
    """Takes out of the lanes what may go now."""

    def __init__(self, lanes: Lanes, caution: Caution, topics: Topics, clock: Callable[[], float]) -> None:
        self._lanes = lanes
        self.caution = caution
        self._topics = topics
        self._clock = clock
        #: Tokens of the probes that fly apart.
        self.probing: set[int] = set()
        self.suspects_fly = False
        #: When the first message was sent alone, and the topics of which one has gone since.
        self._alone_since = 0.0
        self._alone_topics: set[str] = set()
        #: The message that was unanswered first when a silent connection was dropped, until others say whose fault that was.
        self.first_unanswered: Item | None = None

    def take(self) -> list[Item]:
        """Return what goes now; it is in flight from here on."""
        return [*self._take(), *self._take_probes()]

    @property
    def flying(self) -> int:
        """How many messages are in flight, without those that fly apart."""
        return self._lanes.flying - len(self.probing)

    def _take(self) -> list[Item]:
        caution = self.caution
        if caution.alone:
            return self._take_alone()
        if caution.suspects:
            suspects = self._lanes.ready_ids(among=caution.suspects) - self._topics.candidates
            if self.suspects_fly or (suspects and self.flying):
                return []
            if suspects:
                self.suspects_fly = True
                return self._lanes.take(lambda item: item.row.id in suspects, limit=caution.group + len(self.probing))
        return self._lanes.take(self._may_go)

    def _may_go(self, item: Item) -> bool:
        return not self._topics.gated(item.row)

    def _take_alone(self) -> list[Item]:
        """Take the first message after a loss; when it gets no answer for a while, one of each other topic.

        What ends connections does so at once. A message that is merely not answered may be of a silent topic, and then
        another topic's answer shows that the broker is well.
        """
        now = self._clock()
        if not self.flying:
            self._alone_since = now
            taken = self._take_another() or self._take_first()
            self._alone_topics = {item.row.topic for item in taken}
            return taken
        if now - self._alone_since < _ALONE_SECONDS:
            return []
        return self._lanes.take(lambda item: self._may_go(item) and self._is_another_opinion(item.row.topic))

    def _take_first(self) -> list[Item]:
        first = self.caution.next_alone(self._lanes.ready_ids() - self._topics.candidates)
        return self._lanes.take(lambda item: item.row.id == first, limit=1 + len(self.probing))

    def _take_another(self) -> list[Item]:
        """Take one of another topic than that which was unanswered first when a connection was silent."""
        if self.first_unanswered is None:
            return []
        topic = self.first_unanswered.row.topic
        return self._lanes.take(lambda item: self._may_go(item) and item.row.topic != topic, limit=1 + len(self.probing))

    def _is_another_opinion(self, topic: str) -> bool:
        if topic in self._alone_topics:
            return False
        self._alone_topics.add(topic)
        return True

    def _may_ask(self, item: Item, alone: bool) -> bool:
        return not alone or self._topics.apart(item.row)

    def _take_probes(self) -> list[Item]:
        """Take the messages that ask for the topics in trouble whose turn it is."""
        if not self._topics.troubled:
            return []
        now, alone = self._clock(), self.caution.alone or bool(self.caution.suspects)
        probes = self._lanes.take(lambda item: self._may_ask(item, alone) and self._topics.asks(item.row, now))
        if probes:
            self._lanes.unload(self._topics.stopped)
        return probes
