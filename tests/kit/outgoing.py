"""Messages as the relay hands them to a broker, and the answers that come back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from outbox.relay.broker import Outgoing
from tests.kit.builders import message
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from outbox.relay.broker import Answer, Broker


def batch(count: int, first: int = 1, **changes: Any) -> list[Outgoing]:
    """*count* messages with tokens from *first* on."""
    return [Outgoing(first + n, message(**changes)) for n in range(count)]


def connected(broker: Broker, timeout: float = 10.0) -> None:
    """Wait until *broker* is connected. Nothing may be in flight: answers on the way are thrown away."""
    eventually(lambda: broker.answers(0.05) is not None and broker.state().connected, timeout, "the broker to connect", 0.001)


def answered(broker: Broker, count: int, timeout: float = 10.0) -> dict[int, Answer]:
    """Wait for *count* answers and return them by token; fails on a second answer to one message and on more than *count*."""
    found: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout
    while len(found) < count:
        remaining = deadline - time.monotonic()
        assert remaining > 0, f"{len(found)} of {count} answers after {timeout:g} s; the broker: {broker.state()}"
        for answer in broker.answers(remaining):
            assert answer.token not in found, f"a second answer: {answer} after {found[answer.token]}"
            found[answer.token] = answer
    assert len(found) == count
    return found
