"""The versions of the consumer's tables; `outbox consumer migrate NAME` runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import sqlalchemy as sa

from outbox.migrations import History
from outbox.tables import Bytes, Name, Number, Timestamp

if TYPE_CHECKING:
    from alembic.operations import Operations


def _version_1(op: Operations) -> None:
    """All tables. Written out, not taken from `tables`: what was released never changes."""
    op.create_table(
        "consumer_inbox",
        sa.Column("service", sa.String(63), primary_key=True),
        sa.Column("source", Name, primary_key=True),
        sa.Column("message_id", Name, primary_key=True),
        sa.Column("taken_at", Timestamp, nullable=False),
    )
    op.create_index("consumer_inbox_taken_at", "consumer_inbox", ["service", "taken_at"])
    op.create_table(
        "consumer_key",
        sa.Column("service", sa.String(63), primary_key=True),
        sa.Column("source", Name, primary_key=True),
        sa.Column("key", Name, primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    held = sa.text("held")
    op.create_index("consumer_key_held", "consumer_key", ["service"], postgresql_where=held, sqlite_where=held)
    _parked(op)
    op.create_table(
        "consumer_attempt",
        sa.Column("service", sa.String(63), primary_key=True),
        sa.Column("source", Name, primary_key=True),
        sa.Column("message_id", Name, primary_key=True),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("begun_at", Timestamp, nullable=False),
    )
    _service(op)


def _parked(op: Operations) -> None:
    op.create_table(
        "consumer_parked",
        sa.Column("id", Number, primary_key=True),
        sa.Column("service", sa.String(63), nullable=False),
        sa.Column("source", Name, nullable=False),
        sa.Column("message_id", Name, nullable=False),
        sa.Column("topic", Name, nullable=False),
        sa.Column("key", Name),
        sa.Column("sequence", sa.BigInteger),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("reason", sa.String(16), nullable=False),
        sa.Column("holds", sa.Boolean, nullable=False),
        sa.Column("late", sa.Boolean, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("starts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("error", sa.Text),
        sa.Column("detail", sa.Text),
        sa.Column("created_at", Timestamp),
        sa.Column("parked_at", Timestamp, nullable=False),
        sa.Column("due_at", Timestamp),
        sa.Column("acted_at", Timestamp),
        sa.Column("actor", sa.String(255)),
        sa.Column("note", sa.Text),
        sa.Column("properties", sa.Text, nullable=False),
        sa.Column("body", Bytes, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("consumer_parked_message_id", "consumer_parked", ["service", "message_id"])
    op.create_index("consumer_parked_key", "consumer_parked", ["service", "source", "key", "id"])
    op.create_index("consumer_parked_due", "consumer_parked", ["service", "due_at"])


def _service(op: Operations) -> None:
    counts = ("applied", "duplicates", "late", "gaps", "parked")
    op.create_table(
        "consumer_counter",
        sa.Column("service", sa.String(63), primary_key=True),
        sa.Column("worker", sa.SmallInteger, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in counts),
    )
    op.create_table(
        "consumer_process",
        sa.Column("service", sa.String(63), primary_key=True),
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("state", sa.String(12), nullable=False),
        sa.Column("connected", sa.Boolean, nullable=False),
        sa.Column("started_at", Timestamp, nullable=False),
        sa.Column("seen_at", Timestamp, nullable=False),
        sa.Column("oldest_at", Timestamp),
        sa.Column("caught_up_at", Timestamp),
    )


def _version_2(op: Operations) -> None:
    """What keeps handlers from ending a transaction, and how long a message has been waiting at its handler's wish."""
    op.create_table("consumer_nothing", sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False))
    refused = sa.ForeignKey("consumer_nothing.id", name="only_the_runtime_commits", deferrable=True, initially="DEFERRED")
    op.create_table("consumer_seal", sa.Column("id", sa.BigInteger, refused, primary_key=True, autoincrement=False))
    op.add_column("consumer_parked", sa.Column("waiting_since", Timestamp))


def _version_3(op: Operations) -> None:
    """Which process began the replay of a parked message: only those that died count against it."""
    op.add_column("consumer_parked", sa.Column("starter", sa.String(36)))


def _version_4(op: Operations) -> None:
    """How many messages a process may hold: a successor that may hold fewer would see those it gave back out of order."""
    op.add_column("consumer_process", sa.Column("prefetch", sa.Integer))


def _version_5(op: Operations) -> None:
    """The head of a key is found without reading what was discarded before it."""
    op.create_index(
        "consumer_parked_holding",
        "consumer_parked",
        ["service", "source", "key", "id"],
        postgresql_where=sa.text("holds"),
        sqlite_where=sa.text("holds = 1"),
    )
    op.drop_index("consumer_parked_key", "consumer_parked")


CONSUMER = History(
    name="consumer",
    steps=(_version_1, _version_2, _version_3, _version_4, _version_5),
    command="outbox consumer migrate NAME",
)


def history(typed: str) -> History:
    """Return the history with the command to type for the service that commands know as *typed*."""
    return replace(CONSUMER, command=f"outbox consumer migrate {typed}")
