"""The look at what handlers have in hand: says which message takes long, where it is, and when the process is no good."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.consumer import handlers, telemetry
from outbox.process import duration
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outbox.consumer.calls import Call
    from outbox.consumer.service import Service

log = logging.getLogger(__name__)

#: A message in hand for so long is said, and again each time it has become twice as long.
SLOW_SECONDS = 30.0
#: How often the calls are looked at.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class _Slow:
    """A call, and for how long it has been under way."""

    call: Call
    seconds: float


class Watch:
    """Looks at the calls of a service's handlers; used by the receiving thread."""

    def __init__(self, service: Service, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._looked_at = -_LOOK_SECONDS
        #: Call → its age at which it is said next.
        self._due: dict[Call, float] = {}

    def look(self) -> None:
        """Say which messages take long; called at every turn, it looks only now and then."""
        if self._clock() - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = self._clock()
        slow = list(self._under_way())
        telemetry.oldest_call_seconds.labels(self._service.name).set(max((each.seconds for each in slow), default=0.0))
        self._due = {each.call: self._due.get(each.call, SLOW_SECONDS) for each in slow}
        for each in slow:
            if each.seconds >= self._due[each.call]:
                self._due[each.call] = 2 * each.seconds
                self._say(each)

    def oldest_seconds(self) -> float:
        """Return for how long the oldest call has been under way, 0 when none is; from any thread."""
        return max((each.seconds for each in self._under_way()), default=0.0)

    def named(self) -> str:
        """Return what takes longest, for a sentence; empty when nothing is in hand."""
        slowest = max(self._under_way(), key=lambda each: each.seconds, default=None)
        return "" if slowest is None else _described(slowest)

    def _under_way(self) -> Iterator[_Slow]:
        now = self._clock()
        for handler in filter(None, map(self._service.handler, self._service.topics)):
            for call in handler.calls.under_way():
                yield _Slow(call, max(0.0, now - call.since))

    def _say(self, slow: _Slow) -> None:
        message = slow.call.message
        wait = "; later messages of its key wait for it" if message.key is not None else ""
        say(
            log,
            logging.WARNING,
            "consumer.slow",
            f"{_described(slow)}{wait}",
            service=self._service.name,
            topic=message.topic,
            source=message.source,
            message_id=message.id,
            key=message.key,
            seconds=round(slow.seconds, 1),
        )


def _described(slow: _Slow) -> str:
    message = slow.call.message
    what = f"message {message.id} ({message.topic}{f', key {message.key!r}' if message.key is not None else ''})"
    since = duration.format(float(int(slow.seconds)))
    return f"{what} has been in {slow.call.name} for {since}, at {slow.call.place(handlers.__file__)}"
