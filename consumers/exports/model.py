"""What this service knows: the last state that the messages told of each thing, and which files are behind."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

Document = dict[str, Any]

#: What a column of ids takes.
LARGEST_ID = 2**63 - 1


class Base(DeclarativeBase):
    """The tables of this service."""


class Part(Base):
    """A thing of a conference as its last message described it; a deleted one stays as a row without document.

    Rows are kept after a deletion because a message may be *late* (a restored publisher): what was said earlier must
    not bring back what was deleted later.
    """

    __tablename__ = "exports_part"

    kind: Mapped[str] = mapped_column(sa.String(20), primary_key=True)  # event, session, speaker, microlocation
    id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    event_id: Mapped[int] = mapped_column(sa.BigInteger, index=True)
    said_at: Mapped[datetime] = mapped_column(sa.DateTime)  # naive UTC: when its message was sent
    document: Mapped[Document | None] = mapped_column(sa.JSON(none_as_null=True))


class Files(Base):
    """The files of one event: `changed` counts what was told, `written` what the files on disk contain."""

    __tablename__ = "exports_files"

    event_id: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    changed: Mapped[int] = mapped_column(sa.BigInteger, default=0)
    written: Mapped[int] = mapped_column(sa.BigInteger, default=0)


@dataclass(frozen=True, slots=True)
class Conference:
    """All that is known of one event, ordered by id; the dictionaries are those of the messages."""

    event: Document
    tracks: list[Document]
    sessions: list[Document]
    speakers: list[Document]
    microlocations: list[Document]


def is_id(value: object) -> bool:
    """Say whether *value* can be an id of the publisher: a whole number that its column takes, and no other thing of JSON."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_ID


def keep(db_session: Session, kind: str, id: int, event_id: int, said_at: datetime | None, document: Document | None) -> None:
    """Remember *document* as the state of a thing (None: deleted)."""
    part = db_session.get(Part, (kind, id))
    if part is None:
        db_session.add(Part(kind=kind, id=id, event_id=event_id, said_at=_naive(said_at), document=document))
    else:
        part.said_at, part.document = _naive(said_at), document
    _touch(db_session, event_id)


def keep_newest(
    db_session: Session, kind: str, id: int, event_id: int, said_at: datetime | None, document: Document | None
) -> None:
    """Remember *document* unless something said later is known: for a message that comes after one that followed it."""
    part = db_session.get(Part, (kind, id))
    if part is None or part.said_at <= _naive(said_at):
        keep(db_session, kind, id, event_id, said_at, document)


def _naive(said_at: datetime | None) -> datetime:
    return (said_at or datetime.now(UTC)).astimezone(UTC).replace(tzinfo=None)


def _touch(db_session: Session, event_id: int) -> None:
    """Note that the files of an event are behind."""
    files = db_session.get(Files, event_id)
    if files is None:
        db_session.add(Files(event_id=event_id, changed=1, written=0))
    else:
        files.changed += 1


def forget_event(db_session: Session, event_id: int) -> None:
    """Forget all parts of a deleted event but the row that says that it was deleted."""
    db_session.execute(sa.delete(Part).where(Part.event_id == event_id, Part.kind != "event"))


def behind(connection: Connection) -> list[tuple[int, int]]:
    """Return each event whose files are behind, and the count that files written now will contain."""
    query = sa.select(Files.event_id, Files.changed).where(Files.written < Files.changed).order_by(Files.event_id)
    return [(row.event_id, row.changed) for row in connection.execute(query)]


def written(connection: Connection, event_id: int, changed: int) -> None:
    """Note that the files of an event contain everything up to *changed*."""
    connection.execute(sa.update(Files).where(Files.event_id == event_id).values(written=changed))


def load(connection: Connection, event_id: int) -> Conference | None:
    """Return what is known of an event; None when it was deleted, or when nothing but parts of it is known yet."""
    query = sa.select(Part.kind, Part.document).where(Part.event_id == event_id, Part.document.is_not(None)).order_by(Part.id)
    documents: dict[str, list[Document]] = {"event": [], "session": [], "speaker": [], "microlocation": []}
    for kind, document in connection.execute(query):
        documents[kind].append(document or {})
    if not documents["event"]:
        return None
    core = documents["event"][0]
    return Conference(core["event"], core["tracks"], documents["session"], documents["speaker"], documents["microlocation"])
