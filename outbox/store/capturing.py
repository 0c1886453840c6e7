"""Writing messages into the tables, in the caller's transaction. Nothing here begins or commits one.

The order in the batch is the order of sending. A keyed message takes the next number of its key from a counter row, whose
lock is then held until the commit: numbers are gapless, equal commit order, and return on rollback. Counters are locked in
the order of their keys, so two commits never wait for each other in a circle, and row ids are drawn only after that lock.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary
from zlib import crc32

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import StatementError

from outbox import tables
from outbox.database.errors import Meaning, meaning, sqlstate
from outbox.errors import CaptureError, InvalidMessage, SchemaError
from outbox.message import Message
from outbox.store.wakeup import CHANNEL
from outbox.tables import SHARDS

#: A statement carries at most this much; PostgreSQL refuses a message of 1 GiB, and everything is in memory twice.
_MAX_STATEMENT_BYTES = 16 * 1024**2
_MAX_STATEMENT_ROWS = 10_000
#: What PostgreSQL says of a text that its database's encoding has no characters for.
_UNTRANSLATABLE = "22P05"


@dataclass(frozen=True, slots=True)
class Held:
    """A message that waits for its transaction to commit."""

    message: Message
    #: `hold`: it waits until somebody listens; `drop`: nobody listening is fine.
    unheard: str = "hold"

    def __post_init__(self) -> None:
        check_unheard(self.unheard)


def check_unheard(value: str) -> None:
    """Raise InvalidMessage unless *value* says what becomes of a message that no queue takes."""
    if value not in ("hold", "drop"):
        raise InvalidMessage(
            f"unheard={value!r} is neither 'hold' (wait until a queue is bound) nor 'drop' (nobody listening is fine)"
        )


def write(connection: Connection, batch: Sequence[Held], *, notify: bool = False) -> None:
    """Write *batch* in the transaction that is open on *connection*; one round trip on PostgreSQL for any usual batch.

    With *notify* waiting relays are woken at the commit (PostgreSQL only). Raises SchemaError where the tables are missing or
    older than this code.
    """
    chunks = list(_chunks(batch))
    with _named_errors(connection):
        if connection.dialect.name not in ("postgresql", "sqlite"):
            # Numbering rows and locking counters is different on each database: a guess would lose or reorder messages.
            raise CaptureError(f"messages can't be written to {connection.dialect.name} yet; use PostgreSQL or SQLite")
        if connection.dialect.name == "sqlite":
            for chunk in chunks:
                _write_sqlite(connection, chunk)
            return
        if len(batch) == 1:
            _write_one_postgresql(connection, batch[0], notify)
            return
        if len(chunks) > 1:  # each would lock its own keys in order, but not all of them together
            _lock_keys(connection, _counts(batch))
        for chunk in chunks:
            _write_postgresql(connection, chunk, notify)


def shard_of(message: Message) -> int:
    """Return the shard of *message*: that of its key, so that a key is never in two relays' hands."""
    return crc32(message.key.encode() if message.key is not None else message.id.bytes) % SHARDS


def _chunks(batch: Sequence[Held]) -> Iterator[Sequence[Held]]:
    start = size = 0
    for end, held in enumerate(batch):
        if end > start and (size + len(held.message.body) > _MAX_STATEMENT_BYTES or end - start >= _MAX_STATEMENT_ROWS):
            yield batch[start:end]
            start, size = end, 0
        size += len(held.message.body)
    if start < len(batch):
        yield batch[start:]


def _counts(batch: Sequence[Held]) -> list[tuple[str, int]]:
    """Return key and number of messages, in the order in which every transaction locks them."""
    return sorted(Counter(h.message.key for h in batch if h.message.key is not None).items())


def _back(batch: Sequence[Held]) -> list[int | None]:
    """Return for each message how many of its key follow in the batch: its number is the key's new last one less that."""
    following: Counter[str] = Counter()
    found: list[int | None] = []
    for held in reversed(batch):
        key = held.message.key
        found.append(None if key is None else following[key])
        if key is not None:
            following[key] += 1
    return found[::-1]


def _headers(message: Message) -> str | None:
    # As ASCII: whatever encoding the database or the connection has, they are stored.
    return json.dumps(dict(message.headers), separators=(",", ":")) if message.headers else None


@contextmanager
def _named_errors(connection: Connection) -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise _not_in_encoding(f"the connection's client_encoding {error.encoding}", error) from error
    except StatementError as error:
        error.hide_parameters = True  # they are payloads, which have no business in a log
        if sqlstate(error) == _UNTRANSLATABLE:
            raise _not_in_encoding("the encoding of this database", error) from error
        if meaning(error) is Meaning.UNMIGRATED and "outbox_" in str(error.orig):
            # Often they are in another one: Flask-SQLAlchemy takes sqlite:///shop.db from the app's instance folder.
            where = connection.engine.url.set(query={}).render_as_string()
            raise SchemaError(
                f"the outbox tables are missing in {where}, or older than this code; let DATABASE_URL name this database and "
                "run: outbox migrate (in a test, or for a database in memory: outbox.migrations.upgrade(engine))"
            ) from error
        raise


def _not_in_encoding(what: str, error: Exception) -> CaptureError:
    lacking = "has no character for a part of it"
    if isinstance(error, UnicodeEncodeError):
        lacking = f"has no {error.object[error.start]!r}"
    return CaptureError(
        f"a topic, key or source can't be stored: {what} {lacking}; use client_encoding=utf8 in the URL and a database with "
        "encoding UTF8, or ASCII names (a body may hold anything: it is stored as bytes)"
    )


# --- PostgreSQL: one statement ------------------------------------------------------------------------------------------

# A clock of ours that is fast must not put a message off: what is due is asked of the database's.
_BATCH = """
WITH counted AS (
    INSERT INTO outbox_key AS counter (key, sequence)
    SELECT * FROM unnest(CAST(:counted_keys AS text[]), CAST(:counts AS bigint[]))
    ON CONFLICT (key) DO UPDATE SET sequence = counter.sequence + excluded.sequence
    RETURNING key, sequence
), sent AS (
    SELECT * FROM unnest(
        CAST(:ids AS uuid[]), CAST(:sources AS text[]), CAST(:topics AS text[]), CAST(:keys AS text[]), CAST(:back AS bigint[]),
        CAST(:content_types AS text[]), CAST(:headers AS text[]), CAST(:bodies AS text[]), CAST(:moments AS timestamptz[]),
        CAST(:shards AS smallint[]), CAST(:unheard AS text[])
    ) WITH ORDINALITY AS row (
        message_id, source, topic, key, back, content_type, headers, hex, created_at, shard, unheard, position
    )
), numbered AS (
    SELECT sent.*, counted.sequence - sent.back AS sequence FROM sent LEFT JOIN counted ON counted.key = sent.key
), written AS (
    INSERT INTO outbox_message (message_id, source, topic, key, sequence, content_type, headers, body, created_at)
    SELECT message_id, source, topic, key, sequence, content_type, headers, decode(hex, 'hex'), created_at
    FROM numbered ORDER BY position
    RETURNING id, message_id
), waiting AS (
    INSERT INTO outbox_pending (message_row, shard, topic, key, sequence, available_at, unheard)
    SELECT written.id, shard, topic, key, sequence, least(created_at, clock_timestamp()), unheard
    FROM numbered JOIN written USING (message_id) ORDER BY position
)
"""


def _array(name: str, type_: sa.types.TypeEngine[Any]) -> sa.BindParameter[Any]:
    return sa.bindparam(name, type_=postgresql.ARRAY(type_))


_PARAMETERS = (
    _array("counted_keys", sa.Text()), _array("counts", sa.BigInteger()), _array("ids", sa.Uuid()),
    _array("sources", sa.Text()), _array("topics", sa.Text()), _array("keys", sa.Text()), _array("back", sa.BigInteger()),
    _array("content_types", sa.Text()), _array("headers", sa.Text()), _array("bodies", sa.Text()),
    _array("moments", sa.DateTime(timezone=True)), _array("shards", sa.SmallInteger()), _array("unheard", sa.Text()),
)  # fmt: skip
_LOCK = sa.text(
    """
    INSERT INTO outbox_key AS counter (key, sequence) SELECT key, 0 FROM unnest(CAST(:keys AS text[])) AS key
    ON CONFLICT (key) DO UPDATE SET sequence = counter.sequence
    """
).bindparams(_array("keys", sa.Text()))
_WRITE = sa.text(_BATCH + "SELECT 1").bindparams(*_PARAMETERS)
_WRITE_AND_NOTIFY = sa.text(_BATCH + "SELECT pg_notify(:channel, '')").bindparams(*_PARAMETERS, channel=CHANNEL)


#: For one message, which most transactions have: less than half the work of the same with arrays, on both sides.
_ONE = """
WITH {counted}written AS (
    INSERT INTO outbox_message (message_id, source, topic, key, sequence, content_type, headers, body, created_at)
    SELECT CAST(:id AS uuid), CAST(:source AS text), CAST(:topic AS text), CAST(:key AS text), {sequence},
        CAST(:content_type AS text), CAST(:headers AS text), CAST(:body AS bytea), CAST(:moment AS timestamptz)
    {origin}
    RETURNING id, topic, key, sequence, created_at
){notified}
INSERT INTO outbox_pending (message_row, shard, topic, key, sequence, available_at, unheard)
SELECT id, CAST(:shard AS smallint), topic, key, sequence, least(created_at, clock_timestamp()), CAST(:unheard AS text)
FROM written{listened}
"""
_COUNTED = """counted AS (
    INSERT INTO outbox_key AS counter (key, sequence) VALUES (CAST(:key AS text), 1)
    ON CONFLICT (key) DO UPDATE SET sequence = counter.sequence + 1
    RETURNING sequence
), """


_ONE_TYPES: dict[str, sa.types.TypeEngine[Any]] = {
    "id": sa.Uuid(), "body": sa.LargeBinary(), "moment": sa.DateTime(timezone=True)
}  # fmt: skip


def _statement_for_one(*, keyed: bool, notify: bool) -> sa.TextClause:
    text = _ONE.format(
        counted=_COUNTED if keyed else "",
        sequence="counted.sequence" if keyed else "CAST(NULL AS bigint)",
        origin="FROM counted" if keyed else "",
        notified=", notified AS MATERIALIZED (SELECT pg_notify(:channel, ''))" if notify else "",
        listened=", notified" if notify else "",
    )
    return sa.text(text).bindparams(*(sa.bindparam(name, type_=type_) for name, type_ in _ONE_TYPES.items()))


class _ForDriver:
    """The statements for one message as one dialect's driver takes them.

    Compiled once: SQLAlchemy would look each up by the key of all its parts, which costs as much as the driver's own work.
    """

    def __init__(self, dialect: Dialect) -> None:
        self._statements = {
            (keyed, notify): _statement_for_one(keyed=keyed, notify=notify).compile(dialect=dialect)
            for keyed in (True, False)
            for notify in (True, False)
        }
        found = {name: type_.dialect_impl(dialect).bind_processor(dialect) for name, type_ in _ONE_TYPES.items()}
        self._convert = {name: convert for name, convert in found.items() if convert is not None}

    def execute(self, connection: Connection, parameters: dict[str, Any], *, notify: bool) -> None:
        compiled = self._statements[parameters["key"] is not None, notify]
        for name, convert in self._convert.items():
            parameters[name] = convert(parameters[name])
        order = compiled.positiontup
        given = parameters if order is None else tuple(parameters[name] for name in order)
        connection.exec_driver_sql(str(compiled), given)


#: By dialect: an engine has its own.
_for_driver: WeakKeyDictionary[Dialect, _ForDriver] = WeakKeyDictionary()


def _write_one_postgresql(connection: Connection, held: Held, notify: bool) -> None:
    message = held.message
    parameters = {
        "id": message.id,
        "source": message.source,
        "topic": message.topic,
        "key": message.key,
        "content_type": message.content_type,
        "headers": _headers(message),
        "body": message.body,
        "moment": message.created_at,
        "shard": shard_of(message),
        "unheard": held.unheard,
        "channel": CHANNEL,
    }
    driver = _for_driver.get(connection.dialect)
    if driver is None:
        driver = _for_driver.setdefault(connection.dialect, _ForDriver(connection.dialect))
    driver.execute(connection, parameters, notify=notify)


def _lock_keys(connection: Connection, counts: list[tuple[str, int]]) -> None:
    connection.execute(_LOCK, {"keys": [key for key, _ in counts]})


def _write_postgresql(connection: Connection, batch: Sequence[Held], notify: bool) -> None:
    counts = _counts(batch)
    messages = [held.message for held in batch]
    parameters = {
        "counted_keys": [key for key, _ in counts],
        "counts": [count for _, count in counts],
        "ids": [m.id for m in messages],
        "sources": [m.source for m in messages],
        "topics": [m.topic for m in messages],
        "keys": [m.key for m in messages],
        "back": _back(batch),
        "content_types": [m.content_type for m in messages],
        "headers": [_headers(m) for m in messages],
        # Not as an array of bytes: psycopg escapes those as for a string literal, which they are not, and other bytes would be
        # stored where standard_conforming_strings is off.
        "bodies": [m.body.hex() for m in messages],
        "moments": [m.created_at for m in messages],
        "shards": [shard_of(m) for m in messages],
        "unheard": [held.unheard for held in batch],
    }
    connection.execute(_WRITE_AND_NOTIFY if notify else _WRITE, parameters)


# --- SQLite -------------------------------------------------------------------------------------------------------------

_COUNT = sa.text(
    """
    INSERT INTO outbox_key (key, sequence) VALUES (:key, :count)
    ON CONFLICT (key) DO UPDATE SET sequence = sequence + excluded.sequence
    RETURNING sequence
    """
)


def _write_sqlite(connection: Connection, batch: Sequence[Held]) -> None:
    last = _count_keys(connection, _counts(batch))
    sequences = [
        None if back is None else last[held.message.key or ""] - back for held, back in zip(batch, _back(batch), strict=True)
    ]
    connection.execute(
        sa.insert(tables.message),
        [
            {
                "message_id": m.id, "source": m.source, "topic": m.topic, "key": m.key, "sequence": sequence,
                "content_type": m.content_type, "headers": _headers(m), "body": m.body, "created_at": m.created_at,
            }
            for m, sequence in zip((held.message for held in batch), sequences, strict=True)
        ],
    )  # fmt: skip
    # There is one writer at a time, and AUTOINCREMENT counts on from the highest: these rows are the last ones, without gap.
    last_row = connection.scalar(sa.select(sa.func.max(tables.message.c.id))) or 0
    connection.execute(
        sa.insert(tables.pending),
        [
            {
                "message_row": row, "shard": shard_of(held.message), "topic": held.message.topic, "key": held.message.key,
                "sequence": sequence, "available_at": held.message.created_at, "unheard": held.unheard,
            }
            for row, held, sequence in zip(range(last_row - len(batch) + 1, last_row + 1), batch, sequences, strict=True)
        ],
    )  # fmt: skip


def _count_keys(connection: Connection, counts: list[tuple[str, int]]) -> dict[str, int]:
    return {key: connection.execute(_COUNT, {"key": key, "count": count}).scalar_one() for key, count in counts}
