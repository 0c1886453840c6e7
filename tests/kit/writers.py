"""A process that commits messages and, in the same transactions, a ledger of them by ordinary SQL.

`python -m tests.kit.writers SEED [PACE]` works on DATABASE_URL until SIGTERM; it may be killed anywhere. The ledger is the
truth: it has a row for each message that committed, and none for what was rolled back.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from blinker import NamedSignal
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import Outbox
from outbox.database import create_engine
from outbox.message import JSON
from outbox.process import failpoints
from tests.kit.history import fingerprint
from tests.kit.recorder import DONE, NOTED, REFUSED

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

HOT_KEYS = 20
#: Seconds between two transactions of one writer, at most: the point is to race, not to fill the disk.
PACE_SECONDS = 0.06

metadata = sa.MetaData()
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("message_id", sa.String(64), nullable=False),
    sa.Column("topic", sa.String(64), nullable=False),
    sa.Column("key", sa.String(64)),
    sa.Column("digest", sa.String(16), nullable=False),
)


class Writer:
    """Transactions of every shape on one database, decided by *chance*."""

    def __init__(self, url: str, chance: random.Random, topics: tuple[str, str] = (DONE, NOTED)) -> None:
        self._engine = create_engine(url)
        self._chance = chance
        self._keyed_topic, self._unkeyed_topic = topics
        self._session = Session(self._engine)
        self._outbox = Outbox(session=lambda: self._session, engine=self._engine, source="/tests")
        self._work_done = NamedSignal("work-done")
        self._outbox.capture(self._work_done, topic=self._keyed_topic, key="{key}")

    def transaction(self) -> None:
        """Commit, or roll back, one transaction."""
        chance = self._chance
        keys = [f"hot:{chance.randrange(HOT_KEYS)}" for _ in range(chance.choice((1, 1, 1, 2)))]
        # Closed at its end: what one transaction leaves in a session must not reach the next.
        with Session(self._engine) as self._session:
            self._session.begin()
            for _ in range(chance.choice((1, 1, 1, 2, 3, 5, chance.randint(1, 50)))):
                self._within_savepoint_or_not(lambda: self._say(chance.choice(keys)))
            self._end(commit=chance.random() > 0.1)

    def _end(self, *, commit: bool) -> None:
        if commit:
            self._session.commit()
        else:
            self._session.rollback()

    def _within_savepoint_or_not(self, say: Callable[[], None]) -> None:
        if self._chance.random() > 0.2:
            say()
            return
        savepoint = self._session.begin_nested()
        say()
        if self._chance.random() < 0.4:
            savepoint.rollback()
        else:
            savepoint.commit()

    def _say(self, key: str) -> None:
        kind = self._chance.random()
        if kind < 0.7:
            self.send_signal(key, "x" * self._chance.randrange(400))
        elif kind < 0.72:
            self.send(self._keyed_topic, b"", key)
        elif kind < 0.74:
            self.send(self._keyed_topic, self._chance.randbytes(self._chance.randrange(200 * 1024)), key)
        elif kind < 0.98:
            self.send(self._unkeyed_topic, {"number": self._chance.randrange(10**6), "text": "Grüße, 世界"}, None)
        else:
            self.send(REFUSED, None, None)

    def send_signal(self, key: str, text: str) -> None:
        """One message by way of the captured signal."""
        data: dict[str, Any] = {"key": key, "text": text}
        [(_, message_id)] = self._work_done.send(None, **data)
        self._note(message_id, self._keyed_topic, key, data)

    def send(self, topic: str, data: Any, key: str | None) -> None:
        """One message without a signal."""
        self._note(self._capture(topic, data, key), topic, key, data)

    def _capture(self, topic: str, data: Any, key: str | None) -> UUID:
        content_type = "application/octet-stream" if isinstance(data, bytes) else JSON
        return self._outbox.send(topic, data, key=key, content_type=content_type)

    def _note(self, message_id: UUID, topic: str, key: str | None, data: Any) -> None:
        row = {"message_id": str(message_id), "topic": topic, "key": key, "digest": fingerprint(data)}
        self._session.execute(ledger.insert().values(row))


def main() -> None:
    """Write until SIGTERM."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    failpoints.arm(os.environ)
    chance = random.Random(sys.argv[1])
    pace = float(sys.argv[2]) if len(sys.argv) > 2 else PACE_SECONDS
    writer = Writer(os.environ["DATABASE_URL"], chance)
    print("writing", flush=True)
    while not stop.wait(chance.uniform(0, pace)):
        with suppress(DBAPIError):  # the server went away; whether the transaction committed, the ledger knows
            writer.transaction()


if __name__ == "__main__":
    main()
