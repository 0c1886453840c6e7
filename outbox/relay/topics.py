"""Topics that nobody takes are asked with one message at a time. Pure: the clock is an argument.

Two kinds: a topic whose queues *refuse* everything (full, without a majority) gets one message at a time instead of a
window of them; a topic that *nobody listens to* gets one of its `unroutable` messages again every few seconds instead of
all of them, while new messages still go out once each, so that status says what is the matter with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.backoff import Backoff
from outbox.relay.broker import Outcome
from outbox.tables import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from outbox.store.drain import Row

#: Refusals in a row, without a confirm between, after which a topic is said to refuse everything.
_REFUSALS = 5
#: How long between two probes of a refusing topic: full queues are often emptied soon.
_PROBES = Backoff(base_seconds=1.0, maximum_seconds=30.0)


@dataclass(slots=True)
class _Gate:
    """A topic that is asked with one message at a time."""

    opens_at: float
    failures: int = 1
    #: The loaded row that will ask, or is asking.
    probe: int | None = None


class Topics:
    """What the relay knows of topics in trouble; most of the time nothing."""

    def __init__(self, *, unheard_seconds: float) -> None:
        self._unheard_seconds = unheard_seconds
        self._nacks: dict[str, int] = {}
        self._refusing: dict[str, _Gate] = {}
        self._unheard: dict[str, _Gate] = {}

    @property
    def troubled(self) -> bool:
        """Whether any topic is asked with one message at a time."""
        return bool(self._refusing or self._unheard)

    def closed(self, now: float, loaded: Callable[[int], bool]) -> tuple[list[str], list[str]]:
        """Return the topics a read leaves out, and those of which it leaves out `unroutable` rows; call it before each read.

        A probe that is no longer *loaded* was dropped before it could ask.
        """
        for gate in (*self._refusing.values(), *self._unheard.values()):
            if gate.probe is not None and not loaded(gate.probe):
                gate.probe = None
        return (
            [topic for topic, gate in self._refusing.items() if not _open(gate, now)],
            [topic for topic, gate in self._unheard.items() if not _open(gate, now)],
        )

    def admit(self, row: Row, now: float) -> bool:
        """Say whether *row* may be loaded; the one that may becomes its topic's probe."""
        gate = self._gate(row)
        if gate is None:
            return True
        if not _open(gate, now):
            return False
        gate.probe = row.id
        return True

    def stopped(self, row: Row) -> bool:
        """Say whether *row*, already loaded, must be unloaded: its topic is in trouble and it is not the probe."""
        gate = self._gate(row)
        return gate is not None and gate.probe != row.id

    def answered(self, row: Row, outcome: Outcome, now: float) -> bool:
        """Take in an answer; returns True when what `closed` and `stopped` say has changed for the topic."""
        topic = row.topic
        if outcome is Outcome.CONFIRMED:
            self._nacks.pop(topic, None)
            was_refusing, was_unheard = self._refusing.pop(topic, None), self._unheard.pop(topic, None)
            return was_refusing is not None or was_unheard is not None
        if outcome is Outcome.NACKED:
            return self._nacked(row, now)
        if outcome is Outcome.RETURNED:
            return self._returned(row, now)
        return False

    def _nacked(self, row: Row, now: float) -> bool:
        gate = self._refusing.get(row.topic)
        if gate is not None:
            if gate.probe == row.id:
                gate.failures += 1
                gate.probe = None
                gate.opens_at = now + _PROBES.ceiling(gate.failures)
            return False
        self._nacks[row.topic] = self._nacks.get(row.topic, 0) + 1
        if self._nacks[row.topic] < _REFUSALS:
            return False
        self._refusing[row.topic] = _Gate(now + _PROBES.ceiling(1))
        return True

    def _returned(self, row: Row, now: float) -> bool:
        if row.unheard == "drop":
            return False
        known = row.topic in self._unheard
        self._unheard[row.topic] = _Gate(now + self._unheard_seconds)
        return not known

    def _gate(self, row: Row) -> _Gate | None:
        gate = self._refusing.get(row.topic)
        if gate is None and row.state == State.UNROUTABLE:
            gate = self._unheard.get(row.topic)
        return gate


def _open(gate: _Gate, now: float) -> bool:
    return gate.opens_at <= now and gate.probe is None
