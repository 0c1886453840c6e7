"""The tables, and the life of a message in them.

```text
 send() + COMMIT ──► outbox_message (never updated)
                └──► outbox_pending ── confirmed ──────────────► row deleted, outbox_receipt written
                        │  ▲
                        │  └── requeue (a person) ◄── dead, unroutable
                        ├── returned: no queue bound ─► unroutable ─ a binding appears ─► pending
                        ├── a queue refused, or is silent ► retrying ─ after the backoff ─► pending
                        ├── message's own fault ──────► retrying … ─ attempts used up ──► dead
                        └── discard (a person) ───────► discarded (kept, never sent)
```

These definitions are for building statements; `outbox.migrations` makes the tables.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

#: A constant: a key's shard never changes, whatever runs. crc32 of the key, or of the id of a message without key.
SHARDS = 64


class State(StrEnum):
    """What a pending row waits for. Rows that are neither pending nor discarded hold their key."""

    PENDING = "pending"
    RETRYING = "retrying"
    UNROUTABLE = "unroutable"
    DEAD = "dead"
    DISCARDED = "discarded"


#: The states of a row that later messages of its key must wait for (an unroutable one: only those of its topic).
HOLDING = (State.RETRYING, State.UNROUTABLE, State.DEAD)


class Timestamp(TypeDecorator[datetime]):
    """An aware UTC datetime; where the database has no time zones it is stored as naive UTC."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(sa.DateTime(timezone=dialect.name == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


#: SQLite numbers rows by itself only in a column that is exactly INTEGER.
Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
#: Topics and keys compare byte by byte everywhere: no locale, no case folding.
Name = (
    sa.String(255)
    .with_variant(postgresql.TEXT(collation="C"), "postgresql")
    .with_variant(mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
)
Bytes = sa.LargeBinary().with_variant(mysql.MEDIUMBLOB(), "mysql", "mariadb")

metadata = sa.MetaData()


def _partial(name: str, *columns: str, where: str) -> sa.Index:
    return sa.Index(name, *columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))


message = sa.Table(
    "outbox_message",
    metadata,
    sa.Column("id", Number, primary_key=True),  # the row number; outside this database only message_id is known
    sa.Column("message_id", sa.Uuid(), nullable=False),
    sa.Column("source", Name, nullable=False),
    sa.Column("topic", Name, nullable=False),
    sa.Column("key", Name),
    sa.Column("sequence", sa.BigInteger),
    sa.Column("content_type", sa.String(255), nullable=False),
    sa.Column("headers", sa.Text),  # a JSON object of texts, NULL for none
    sa.Column("body", Bytes, nullable=False),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Index("outbox_message_message_id", "message_id"),
    sqlite_autoincrement=True,
    postgresql_partition_by="RANGE (id)",
)

pending = sa.Table(
    "outbox_pending",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("message_row", sa.BigInteger, nullable=False),
    sa.Column("shard", sa.SmallInteger, nullable=False),
    sa.Column("topic", Name, nullable=False),
    sa.Column("key", Name),
    sa.Column("sequence", sa.BigInteger),
    sa.Column("available_at", Timestamp, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("state", sa.String(12), nullable=False, server_default=State.PENDING.value),
    sa.Column("unheard", sa.String(4), nullable=False, server_default="hold"),  # `drop`: nobody listening is fine
    sa.Column("error", sa.Text),
    sa.Index("outbox_pending_message_row", "message_row"),
    # By topic, so that the first message of each topic of a key is found without a look at what waits behind it.
    _partial("outbox_pending_key", "key", "topic", "sequence", where="key IS NOT NULL AND state <> 'discarded'"),
    # Small by nature: rows that wait for something. Finding what holds a key must not cost a look at the backlog, nor at what
    # people discarded.
    _partial("outbox_pending_holds", "key", "sequence", where="state IN ('retrying', 'unroutable', 'dead')"),
    _partial("outbox_pending_holding", "key", "id", where="state <> 'pending'"),
    sqlite_autoincrement=True,
)

key = sa.Table(
    "outbox_key",
    metadata,
    sa.Column("key", Name, primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False),
)

shard = sa.Table(
    "outbox_shard",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("owner", sa.String(64)),  # outbox_relay.id
    sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),  # counts owners: a stale one can't settle
    sa.Column("lease_until", Timestamp),  # by the database's clock
)

relay = sa.Table(
    "outbox_relay",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("started_at", Timestamp, nullable=False),
    sa.Column("seen_at", Timestamp, nullable=False),  # by the database's clock
    sa.Column("state", sa.String(12), nullable=False),  # starting, running, idle, draining
    sa.Column("broker_connected", sa.Boolean, nullable=False),
    sa.Column("broker_blocked", sa.Boolean, nullable=False),
    sa.Column("broker_detail", sa.Text),  # why not connected, or blocked
    sa.Column("trouble", sa.Text),  # what else hinders it, and the next step
)

receipt = sa.Table(
    "outbox_receipt",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("relay", sa.String(64), nullable=False),
    sa.Column("settled_at", Timestamp, nullable=False),
    sa.Column("messages", sa.Integer, nullable=False),
    sa.Column("first_row", sa.BigInteger, nullable=False),  # lowest and highest outbox_message.id in it,
    sa.Column("last_row", sa.BigInteger, nullable=False),  # so that one message's receipt is found by index
    sa.Column("pending_ids", Bytes, nullable=False),  # 8 bytes each, big-endian
    sa.Column("message_ids", Bytes, nullable=False),  # 16 bytes each, in the same order
    sa.Column("oldest_age_seconds", sa.Float, nullable=False),  # created to confirmed, of its oldest message
    sa.Column("duration_seconds", sa.Float, nullable=False),  # first publish to last confirm
    sa.Index("outbox_receipt_last_row", "last_row"),
    sa.Index("outbox_receipt_settled_at", "settled_at"),
    sqlite_autoincrement=True,
)

action = sa.Table(
    "outbox_action",
    metadata,
    sa.Column("id", Number, primary_key=True),
    sa.Column("at", Timestamp, nullable=False),
    sa.Column("actor", sa.String(255), nullable=False),  # user@host of who typed it
    sa.Column("action", sa.String(20), nullable=False),  # requeue, discard; later pause, resume, throttle, replay
    sa.Column("topic", Name),
    sa.Column("message_id", sa.Uuid()),
    sa.Column("reason", sa.Text),
    sqlite_autoincrement=True,
)

VERSION_TABLE = "outbox_version"
TABLE_NAMES = frozenset({*metadata.tables, VERSION_TABLE})


def include_object(_object: object, name: str | None, type_: str, reflected: bool, _compare_to: object) -> bool:
    """Keep a user's Alembic autogenerate from dropping our tables: pass it as `include_object` in `env.py`."""
    ours = name is not None and (name in TABLE_NAMES or name.startswith("outbox_message_"))
    return not (type_ == "table" and reflected and ours)
