"""Every change of a conference: checked, flushed and announced inside the caller's transaction, which the caller commits.

Each function works on rows that `lock` or `lock_part` returned, and raises before it says anything; after an exception the
transaction can only be rolled back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa

from publisher.conference import announce
from publisher.conference.errors import Fault, IllegalMove, Invalid
from publisher.conference.models import Deleted, Event, Microlocation, Part, Speaker, Talk, TalkSpeaker, Track
from publisher.conference.states import MOVES, EventState, TalkState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sqlalchemy.orm import Session

#: Every message about an event carries all of its tracks, and every one about a session all of its speakers' ids.
MAX_TRACKS = 100
MAX_SPEAKERS_OF_A_SESSION = 50

AnyPart = TypeVar("AnyPart", bound=Part)


# --- locking ------------------------------------------------------------------------------------------------------------


def lock(db: Session, event_id: int) -> Event | None:
    """Return the event as it is now, and keep other writers out of it until the transaction ends.

    A message holds a whole object. Two writers who each saw the object before the other's change would announce two states of
    which neither is the last; with the lock, the order of the messages is the order of the states.
    """
    query = sa.select(Event).where(Event.id == event_id).with_for_update(key_share=True)
    return db.scalar(query.execution_options(populate_existing=True))


def lock_part(db: Session, row: type[AnyPart], part_id: int) -> tuple[Event, AnyPart] | None:
    """Return what belongs to an event, with its event, which is locked like in `lock`."""
    event_id = db.scalar(sa.select(row.event_id).where(row.id == part_id))
    event = lock(db, event_id) if event_id is not None else None
    part = db.scalar(sa.select(row).where(row.id == part_id).execution_options(populate_existing=True)) if event else None
    return (event, part) if event and part else None


# --- events -------------------------------------------------------------------------------------------------------------


def create_event(db: Session, values: Mapping[str, Any]) -> Event:
    """Make an event."""
    event = Event(**values)
    check_event(event)
    db.add(event)
    db.flush()
    announce.event(db, event, "created")
    return event


def update_event(db: Session, event: Event, values: Mapping[str, Any]) -> None:
    """Give *event* these values; where nothing differs, nothing is said."""
    before = event.state
    if not assign(event, values):
        return
    check_event(event)
    db.flush()
    announce.event(db, event, name_of_change(before, event.state))


def name_of_change(before: EventState | None, after: EventState) -> str:
    """Return what to call a change of an event that had the state *before*, None where it is new."""
    if before is None:
        return "created"
    if before is after:
        return "updated"
    return "published" if after is EventState.PUBLISHED else "unpublished"


def delete_event(db: Session, event: Event) -> None:
    """Delete *event* and everything of it, and say so in one message."""
    announce.event(db, event, "deleted")
    talks = sa.select(Talk.id).where(Talk.event_id == event.id)
    db.execute(sa.delete(TalkSpeaker).where(TalkSpeaker.session_id.in_(talks)))
    for row in (Talk, Speaker, Microlocation, Track, Deleted):
        db.execute(sa.delete(row).where(row.event_id == event.id))
    _remember(db, event, event_id=0)
    db.execute(sa.delete(Event).where(Event.id == event.id))


def check_event(event: Event) -> None:
    """Raise Invalid unless the values of *event* fit together."""
    if event.ends_at < event.starts_at:
        raise Invalid([Fault("/ends_at", "must not be before starts_at")])


# --- what belongs to an event -------------------------------------------------------------------------------------------


def create(db: Session, event: Event, row: type[AnyPart], values: Mapping[str, Any]) -> AnyPart:
    """Make a track, a room, a speaker or a session of *event*."""
    part = row(event_id=event.id, **values)
    check_part(db, part)
    if isinstance(part, Track) and _count(db, Track, Track.event_id == event.id) >= MAX_TRACKS:
        raise Invalid([Fault("", f"an event has at most {MAX_TRACKS} tracks")])
    db.add(part)
    db.flush()
    say(db, event, part, "created")
    return part


def update(db: Session, event: Event, part: Part, values: Mapping[str, Any]) -> None:
    """Give *part* these values; where nothing differs, nothing is said."""
    if assign(part, values):
        check_part(db, part)
        db.flush()
        say(db, event, part, "updated")


def delete(db: Session, event: Event, part: Part) -> None:
    """Delete *part*. Sessions that named it no longer do, and say so first."""
    for talk in _talks_that_name(db, part):
        if isinstance(part, Speaker):
            talk.links = [link for link in talk.links if link.speaker_id != part.id]
        else:
            setattr(talk, "track_id" if isinstance(part, Track) else "microlocation_id", None)
        db.flush()
        announce.session(talk, "updated")
    if not isinstance(part, Track):
        say(db, event, part, "deleted")
    _remember(db, part, event_id=event.id)
    db.delete(part)
    db.flush()
    if isinstance(part, Track):  # told by the list of those that remain
        say(db, event, part, "updated")


def _remember(db: Session, thing: Event | Part, event_id: int) -> None:
    """Note that something imported was deleted."""
    if thing.external_id is not None:
        db.merge(Deleted(kind=thing.__tablename__, event_id=event_id, external_id=thing.external_id))


def say(db: Session, event: Event, part: Part, change: str) -> None:
    """Announce a change of *part*. Tracks are the event's core."""
    if isinstance(part, Track):
        announce.event(db, event, "updated")
    elif isinstance(part, Microlocation):
        announce.microlocation(part, change)
    elif isinstance(part, Speaker):
        announce.speaker(part, change)
    elif isinstance(part, Talk):
        announce.session(part, change)


def check_part(db: Session, part: Part) -> None:
    """Raise Invalid, with every fault, unless the values of *part* fit together and name rows of its event."""
    if not isinstance(part, Talk):
        return
    faults = []
    if (part.starts_at is None) != (part.ends_at is None):
        faults.append(Fault("/ends_at" if part.ends_at is None else "/starts_at", "both times must be set, or neither"))
    elif part.starts_at and part.ends_at and part.ends_at <= part.starts_at:
        faults.append(Fault("/ends_at", "must be after starts_at"))
    for name, row, number in (("track", Track, part.track_id), ("microlocation", Microlocation, part.microlocation_id)):
        if number is not None:
            with db.no_autoflush:
                known = _count(db, row, row.id == number, row.event_id == part.event_id)
            if not known:
                faults.append(Fault(f"/{name}_id", f"event {part.event_id} has no {name} {number}"))
    if faults:
        raise Invalid(faults)


# --- sessions -----------------------------------------------------------------------------------------------------------


def move(db: Session, event: Event, talk: Talk, state: TalkState) -> None:
    """Take *talk* to *state*; raise IllegalMove, with the states it may go to, where that is no move."""
    previous, allowed = talk.state, MOVES[talk.state]
    if state not in allowed:
        raise IllegalMove(previous, state, allowed)
    talk.state = state
    db.flush()
    announce.move(db, event, talk, previous)


def add_speaker(db: Session, talk: Talk, speaker: Speaker) -> bool:
    """Put *speaker* last among those of *talk*; return whether that was new."""
    if speaker.event_id != talk.event_id:
        raise Invalid([Fault("", f"speaker {speaker.id} belongs to event {speaker.event_id}, the session to {talk.event_id}")])
    if speaker.id in talk.speaker_ids:
        return False
    if len(talk.links) >= MAX_SPEAKERS_OF_A_SESSION:
        raise Invalid([Fault("", f"a session has at most {MAX_SPEAKERS_OF_A_SESSION} speakers")])
    place = talk.links[-1].place + 1 if talk.links else 1
    talk.links.append(TalkSpeaker(speaker_id=speaker.id, place=place))
    db.flush()
    announce.session(talk, "updated")
    return True


def remove_speaker(db: Session, talk: Talk, speaker_id: int) -> bool:
    """Take the speaker off *talk*; return whether they were on it."""
    if speaker_id not in talk.speaker_ids:
        return False
    talk.links = [link for link in talk.links if link.speaker_id != speaker_id]
    db.flush()
    announce.session(talk, "updated")
    return True


def set_speakers(talk: Talk, speaker_ids: Sequence[int]) -> bool:
    """Let exactly these, in this order, be the speakers of *talk*; return whether that is a change. Announces nothing."""
    if talk.speaker_ids == list(speaker_ids):
        return False
    kept = {link.speaker_id: link for link in talk.links}
    talk.links = [kept.get(speaker_id) or TalkSpeaker(speaker_id=speaker_id) for speaker_id in speaker_ids]
    for place, link in enumerate(talk.links, start=1):
        link.place = place
    return True


# --- helpers ------------------------------------------------------------------------------------------------------------


def assign(row: Event | Part, values: Mapping[str, Any]) -> bool:
    """Set what differs from *values*; return whether anything did."""
    different = {name: value for name, value in values.items() if getattr(row, name) != value}
    for name, value in different.items():
        setattr(row, name, value)
    return bool(different)


def _count(db: Session, row: type[Part], *conditions: sa.ColumnElement[bool]) -> int:
    return db.scalar(sa.select(sa.func.count()).select_from(row).where(*conditions)) or 0


def _talks_that_name(db: Session, part: Part) -> Iterable[Talk]:
    query = sa.select(Talk).where(Talk.event_id == part.event_id).order_by(Talk.id)
    if isinstance(part, Track):
        return db.scalars(query.where(Talk.track_id == part.id)).all()
    if isinstance(part, Microlocation):
        return db.scalars(query.where(Talk.microlocation_id == part.id)).all()
    if isinstance(part, Speaker):
        linked = sa.select(TalkSpeaker.session_id).where(TalkSpeaker.speaker_id == part.id)
        return db.scalars(query.where(Talk.id.in_(linked))).all()
    return ()
