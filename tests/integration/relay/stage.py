"""A relay turned by hand: on a real database, with a scripted broker, by a clock that stands still between turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import tables
from outbox.relay.daemon import Mode, Relay
from outbox.settings import Settings
from outbox.store.clock import clock, now
from tests.kit.builders import write
from tests.kit.fakes import FakeBroker

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine, Row

    from outbox.message import Message
    from outbox.relay.broker import Outcome

#: No scenario here takes more turns than this.
_ENOUGH = 2000


class Clock:
    """Stands still until moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def settings(**changes: Any) -> Settings:
    """Settings of a relay whose engine and broker are given to it."""
    return Settings(broker_url="amqp://user:secret@broker.invalid/", exchange="openevent", **changes)


class Stage:
    """One relay, its database and its broker."""

    def __init__(
        self,
        engine: Engine,
        script: Callable[[Message], Outcome | None] | None = None,
        *,
        whole_batches: bool = False,
        **changes: Any,
    ) -> None:
        self.engine = engine
        self.clock = Clock()
        self.broker = FakeBroker(script, patient=False, whole_batches=whole_batches)
        self.broker.start()
        self.relay = Relay(settings(**changes), engine, self.broker, Mode.RUN, clock=self.clock, lease_clock=self.clock)

    # --- the database ---

    def write(self, *messages: Message, **how: Any) -> list[int]:
        """Commit *messages*."""
        with self.engine.begin() as connection:
            return write(connection, *messages, **how)

    def rows(self) -> list[Row[Any]]:
        """What is in outbox_pending."""
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(tables.pending).order_by(tables.pending.c.id)))

    def states(self) -> list[str]:
        return [row.state for row in self.rows()]

    def receipts(self) -> list[Row[Any]]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(tables.receipt).order_by(tables.receipt.c.id)))

    def published_total(self) -> int:
        return sum(receipt.messages for receipt in self.receipts())

    def make_due(self) -> None:
        """Let every row be due by the database's clock, whatever it waited for."""
        dialect = self.engine.dialect.name
        with self.engine.begin() as connection:
            connection.execute(sa.update(tables.pending).values(available_at=now(dialect, "ago")), clock(dialect, ago=-1.0))

    def expire_leases(self) -> None:
        """Let all leases have run out by the database's clock."""
        dialect = self.engine.dialect.name
        with self.engine.begin() as connection:
            connection.execute(sa.update(tables.shard).values(lease_until=now(dialect, "ago")), clock(dialect, ago=-0.001))

    def connection(self) -> Connection:
        return self.engine.connect()

    # --- the relay ---

    def turn(self, times: int = 1, seconds: float = 0.02) -> None:
        """Turn the relay *times*, with *seconds* passing after each."""
        for _ in range(times):
            self.relay.turn()
            self.clock.now += seconds

    def until(self, predicate: Callable[[], Any], what: str = "the relay to get there") -> None:
        """Turn the relay until *predicate* is true."""
        for _ in range(_ENOUGH):
            if predicate():
                return
            self.turn()
        raise AssertionError(f"{_ENOUGH} turns were not enough for {what}; rows: {self.rows()[:5]}")

    def record(self) -> None:
        """Turn the relay until what it sent is answered and recorded: rows wait from then on."""
        forwarder = self.relay.forwarder
        self.until(lambda: not forwarder.lanes.flying and not len(forwarder.answers), "all answers to be recorded")

    def run_dry(self) -> None:
        """Turn the relay until nothing is left in the tables."""
        self.until(lambda: not self.rows(), "an empty outbox")

    def delivered(self) -> list[Message]:
        return self.broker.delivered

    def sequences(self, key: str) -> list[int | None]:
        """The numbers of *key* in order of arrival."""
        return [message.sequence for message in self.broker.delivered if message.key == key]
