"""The tables of the consumer runtime, in the service's own database, and what happens to a delivery in them.

```text
 delivery ──► consumer_inbox (its id, once) ─┬─ handler returned ─► effects, in the same transaction
                                             └─ given up on ──────► consumer_parked, in the same transaction
                                                                    consumer_key.held: later messages of the key join it

 consumer_parked    parked ── requeue (a person) ──► due ── the worker replays it ──► row deleted, the next one is due
                    behind ── its predecessors are gone ─┘        └── fails again ──► parked
                    parked ── discard (a person) ──► discarded (kept for the inbox's retention, never applied)
```

Several services may share a database: every row names its service. `outbox.consumer.migrations` makes the tables.
"""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from outbox.tables import Bytes, Name, Number, Timestamp


class State(StrEnum):
    """What a parked message waits for. All but the discarded ones hold their key, where `holds` says so."""

    #: A person: requeue or discard.
    PARKED = "parked"
    #: Its turn: it came while its key was held, and nothing is wrong with it.
    BEHIND = "behind"
    #: `due_at`: then the worker replays it (requeued, asked for by `Retry(after)`, or its turn has come).
    DUE = "due"
    #: Nothing any more.
    DISCARDED = "discarded"


class Reason(StrEnum):
    """Why a message was parked."""

    FAILED = "failed"  # its handler raised, as often as allowed
    REJECTED = "rejected"  # its handler raised Reject
    LATER = "later"  # its handler raised Retry(after) over a minute
    INCOMPLETE = "incomplete"  # a field that the handler needs is missing
    NO_HANDLER = "no handler"
    UNDECODABLE = "undecodable"
    LATE = "late"  # a later message of its key was applied, and the service is strict about order
    BEHIND = "behind"  # its key is held
    CRASHED = "crashed"  # the process died while handling it, as often as allowed
    DEAD_LETTERED = "dead-lettered"  # the broker gave up on it


metadata = sa.MetaData()
_Service = sa.String(63)

inbox = sa.Table(
    "consumer_inbox",
    metadata,
    sa.Column("service", _Service, primary_key=True),
    sa.Column("source", Name, primary_key=True),
    sa.Column("message_id", Name, primary_key=True),
    sa.Column("taken_at", Timestamp, nullable=False),
    sa.Index("consumer_inbox_taken_at", "service", "taken_at"),
)

key = sa.Table(
    "consumer_key",
    metadata,
    sa.Column("service", _Service, primary_key=True),
    sa.Column("source", Name, primary_key=True),
    sa.Column("key", Name, primary_key=True),
    sa.Column("sequence", sa.BigInteger, nullable=False, server_default="0"),  # the highest that arrived; 0: none carried one
    sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("consumer_key_held", "service", postgresql_where=sa.text("held"), sqlite_where=sa.text("held")),
)

parked = sa.Table(
    "consumer_parked",
    metadata,
    sa.Column("id", Number, primary_key=True),  # the order of arrival
    sa.Column("service", _Service, nullable=False),
    sa.Column("source", Name, nullable=False),  # empty where the body can't be read
    sa.Column("message_id", Name, nullable=False),  # then a digest of the body
    sa.Column("topic", Name, nullable=False),
    sa.Column("key", Name),
    sa.Column("sequence", sa.BigInteger),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("reason", sa.String(16), nullable=False),
    sa.Column("holds", sa.Boolean, nullable=False),  # later messages of its key wait for it
    sa.Column("late", sa.Boolean, nullable=False),  # as it was on arrival
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),  # how often a handler failed on it
    sa.Column("starts", sa.Integer, nullable=False, server_default="0"),  # processes that began to replay it and did not end
    sa.Column("starter", sa.String(36)),  # the last of them
    sa.Column("error", sa.Text),  # one line
    sa.Column("detail", sa.Text),  # the traceback
    sa.Column("created_at", Timestamp),  # when it was sent
    sa.Column("parked_at", Timestamp, nullable=False),
    sa.Column("due_at", Timestamp),
    sa.Column("waiting_since", Timestamp),  # `later`: when its handler first asked for that
    sa.Column("acted_at", Timestamp),  # when a person last requeued or discarded it,
    sa.Column("actor", sa.String(255)),  # who that was (user@host),
    sa.Column("note", sa.Text),  # and why
    sa.Column("properties", sa.Text, nullable=False),  # AMQP properties and headers as JSON, for people
    sa.Column("body", Bytes, nullable=False),  # as it came
    sa.Index("consumer_parked_message_id", "service", "message_id"),
    sa.Index(
        "consumer_parked_holding",
        *("service", "source", "key", "id"),
        postgresql_where=sa.text("holds"),
        sqlite_where=sa.text("holds = 1"),  # as a condition on it is written there, else SQLite does not see that it fits
    ),
    sa.Index("consumer_parked_due", "service", "due_at"),
    sqlite_autoincrement=True,
)

attempt = sa.Table(
    "consumer_attempt",
    metadata,
    sa.Column("service", _Service, primary_key=True),
    sa.Column("source", Name, primary_key=True),
    sa.Column("message_id", Name, primary_key=True),
    sa.Column("attempts", sa.Integer, nullable=False),  # begun and not ended: each one a process that died
    sa.Column("begun_at", Timestamp, nullable=False),
)

counter = sa.Table(
    "consumer_counter",
    metadata,
    sa.Column("service", _Service, primary_key=True),
    # A row for each worker thread: one row for all would make their commits wait for each other.
    sa.Column("worker", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("applied", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("duplicates", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("late", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("gaps", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("parked", sa.BigInteger, nullable=False, server_default="0"),
)

#: The name of a constraint, because that is what PostgreSQL tells whoever breaks it.
ONLY_THE_RUNTIME_COMMITS = "only_the_runtime_commits"

#: Always empty.
nothing = sa.Table(
    "consumer_nothing",
    metadata,
    sa.Column("id", sa.BigInteger, primary_key=True, autoincrement=False),
)

#: On PostgreSQL a row while a transaction of messages is under way; no commit may find it (`seal`).
seal = sa.Table(
    "consumer_seal",
    metadata,
    sa.Column(
        "id",
        sa.BigInteger,
        sa.ForeignKey(nothing.c.id, name=ONLY_THE_RUNTIME_COMMITS, deferrable=True, initially="DEFERRED"),
        primary_key=True,
        autoincrement=False,
    ),
)

process = sa.Table(
    "consumer_process",
    metadata,
    sa.Column("service", _Service, primary_key=True),
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("host", sa.String(255), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", sa.String(32), nullable=False),
    sa.Column("state", sa.String(12), nullable=False),  # running, stopped
    sa.Column("connected", sa.Boolean, nullable=False),
    sa.Column("prefetch", sa.Integer),  # how many messages the queue may hand it at once; none: it was seen empty since
    sa.Column("started_at", Timestamp, nullable=False),
    sa.Column("seen_at", Timestamp, nullable=False),
    sa.Column("oldest_at", Timestamp),  # when the oldest message in its hands was sent
    sa.Column("caught_up_at", Timestamp),  # when it last had nothing in its hands, being connected
)
