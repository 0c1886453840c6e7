"""What work costs a database, counted and not timed: the same on every machine."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy.engine import Engine


@contextmanager
def statements(engine: Engine) -> Iterator[list[str]]:
    """Collect the statements sent inside the block, BEGIN and COMMIT not counted."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)


def wal_bytes(engine: Engine, work: Callable[[], object]) -> int:
    """Return how many bytes PostgreSQL writes ahead for *work*; with full_page_writes off, or it counts whole pages too."""

    def position() -> int:
        with engine.connect() as connection:
            return int(connection.scalar(sa.text("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")) or 0)

    before = position()
    work()
    return position() - before
