"""One run of the lab, from its first process to its verdict."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psycopg

from tests.kit.history import Entry
from tests.kit.recorder import DONE, NOTED
from tests.kit.waiting import eventually
from tests.lab import judgement
from tests.lab.canary import Canary
from tests.lab.faults import FAULTS
from tests.lab.tap import Tap

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

    from tests.lab.faults import Fault
    from tests.lab.judgement import Judgement
    from tests.lab.stage import Stage

#: How long a fault is held, and the quiet after it, in seconds.
_HOLD, _QUIET = (8.0, 16.0), (3.0, 5.0)
#: The canary must be heard of again this long after a fault has healed, and everything drained at the end.
_STUCK_SECONDS, _DRAIN_SECONDS = 60.0, 300.0
_LEDGER = "SELECT message_id, key, digest, topic FROM ledger ORDER BY id"


@dataclass(slots=True)
class Held:
    """What was seen of one kind of fault."""

    times: int = 0
    #: Seconds from the canary's commits to their arrivals, of those that were committed while it was held.
    latencies: list[float] = field(default_factory=list)
    #: Seconds from healing until the canary was heard of again.
    recoveries: list[float] = field(default_factory=list)


class Run:
    """A stage with the canary and the tap on it; a context manager."""

    def __init__(self, stage: Stage, chance: random.Random, say: Callable[[str], None]) -> None:
        self.stage = stage
        self.chance = chance
        self._say = say
        self._closing = ExitStack()
        self._never = threading.Event()
        self._stopped = False
        self.canary = Canary(stage.world.env["DATABASE_URL"])
        self.tap = Tap(stage.world.env["BROKER_URL"])
        self.held: dict[str, Held] = defaultdict(Held)
        self.quiet = Held()
        #: Ledgers of databases that were replaced.
        self.branches: list[list[Entry]] = []
        #: From when to when canaries were committed to a database that was replaced: they need not arrive.
        self._undone: list[tuple[float, float]] = []
        self._copied_at = 0.0
        #: What ended by itself.
        self.fallen: list[str] = []

    def __enter__(self) -> Self:
        self.stage.start()
        self._closing.enter_context(self.tap)
        self._closing.enter_context(self.canary)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._closing.close()

    # --- what faults need ---

    def wait(self, seconds: float) -> None:
        """Let the world go on; what is waited for is the passing of time itself."""
        self._never.wait(seconds)

    @property
    def outbox_dsn(self) -> str:
        """The libpq URL of the outbox's database."""
        return self.stage.postgres.dsn(self.stage.database)

    def administer(self, statement: str) -> None:
        """Execute one statement as the database's owner."""
        with psycopg.connect(self.stage.postgres.dsn("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def keep_a_copy(self) -> None:
        """Make the copy of the outbox's database that `go_back_in_time` brings back; what commits from now on is lost then."""
        self.stage.postgres.add_standby()
        self.stage.postgres.cut_replication()
        self._copied_at = time.monotonic()

    def go_back_in_time(self) -> None:
        """Replace the outbox's database by its copy, and keep the ledger of what it was."""
        postgres = self.stage.postgres
        before = postgres.fail_over()
        self._undone.append((self._copied_at, time.monotonic()))
        rows = postgres.rows_of(before, self.stage.database, _LEDGER)
        self.branches.append([_entry(row) for row in rows])

    # --- the run ---

    def play(self, seconds: float, names: Sequence[str] = ()) -> None:
        """Deal faults until *seconds* have passed, or `stop` is called; those of *names*, or all."""
        ends_at = time.monotonic() + seconds
        deck = self._deck(names)
        self._pause()
        while time.monotonic() < ends_at and not self._stopped:
            self._one(next(deck))
            self._pause()

    def stop(self) -> None:
        """Deal no more faults: the present one is the last, and the verdict is of what was played."""
        self._stopped = True

    def _deck(self, names: Sequence[str]) -> Iterator[Fault]:
        """Each fault once before any comes again, in an order decided by chance."""
        while True:
            faults = [FAULTS[name] for name in names or FAULTS]
            self.chance.shuffle(faults)
            yield from faults

    def _pause(self) -> None:
        began = time.monotonic()
        self.wait(self.chance.uniform(*_QUIET))
        self.quiet.latencies += self._latencies(began, time.monotonic() - 0.5)
        self.fallen += self.stage.fallen()

    def _one(self, fault: Fault) -> None:
        held = self.held[fault.name]
        held.times += 1
        began = time.monotonic()
        with fault.hold(self):
            self.wait(self.chance.uniform(*_HOLD))
            ended = time.monotonic()
        recovery = self._recovery()
        held.recoveries.append(recovery)
        latencies = self._latencies(began, ended)
        held.latencies += latencies
        worst = max(latencies, default=0.0)
        self._say(f"{fault.sentence}: {ended - began:.0f} s, canary at worst {worst:.2f} s, recovered in {recovery:.1f} s")

    def _recovery(self) -> float:
        """Return how long it takes until a canary committed from now on arrives."""
        began = time.monotonic()

        def heard() -> bool:
            recent = [sent.id for sent in self.canary.sent[-200:] if sent.at > began]
            return any(id_ in self.tap.canaries for id_ in recent)

        eventually(heard, _STUCK_SECONDS, "the canary to be heard again (stuck)", interval=0.05)
        return time.monotonic() - began

    def _latencies(self, began: float, ended: float) -> list[float]:
        """Of the canaries committed between the two times; one that has not come yet counts as long as it has been away."""
        now, arrived = time.monotonic(), self.tap.canaries
        recent = [sent for sent in self.canary.sent[-20_000:] if began <= sent.at <= ended and not self._is_undone(sent.at)]
        return [max(0.0, arrived.get(sent.id, now) - sent.at) for sent in recent]

    def _is_undone(self, at: float) -> bool:
        return any(copied <= at <= replaced for copied, replaced in self._undone)

    # --- its end ---

    def finish(self) -> Judgement:
        """Stop writing, let everything drain, end all processes, and judge."""
        self._say("drains")
        self.canary.trouble.clear()
        self.canary.stop()
        self.stage.end_writers()
        self.stage.heal()
        self.stage.drain(_DRAIN_SECONDS)
        self._everything_reached_the_tap()
        self.fallen += self.stage.fallen()
        self.stage.end()
        self.tap.stop()
        ledger = self.stage.world.rows(_LEDGER)
        last = [_entry(tuple(row)) for row in ledger]
        applied = [_entry(tuple(row)) for row in ledger if row.topic in (DONE, NOTED)]
        return judgement.of([*self.branches, last], self.tap.arrivals, self.stage.world.effects(), applied)

    def _everything_reached_the_tap(self) -> None:
        with self.stage.world.channel() as channel:
            eventually(
                lambda: channel.queue_declare(Tap.QUEUE, passive=True).method.message_count == 0, 60, "the tap to be read"
            )


def _entry(row: Sequence[object]) -> Entry:
    id_, key, digest, _topic = row
    return Entry(id=str(id_), key=None if key is None else str(key), sequence=None, digest=str(digest))
