"""The letters of this service, one row for each recipient, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sqlalchemy.engine import Connection

    from consumers.notifications.letters import Letter

WAITING, SENT, GIVEN_UP = "waiting", "sent", "given up"
#: Longer than everything that handing in one letter may take: who claims it then finds that its process is gone.
LEASE = timedelta(minutes=10)
#: How long rows of settled letters stay, for whoever asks; addresses are nothing to keep for ever.
KEPT = timedelta(days=30)


class Base(DeclarativeBase):
    """The tables of this service."""


class Row(Base):
    """A letter.

    waiting ──claim──► waiting, not due while the lease lasts ──taken──► sent ──30 days──► (deleted)
       ▲                        │                 └──never, or too often later──► given up ──30 days──► (deleted)
       └────── later ◄──────────┘
    """

    __tablename__ = "notifications_letter"

    id: Mapped[int] = mapped_column(sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True)
    source: Mapped[str] = mapped_column(sa.Text)
    message_id: Mapped[str] = mapped_column(sa.Text, index=True)
    #: When the message was sent; naive UTC, as all times here.
    said_at: Mapped[datetime | None]
    speaker_id: Mapped[int] = mapped_column(sa.BigInteger)
    name: Mapped[str] = mapped_column(sa.Text)
    address: Mapped[str] = mapped_column(sa.Text)
    subject: Mapped[str] = mapped_column(sa.Text)
    text: Mapped[str] = mapped_column(sa.Text)
    state: Mapped[str] = mapped_column(sa.String(10), default=WAITING)
    #: How often it was claimed; also the token of the claim.
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime]
    settled_at: Mapped[datetime | None]
    #: What the mail server said last.
    answer: Mapped[str | None] = mapped_column(sa.Text)


_waits = Row.state == WAITING
# Those that wait are few: an index of them alone stays small.
sa.Index("notifications_letter_due", Row.due_at, Row.id, sqlite_where=_waits, postgresql_where=_waits)
sa.Index("notifications_letter_address", Row.address, Row.id, sqlite_where=_waits, postgresql_where=_waits)
sa.Index("notifications_letter_settled", Row.settled_at)


@dataclass(frozen=True, slots=True)
class Claim:
    """A letter that is this process's to hand in until the lease ends."""

    id: int
    attempts: int
    message_id: str
    said_at: datetime | None
    speaker_id: int
    name: str
    address: str
    subject: str
    text: str


_CLAIMED = tuple(getattr(Row, name) for name in Claim.__dataclass_fields__)


def naive(moment: datetime) -> datetime:
    """Return *moment* as the columns keep it."""
    return moment.astimezone(UTC).replace(tzinfo=None)


def add(db: Session, source: str, id: str, said_at: datetime | None, letters: Iterable[Letter], now: datetime) -> None:
    """Keep the letters of a message; those that are there, also if the inbox has forgotten the message, are not doubled."""
    known = set(db.scalars(sa.select(Row.speaker_id).where(Row.message_id == id, Row.source == source)))
    for letter in letters:
        if letter.speaker_id not in known:
            known.add(letter.speaker_id)
            values = {name: getattr(letter, name) for name in letter.__slots__}
            said = naive(said_at) if said_at else None
            db.add(Row(source=source, message_id=id, said_at=said, due_at=naive(now), **values))


def _due(now: datetime) -> sa.ColumnElement[bool]:
    """Letters to one address leave in order: who hears "cancelled" has heard "accepted" before."""
    earlier = aliased(Row)
    before = sa.exists().where(earlier.state == WAITING, earlier.address == Row.address, earlier.id < Row.id)
    return sa.and_(_waits, Row.due_at <= naive(now), ~before)


def is_due(connection: Connection, now: datetime) -> bool:
    """Say whether a letter can be handed in now."""
    return bool(connection.scalar(sa.select(sa.exists().where(_due(now)))))


def claim(connection: Connection, now: datetime) -> Claim | None:
    """Take the letter that is due for the longest, so that no other process takes it before the lease ends."""
    query = sa.select(*_CLAIMED).where(_due(now)).order_by(Row.due_at, Row.id).limit(1).with_for_update(skip_locked=True)
    row = connection.execute(query).first()
    if row is None:
        return None
    found = Claim(**{**row._mapping, "attempts": row.attempts + 1})
    values = {"attempts": found.attempts, "due_at": naive(now + LEASE)}
    connection.execute(sa.update(Row).where(Row.id == found.id).values(values))
    return found


def sent(connection: Connection, of: Claim, now: datetime) -> None:
    """Note that the mail server has taken a letter."""
    _settle(connection, of, state=SENT, settled_at=naive(now), answer=None)


def given_up(connection: Connection, of: Claim, now: datetime, answer: str) -> None:
    """Note that a letter will not be handed in again."""
    _settle(connection, of, state=GIVEN_UP, settled_at=naive(now), answer=answer)


def later(connection: Connection, of: Claim, due_at: datetime, answer: str) -> None:
    """Let a letter wait until *due_at*."""
    _settle(connection, of, due_at=naive(due_at), answer=answer)


def release(connection: Connection, of: Claim, now: datetime) -> None:
    """Give a claim back as if it had not been taken."""
    _settle(connection, of, due_at=naive(now), attempts=of.attempts - 1)


def _settle(connection: Connection, of: Claim, **values: Any) -> None:
    # After a longer pause than the lease it is another's, who decides.
    mine = sa.and_(Row.id == of.id, Row.attempts == of.attempts, _waits)
    connection.execute(sa.update(Row).where(mine).values(**values))


def waiting(connection: Connection) -> int:
    """Return how many letters wait."""
    return int(connection.scalar(sa.select(sa.func.count()).select_from(Row).where(_waits)) or 0)


def forget(connection: Connection, now: datetime) -> None:
    """Delete the letters that were settled long ago."""
    connection.execute(sa.delete(Row).where(Row.settled_at < naive(now - KEPT)))


def unsent(connection: Connection) -> list[sa.Row[Any]]:
    """Return the letters that wait after an attempt, or were given up, with what the mail server said."""
    tried = sa.or_(Row.state == GIVEN_UP, sa.and_(_waits, Row.attempts > 0))
    columns = (Row.id, Row.state, Row.attempts, Row.message_id, Row.speaker_id, Row.due_at, Row.answer)
    return list(connection.execute(sa.select(*columns).where(tried).order_by(Row.id)))


def revive(connection: Connection, ids: Collection[int], now: datetime) -> int:
    """Let letters that were given up wait again, from the beginning; return how many were."""
    chosen = sa.and_(Row.id.in_(ids), Row.state == GIVEN_UP)
    values = {"state": WAITING, "attempts": 0, "due_at": naive(now), "settled_at": None}
    return int(connection.execute(sa.update(Row).where(chosen).values(values)).rowcount)
