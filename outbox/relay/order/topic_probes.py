"""Topics that nobody takes are asked with one message at a time. Pure: the clock is an argument.

Three kinds: a topic whose queues *refuse* everything (full), and one whose queues are *silent* while those of others answer
(a quorum queue without a majority), get one message at a time instead of a window of them, on a connection apart; a topic
that *nobody listens to* gets one of its `unroutable` messages again every few seconds instead of all of them, while new
messages still go out once each, so that status says what is the matter with them.

```text
 closed ── time is up ──► open: a few rows are loaded ──► one of them may go: the probe ──► confirmed: over
    ▲                                                                              └──► anything else ─┐
    └───────────────────────────────── ever longer ────────────────────────────────────────────────────┘
```
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from outbox.process.backoff import Backoff
from outbox.relay.broker import Outcome
from outbox.tables import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outbox.store.relaying import Row

#: Refusals in a row, without a confirm between, after which a topic is said to refuse everything.
_REFUSALS = 5
#: How long between two probes of a topic that refuses or is silent: full queues are often emptied soon.
_PROBES = Backoff(base_seconds=1.0, maximum_seconds=30.0)
#: How long after a probe that got lost with its connection: nobody said anything about the topic.
_LOST_SECONDS = 1.0
#: Rows that are loaded to find one that may go: those behind an undelivered message of their key may not.
_CANDIDATES = 50


class Trouble(StrEnum):
    """What is the matter with a topic."""

    REFUSING = "refusing"
    SILENT = "silent"
    UNHEARD = "unroutable"


@dataclass(slots=True)
class Gate:
    """A topic that is asked with one message at a time."""

    trouble: Trouble
    opens_at: float
    since: float
    #: Probes in vain, and the first failure.
    failures: int = 1
    #: Messages of the topic that were not delivered since.
    messages: int = 0
    #: Loaded rows of which the first that may go will ask.
    candidates: set[int] = field(default_factory=set)
    #: The row that is asking.
    probe: int | None = None
    #: Probes that were lost with their connection; others are preferred.
    lost: set[int] = field(default_factory=set)
    #: The last probe found no connection apart: the next one takes the usual way, where a single message does little harm.
    apart: bool = True

    def is_open(self, now: float) -> bool:
        """Whether it is time to ask, and nobody is asking."""
        return self.opens_at <= now and self.probe is None

    def fails(self, trouble: Trouble, now: float) -> None:
        """The probe was in vain."""
        self.trouble = trouble
        self.failures += 1
        self.close(now + _PROBES.ceiling(self.failures))

    def close(self, until: float) -> None:
        """Ask nothing until then."""
        self.probe = None
        self.opens_at = until


class Topics:
    """What the relay knows of topics in trouble; most of the time nothing."""

    def __init__(self, *, unheard_seconds: float) -> None:
        self._unheard_seconds = unheard_seconds
        self._nacks: dict[str, int] = {}
        #: Topics that refuse or are silent.
        self._shut: dict[str, Gate] = {}
        self._unheard: dict[str, Gate] = {}

    @property
    def troubled(self) -> bool:
        """Whether any topic is asked with one message at a time."""
        return bool(self._shut or self._unheard)

    def troubles(self) -> dict[str, Gate]:
        """Return the topics in trouble."""
        return {**self._unheard, **self._shut}

    @property
    def candidates(self) -> set[int]:
        """The loaded rows of which some are to ask for their topics."""
        return {id_ for gate in self._gates() for id_ in gate.candidates}

    def _gates(self) -> Iterator[Gate]:
        yield from self._shut.values()
        yield from self._unheard.values()

    # --- before a message is sent ---

    def closed(self, now: float, loaded: Callable[[int], bool]) -> tuple[list[str], list[str]]:
        """Return the topics a read leaves out, and those of which it leaves out `unroutable` rows; call it before each read.

        A probe or candidate that is no longer *loaded* was dropped before it could ask.
        """
        for gate in self._gates():
            gate.candidates = {id_ for id_ in gate.candidates if loaded(id_)}
            if gate.probe is not None and not loaded(gate.probe):
                gate.probe = None
        return (
            [topic for topic, gate in self._shut.items() if not _admits(gate, now)],
            [topic for topic, gate in self._unheard.items() if not _admits(gate, now)],
        )

    def admit(self, row: Row, now: float) -> bool:
        """Say whether *row* may be loaded; of a topic in trouble a few may, when it is time to ask."""
        gate = self._gate(row)
        if gate is None:
            return True
        if not _admits(gate, now):
            return False
        gate.candidates.add(row.id)
        return True

    def stopped(self, row: Row) -> bool:
        """Say whether *row*, already loaded, must be unloaded: its topic is in trouble and it is not to ask."""
        gate = self._gate(row)
        return gate is not None and gate.probe != row.id and row.id not in gate.candidates

    def gated(self, row: Row) -> bool:
        """Say whether *row* may go as its topic's probe only."""
        return self._gate(row) is not None

    def asks(self, row: Row, now: float) -> bool:
        """Say whether *row*, which may go, is to ask for its topic; from then on it is its probe, and nobody else is."""
        gate = self._gate(row)
        if gate is None or not gate.is_open(now) or row.id not in gate.candidates:
            return False
        if row.id in gate.lost and not gate.candidates <= gate.lost:
            return False
        gate.probe = row.id
        gate.candidates = set()
        return True

    def apart(self, row: Row) -> bool:
        """Say whether the probe *row* is to go where it keeps nobody else waiting."""
        gate = self._shut.get(row.topic)
        return gate is not None and gate.apart

    # --- answers ---

    def answered(self, row: Row, outcome: Outcome, now: float) -> bool:
        """Take in an answer; returns True when what `closed` and `stopped` say has changed for the topic."""
        if outcome is Outcome.CONFIRMED:
            return self._well(row.topic)
        if outcome is Outcome.NACKED:
            return self._nacked(row, now)
        if outcome is Outcome.SILENT:
            return self._not_taken(row, Trouble.SILENT, now)
        if outcome is Outcome.RETURNED:
            return self._returned(row, now)
        self.lost(row, now)
        return False

    def lost(self, row: Row, now: float, *, sent: bool = True) -> None:
        """*row* was lost, or is to blame itself: nobody said anything about its topic. Or it was not even *sent*."""
        gate = self._gate(row)
        if gate is not None and gate.probe == row.id:
            gate.apart = sent or not gate.apart
            if sent:
                gate.lost.add(row.id)
            gate.close(now + _LOST_SECONDS)

    def _well(self, topic: str) -> bool:
        self._nacks.pop(topic, None)
        gates = self._shut.pop(topic, None), self._unheard.pop(topic, None)
        return gates != (None, None)

    def _nacked(self, row: Row, now: float) -> bool:
        if row.topic in self._shut:
            return self._not_taken(row, Trouble.REFUSING, now)
        self._nacks[row.topic] = self._nacks.get(row.topic, 0) + 1
        return self._nacks[row.topic] >= _REFUSALS and self._not_taken(row, Trouble.REFUSING, now)

    def _not_taken(self, row: Row, trouble: Trouble, now: float) -> bool:
        gate = self._shut.get(row.topic)
        known = gate is not None
        if gate is None:
            gate = self._shut[row.topic] = Gate(
                trouble, now + _PROBES.ceiling(1), now, messages=self._nacks.get(row.topic, 1) - 1
            )
        elif gate.probe == row.id:
            gate.fails(trouble, now)
        gate.messages += 1
        return not known

    def _returned(self, row: Row, now: float) -> bool:
        answers = self._shut.pop(row.topic, None) is not None
        if row.unheard == "drop":
            return answers
        known = row.topic in self._unheard
        gate = self._unheard.setdefault(row.topic, Gate(Trouble.UNHEARD, now, now))
        gate.close(now + self._unheard_seconds)
        gate.messages += 1
        return answers or not known

    def _gate(self, row: Row) -> Gate | None:
        gate = self._shut.get(row.topic)
        if gate is None and row.state == State.UNROUTABLE:
            gate = self._unheard.get(row.topic)
        return gate


def _admits(gate: Gate, now: float) -> bool:
    return gate.is_open(now) and len(gate.candidates) < _CANDIDATES
