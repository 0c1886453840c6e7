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


@contextmanager
def looked_at(engine: Engine, table: str) -> Iterator[list[int]]:
    """Count the rows and index entries of *table* that PostgreSQL visits for each SELECT sent inside the block."""
    seen: list[int] = []

    def explain(connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if table in statement and not statement.startswith("EXPLAIN"):
            plan = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar()
            seen.append(_visited(plan[0]["Plan"], table))

    event.listen(engine, "after_cursor_execute", explain)
    try:
        yield seen
    finally:
        event.remove(engine, "after_cursor_execute", explain)


def _visited(node: dict[str, Any], table: str) -> int:
    within = sum(_visited(child, table) for child in node.get("Plans", ()))
    if node.get("Relation Name") != table:
        return within
    rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return within + int(rows * node["Actual Loops"])


def wal_bytes(engine: Engine, work: Callable[[], object]) -> int:
    """Return how many bytes PostgreSQL writes ahead for *work*; with full_page_writes off, or it counts whole pages too."""

    def position() -> int:
        with engine.connect() as connection:
            return int(connection.scalar(sa.text("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")) or 0)

    before = position()
    work()
    return position() - before
