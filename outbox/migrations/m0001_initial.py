"""Version 1: all tables. Written out, not taken from `outbox.tables`: what was released never changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox.tables import SHARDS, Bytes, Name, Number, Timestamp

if TYPE_CHECKING:
    from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Create the tables, their indexes, the default partition (PostgreSQL) and the shards."""
    _messages(op)
    _pending(op)
    op.create_table(
        "outbox_key",
        sa.Column("key", Name, primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
    )
    _relays(op)
    _receipts(op)
    op.create_table(
        "outbox_action",
        sa.Column("id", Number, primary_key=True),
        sa.Column("at", Timestamp, nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("topic", Name),
        sa.Column("message_id", sa.Uuid()),
        sa.Column("reason", sa.Text),
        sqlite_autoincrement=True,
    )


def _messages(op: Operations) -> None:
    op.create_table(
        "outbox_message",
        sa.Column("id", Number, primary_key=True),
        sa.Column("message_id", sa.Uuid(), nullable=False),
        sa.Column("source", Name, nullable=False),
        sa.Column("topic", Name, nullable=False),
        sa.Column("key", Name),
        sa.Column("sequence", sa.BigInteger),
        sa.Column("content_type", sa.String(255), nullable=False),
        sa.Column("headers", sa.Text),
        sa.Column("body", Bytes, nullable=False),
        sa.Column("created_at", Timestamp, nullable=False),
        sqlite_autoincrement=True,
        postgresql_partition_by="RANGE (id)",
    )
    op.create_index("outbox_message_message_id", "outbox_message", ["message_id"])
    if op.get_context().dialect.name == "postgresql":
        # Whatever partitions exist, an insert finds a place: a missing partition must never fail a user's commit.
        op.execute("CREATE TABLE outbox_message_default PARTITION OF outbox_message DEFAULT")


def _pending(op: Operations) -> None:
    op.create_table(
        "outbox_pending",
        sa.Column("id", Number, primary_key=True),
        sa.Column("message_row", sa.BigInteger, nullable=False),
        sa.Column("shard", sa.SmallInteger, nullable=False),
        sa.Column("topic", Name, nullable=False),
        sa.Column("key", Name),
        sa.Column("sequence", sa.BigInteger),
        sa.Column("available_at", Timestamp, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("state", sa.String(12), nullable=False, server_default="pending"),
        sa.Column("unheard", sa.String(4), nullable=False, server_default="hold"),
        sa.Column("error", sa.Text),
        sqlite_autoincrement=True,
    )
    op.create_index("outbox_pending_message_row", "outbox_pending", ["message_row"])
    op.create_index("outbox_pending_key", "outbox_pending", ["key", "sequence"])
    waiting = sa.text("state <> 'pending'")
    op.create_index("outbox_pending_holding", "outbox_pending", ["key", "id"], postgresql_where=waiting, sqlite_where=waiting)
    if op.get_context().dialect.name == "postgresql":
        # Every row is deleted soon after it was written: vacuum by count, not by a share of a size that comes and goes.
        op.execute(
            "ALTER TABLE outbox_pending SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, "
            "autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 20000)"
        )


def _relays(op: Operations) -> None:
    shards = op.create_table(
        "outbox_shard",
        sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("owner", sa.String(64)),
        sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("lease_until", Timestamp),
    )
    op.bulk_insert(shards, [{"id": number} for number in range(SHARDS)])
    op.create_table(
        "outbox_relay",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("started_at", Timestamp, nullable=False),
        sa.Column("seen_at", Timestamp, nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("broker_connected", sa.Boolean, nullable=False),
        sa.Column("broker_blocked", sa.Boolean, nullable=False),
        sa.Column("broker_detail", sa.Text),
    )


def _receipts(op: Operations) -> None:
    op.create_table(
        "outbox_receipt",
        sa.Column("id", Number, primary_key=True),
        sa.Column("relay", sa.String(64), nullable=False),
        sa.Column("settled_at", Timestamp, nullable=False),
        sa.Column("messages", sa.Integer, nullable=False),
        sa.Column("first_row", sa.BigInteger, nullable=False),
        sa.Column("last_row", sa.BigInteger, nullable=False),
        sa.Column("pending_ids", Bytes, nullable=False),
        sa.Column("message_ids", Bytes, nullable=False),
        sa.Column("oldest_age_seconds", sa.Float, nullable=False),
        sa.Column("duration_seconds", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("outbox_receipt_last_row", "outbox_receipt", ["last_row"])
    op.create_index("outbox_receipt_settled_at", "outbox_receipt", ["settled_at"])
