"""Makes the tables hold what an export says, and announces each thing that differed.

The export is the truth for what it names: rows are found by their `external_id` and set to its values, also where somebody had
changed them since. What it does not name (rows made through the API, rows of an older export) stays as it is. So a second run
finds nothing to do and sends nothing.

What was deleted here stays deleted, and what is deleted there is not brought here; a row that is deleted there and lives here
is reported, and left to a person. An export of another conference under an identifier that is taken is refused.

All of it is one transaction: nobody sees half a conference, and a run that fails leaves nothing. Meanwhile other writers of
this conference wait (on SQLite: all writers), which is why the files are read and checked before it begins.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from publisher.conference import announce, changes
from publisher.conference.models import Deleted, Event, Microlocation, Part, Speaker, Talk, Track
from publisher.openevent import ExportError, Note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from sqlalchemy.orm import Session

    from publisher.openevent import Conference, Row
    from publisher.openevent import Session as SessionRow

AnyPart = TypeVar("AnyPart", bound=Part)


@dataclass(slots=True)
class Count:
    """What became of the rows of one file."""

    created: int = 0
    updated: int = 0
    unchanged: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Report:
    """What an import did."""

    event_id: int
    name: str
    counts: dict[str, Count]
    notes: list[Note] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


def run(db: Session, conference: Conference, step: Callable[[], object]) -> Report:
    """Import *conference* in the transaction that is open on *db*; call *step* for every row of it.

    Raises ExportError for one that was deleted here, and for one whose identifier belongs to another.
    """
    return _Import(db, conference, step).run()


def rows(conference: Conference) -> int:
    """Return how many steps `run` takes."""
    parts = (conference.tracks, conference.microlocations, conference.speakers, conference.sessions)
    return 1 + sum(len(part) for part in parts)


_AS_ITS_OWN = "to import it as a conference of its own, name it: --as IDENTIFIER"


def _same(one: str, other: str) -> bool:
    return one.casefold().split() == other.casefold().split()


def _span(name: str, starts_at: datetime, ends_at: datetime) -> str:
    return f"{name!r} ({starts_at.date()} to {ends_at.date()})"


class _Import:
    def __init__(self, db: Session, conference: Conference, step: Callable[[], object]) -> None:
        self.db = db
        self.conference = conference
        self.step = step
        names = ("event", "tracks", "microlocations", "speakers", "sessions")
        self.counts = {name: Count(skipped=conference.skipped.get(f"{name}.json", 0)) for name in names}

    def run(self) -> Report:
        event, tracks = self._event_and_tracks()
        # What a session refers to is announced before it.
        rooms = self._parts(event, Microlocation, self.conference.microlocations, announce.microlocation)
        speakers = self._parts(event, Speaker, self.conference.speakers, announce.speaker)
        talks, gone = self._existing(event, Talk), self._gone(event, Talk)
        for row in self.conference.sessions:
            if row.external_id in gone:
                self._stays_deleted(Talk, row)
            else:
                self._session(event, row, talks.get(row.external_id), tracks, rooms, speakers)
        return Report(event.id, event.name, self.counts, self.conference.notes)

    def _event_and_tracks(self) -> tuple[Event, dict[str, Track]]:
        """Tracks are told with their event: one message for all of them."""
        row = self.conference.event
        event_id = self.db.scalar(sa.select(Event.id).where(Event.external_id == row.external_id))
        event = changes.lock(self.db, event_id) if event_id else None
        before = event.state if event else None
        if event is not None:
            self._refuse_another(event)
        elif self.db.get(Deleted, (Event.__tablename__, 0, row.external_id)):
            raise ExportError(
                f"{row.values['name']!r} ({row.external_id}) was deleted here, and an import brings nothing back; {_AS_ITS_OWN}"
            )
        if event is None:
            event = Event(external_id=row.external_id, **row.values)
            self.db.add(event)
            changed = True
        else:
            changed = changes.assign(event, row.values)
        self.db.flush()
        self._count("event", None if before and not changed else "updated" if before else "created")
        said: list[str] = []
        tracks = self._parts(event, Track, self.conference.tracks, lambda _, change: said.append(change))
        if changed or said:
            announce.event(self.db, event, changes.name_of_change(before, event.state))
        return event, tracks

    def _parts(
        self, event: Event, row_type: type[AnyPart], rows_: Iterable[Row], say: Callable[[AnyPart, str], object]
    ) -> dict[str, AnyPart]:
        """Make or change the rows of one file; return all of the event's imported ones by external id."""
        found, gone = self._existing(event, row_type), self._gone(event, row_type)
        for row in rows_:
            if row.external_id in gone:
                self._stays_deleted(row_type, row)
                continue
            part = found.get(row.external_id)
            change = None
            if part is None:
                part = found[row.external_id] = row_type(event_id=event.id, external_id=row.external_id, **row.values)
                self.db.add(part)
                change = "created"
            elif changes.assign(part, row.values):
                change = "updated"
            if change:
                self.db.flush()
                say(part, change)
            self._count(row_type.__tablename__, change)
        return found

    def _session(
        self,
        event: Event,
        row: SessionRow,
        talk: Talk | None,
        tracks: dict[str, Track],
        rooms: dict[str, Microlocation],
        speakers: dict[str, Speaker],
    ) -> None:
        values = row.values | {
            "track_id": tracks[row.track].id if row.track in tracks else None,
            "microlocation_id": rooms[row.microlocation].id if row.microlocation in rooms else None,
            "state": row.state,
        }
        speaker_ids = [speakers[external_id].id for external_id in row.speakers if external_id in speakers]
        if talk is None:
            talk = Talk(event_id=event.id, external_id=row.external_id, **values)
            changes.set_speakers(talk, speaker_ids)
            self.db.add(talk)
            self.db.flush()
            announce.session(talk, "created")
            self._count("sessions", "created")
            return
        before = talk.state
        changed = changes.assign(talk, values)
        changed |= changes.set_speakers(talk, speaker_ids)
        self._count("sessions", "updated" if changed else None)
        if changed:
            self.db.flush()
            if talk.state is before:
                announce.session(talk, "updated")
            else:
                announce.move(self.db, event, talk, before)

    def _existing(self, event: Event, row_type: type[AnyPart]) -> dict[str, AnyPart]:
        query = sa.select(row_type).where(row_type.event_id == event.id, row_type.external_id.is_not(None))
        parts = {str(part.external_id): part for part in self.db.scalars(query)}
        file = f"{row_type.__tablename__}.json"
        for external_id in sorted(parts.keys() & self.conference.deleted.get(file, set())):
            detail = "deleted there, kept here; to delete it here, too, use the API"
            self.conference.notes.append(Note(file, detail, external_id, f"here {parts[external_id].id}"))
        return parts

    # --- what is none of it

    def _gone(self, event: Event, row_type: type[Part]) -> set[str]:
        """The external ids of what was deleted here."""
        of_event = sa.and_(Deleted.kind == row_type.__tablename__, Deleted.event_id == event.id)
        return set(self.db.scalars(sa.select(Deleted.external_id).where(of_event)))

    def _stays_deleted(self, row_type: type[Part], row: Row) -> None:
        name = row_type.__tablename__
        self.conference.notes.append(Note(f"{name}.json", "skipped: deleted here", row.external_id))
        self._count(name, "skipped")

    def _refuse_another(self, event: Event) -> None:
        """Identifiers are not as unique as they look: real exports of five conferences have one."""
        told = self.conference.event
        if _same(told.values["name"], event.name):
            return
        moved = (told.values["starts_at"], told.values["ends_at"]) != (event.starts_at, event.ends_at)
        if moved or not self._shares_sessions(event):
            theirs = _span(told.values["name"], told.values["starts_at"], told.values["ends_at"])
            ours = _span(event.name, event.starts_at, event.ends_at)
            raise ExportError(
                f"the export is of {theirs}, but its identifier {told.external_id} is that of {ours}, event {event.id} here; "
                f"{_AS_ITS_OWN}; if it is the same, give event {event.id} its new name or dates first: "
                f"PATCH /v1/events/{event.id}"
            )

    def _shares_sessions(self, event: Event) -> bool:
        """Whether a session of the export is one of *event*, by id and title; also where there is none to compare."""
        query = sa.select(Talk.external_id, Talk.title).where(Talk.event_id == event.id, Talk.external_id.is_not(None))
        ours = {row.external_id: row.title for row in self.db.execute(query)}
        theirs = {row.external_id: row.values["title"] for row in self.conference.sessions}
        return not ours or not theirs or any(_same(theirs[id], ours[id]) for id in ours.keys() & theirs.keys())

    def _count(self, file: str, change: str | None) -> None:
        count = self.counts[file]
        name = change or "unchanged"
        setattr(count, name, getattr(count, name) + 1)
        self.step()
