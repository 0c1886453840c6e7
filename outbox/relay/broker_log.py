"""What is said of a broker and its topics in the log: each change of state once, however often it is found again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from outbox.process.logs import say
from outbox.relay.order.topic_probes import Trouble

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outbox.relay.order.topic_probes import Gate

log = logging.getLogger(__name__)


class TopicNews:
    """The log of topics in trouble: once when it begins, whatever becomes of it, and once when it is over."""

    def __init__(self) -> None:
        self._told: dict[str, Gate] = {}

    def tell(self, troubles: Mapping[str, Gate], now: float) -> None:
        """Tell what has changed since the last time."""
        for topic in self._told.keys() - troubles.keys():
            gate = self._told.pop(topic)
            sentence = (
                f"topic {topic!r} is taken again after {now - gate.since:.0f} s; "
                f"{gate.messages} of its messages were not delivered at once"
            )
            say(log, logging.WARNING, "topic.well", sentence, topic=topic, messages=gate.messages)
        for topic, gate in troubles.items():
            known = self._told.get(topic)
            self._told[topic] = gate
            if known is None:
                say(log, logging.WARNING, f"topic.{gate.trouble}", _TROUBLES[gate.trouble].format(repr(topic)), topic=topic)


_TROUBLES = {
    Trouble.REFUSING: "a queue of topic {} refuses all it is given (is it full?); one message at a time asks from now on",
    Trouble.SILENT: "a queue of topic {} confirms nothing while others do (has it lost its majority?); one message at a time "
    "asks from now on",
    Trouble.UNHEARD: "no queue takes topic {}: outbox topology check",
}


class News:
    """The log of one broker connection. Not thread-safe: one thread tells."""

    def __init__(self) -> None:
        #: Troubles told since all was well. A broker that blocks, refuses or loses us in turn is told of once each.
        self._told: set[str] = set()
        self._in_doubt = False

    def trouble(self, event: str, sentence: str, level: int = logging.WARNING) -> None:
        """Tell *sentence*, unless it was told since all was well."""
        if sentence not in self._told:
            self._told.add(sentence)
            say(log, level, f"broker.{event}", sentence)

    def doubt(self, in_doubt: bool) -> None:
        """Say whether the last connection stood and yet confirmed nothing: then the next one proves nothing by standing."""
        self._in_doubt = in_doubt

    def connected(self, sentence: str) -> None:
        """Tell that a connection stands, unless that proves nothing."""
        if not self._in_doubt:
            self.well(sentence)

    def confirmed(self, sentence: str) -> None:
        """Tell that the broker takes messages, if that was in doubt."""
        if self._in_doubt:
            self.well(sentence)

    def well(self, sentence: str) -> None:
        """Tell that all is well, and forget all troubles."""
        self._in_doubt = False
        self._told.clear()
        say(log, logging.INFO, "broker.connected", sentence)
