"""Which part of the key space is mine: leases on all shards, by the database's clock, until they run out or are given back.

For now one relay works at a time: the first takes every shard, others wait. Leases are rows, not session locks: they pass
connection poolers, and they free the shards of a relay that hangs.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from outbox import database
from outbox.store import leases

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine

#: A lease is renewed when this part of it has passed: two renewals may fail before it ends.
_RENEW_AFTER = 1 / 3


def boottime() -> float:
    """Return seconds of a clock that also runs while the machine sleeps, where there is one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Lease:
    """One time that a relay has the shards: from their take, through all renewals, to their loss. For any thread."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._ends_at = -math.inf
        #: What is written so long before the end can be with the broker by then, and clocks need not run alike.
        self._margin = max(seconds / 10, min(1.0, seconds / 3))

    def extend(self, asked_at: float) -> None:
        """It was taken, or renewed, by a statement that was sent at *asked_at*."""
        self._ends_at = asked_at + self._seconds

    def end(self) -> None:
        """The shards are lost, or given back: whatever comes, this lease is over."""
        self._ends_at = -math.inf

    def valid(self) -> bool:
        """Say whether it has not run out."""
        return self._clock() < self._ends_at

    def may_write(self) -> bool:
        """Say whether what is written to the broker now is written in time."""
        return self._clock() < self._ends_at - self._margin


class Shards:
    """The shards of relay *relay_id*: taken, renewed, given back, lost."""

    def __init__(self, engine: Engine, relay_id: str, lease_seconds: float, clock: Callable[[], float] = boottime) -> None:
        self._engine = database.autocommitting(engine)
        self._relay_id = relay_id
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._look_at = 0.0
        #: The present lease, or the last one.
        self.lease = Lease(lease_seconds, clock)
        #: Shard → epoch; empty while another relay has them.
        self.epochs: dict[int, int] = {}
        #: Who has the shards while we don't.
        self.holder: leases.Holder | None = None
        #: How many shards there are no rows for: nobody can have them.
        self.missing = 0

    @property
    def owned(self) -> bool:
        """Whether this relay took the shards and has not heard otherwise."""
        return bool(self.epochs)

    def valid(self) -> bool:
        """Say whether it may publish: the lease, counted from before its renewal was sent, has not run out."""
        return self.owned and self.lease.valid()

    def keep_in(self) -> float:
        """Return in how many seconds `keep` has something to do."""
        return max(0.0, self._look_at - self._clock())

    def look_now(self) -> None:
        """Let the next `keep` ask the database, however lately it did."""
        self._look_at = 0.0

    def keep(self) -> bool:
        """Take or renew the shards if it is time to; returns True when they were just taken or just lost."""
        asked_at = self._clock()
        if asked_at < self._look_at:
            return False
        return self._renew(asked_at) if self.owned else self._take(asked_at)

    def _take(self, asked_at: float) -> bool:
        with self._engine.begin() as connection:
            found = leases.take(connection, self._relay_id, self._lease_seconds)
        self.missing = found.missing if isinstance(found, leases.Damaged) else 0
        if isinstance(found, leases.Damaged):
            self.holder, self._look_at = None, asked_at + 1.0
            return False
        if isinstance(found, leases.Holder):
            self.holder = found if found.relay else None
            self._look_at = asked_at + min(1.0, found.remaining_seconds + 0.01)
            return False
        self.holder, self.epochs = None, found
        self.lease = Lease(self._lease_seconds, self._clock)
        self._extend(asked_at)
        return True

    def _renew(self, asked_at: float) -> bool:
        with self._engine.begin() as connection:
            mine = leases.renew(connection, self._relay_id, self._lease_seconds)
        if mine:
            self._extend(asked_at)
            return False
        self.lease.end()
        self.epochs = {}
        self._look_at = 0.0
        return True

    def _extend(self, asked_at: float) -> None:
        self.lease.extend(asked_at)
        self._look_at = asked_at + self._lease_seconds * _RENEW_AFTER

    def release(self) -> None:
        """Give the shards back."""
        if self.owned:
            with self._engine.begin() as connection:
                self.lease.end()
                leases.release(connection, self._relay_id)
            self.epochs = {}
