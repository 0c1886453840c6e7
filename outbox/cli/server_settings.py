"""What of a PostgreSQL server, database or session stands in our way, though nothing is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outbox.cli.findings import Finding, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection

#: A statement of ours on a large outbox may take so long.
_LONG_MS = 10_000


def examine(connection: Connection) -> Iterator[Finding]:
    """Yield a warning for each setting that makes something slower, refused or unheard."""
    from outbox.database import notifications

    driver: Any = connection.connection.driver_connection
    yield from _encoding(connection)
    yield from _limits(connection)
    if notifications.is_pooled(driver):
        yield from _pooler(driver)


def _shown(connection: Connection, name: str) -> str:
    import sqlalchemy as sa

    return str(connection.scalar(sa.text("SELECT setting FROM pg_settings WHERE name = :name"), {"name": name}))


def _encoding(connection: Connection) -> Iterator[Finding]:
    encoding = _shown(connection, "server_encoding")
    if encoding != "UTF8":
        detail = (
            f"the database's encoding is {encoding}: a topic, key or source that it has no letters for is refused at the commit"
        )
        yield Finding("encoding", Verdict.WARN, detail, "ASCII names, or a database with ENCODING 'UTF8'")


def _limits(connection: Connection) -> Iterator[Finding]:
    milliseconds = int(_shown(connection, "statement_timeout"))
    if 0 < milliseconds < _LONG_MS:
        detail = f"statement_timeout={milliseconds}ms: a longer read or purge of a large outbox is cancelled, again and again"
        yield Finding("limits", Verdict.WARN, detail, "ALTER ROLE … SET statement_timeout = 0 for the role of the relay")
    if _shown(connection, "default_transaction_read_only") == "on":
        detail = "default_transaction_read_only=on: nothing can be captured, sent or settled"
        yield Finding("limits", Verdict.FAIL, detail, "name the server or role that may write")


def _pooler(driver: Any) -> Iterator[Finding]:
    detail = "a pooler stands between: a relay hears of no commit through it, and polls"
    yield Finding("pooler", Verdict.WARN, detail, "let the relay's DATABASE_URL name the server itself")
    if getattr(driver, "prepare_threshold", None) is not None:
        detail = "this engine prepares statements, which a pooler that shares connections mixes up: commits fail now and then"
        fix = "create_engine(…, connect_args={'prepare_threshold': None}), or max_prepared_statements in PgBouncer from 1.21 on"
        yield Finding("pooler", Verdict.WARN, detail, fix)
