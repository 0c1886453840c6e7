"""What is said about a change, in the way of 2017: a signal, sent by the application, before the commit.

The rows must have been flushed: their ids go into the message and into its key.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING
from uuid import UUID

import sqlalchemy as sa
from flask import current_app, g

from publisher import signals
from publisher.conference.describe import describe
from publisher.conference.models import Event, Microlocation, Speaker, Talk, Track

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from publisher.conference.states import TalkState


def event(db: Session, conference: Event, change: str) -> None:
    """Say that *conference*, or one of its tracks, changed."""
    tracks = db.scalars(sa.select(Track).where(Track.event_id == conference.id).order_by(Track.id))
    _remember(
        signals.event_json_modified.send(
            current_app._get_current_object(),  # type: ignore[attr-defined]
            event_id=conference.id,
            change=change,
            event=describe(conference),
            tracks=[describe(track) for track in tracks],
        )
    )


def session(talk: Talk, change: str) -> None:
    """Say that *talk* or its speakers changed."""
    _remember(
        signals.sessions_modified.send(
            current_app._get_current_object(),  # type: ignore[attr-defined]
            event_id=talk.event_id,
            session_id=talk.id,
            change=change,
            session=describe(talk),
        )
    )


def move(db: Session, conference: Event, talk: Talk, previous: TalkState) -> None:
    """Say that *talk* came from *previous* to the state it has: as a change of the session, and as a move."""
    session(talk, talk.state)
    people = {person.id: person for person in db.scalars(sa.select(Speaker).where(Speaker.id.in_(talk.speaker_ids)))}
    _remember(
        signals.session_state_changed.send(
            current_app._get_current_object(),  # type: ignore[attr-defined]
            event_id=talk.event_id,
            session_id=talk.id,
            change=talk.state,
            previous=previous,
            event_name=conference.name,
            session=describe(talk),
            speakers=[
                {"id": person.id, "name": person.name, "email": person.email}
                for person in (people[speaker_id] for speaker_id in talk.speaker_ids)
            ],
        )
    )


def speaker(person: Speaker, change: str) -> None:
    """Say that *person* changed."""
    _remember(
        signals.speakers_modified.send(
            current_app._get_current_object(),  # type: ignore[attr-defined]
            event_id=person.event_id,
            speaker_id=person.id,
            change=change,
            speaker=describe(person),
        )
    )


def microlocation(room: Microlocation, change: str) -> None:
    """Say that *room* changed."""
    _remember(
        signals.microlocations_modified.send(
            current_app._get_current_object(),  # type: ignore[attr-defined]
            event_id=room.event_id,
            microlocation_id=room.id,
            change=change,
            microlocation=describe(room),
        )
    )


def message_ids() -> list[UUID]:
    """Return the ids of the messages that were sent in this request or command; they exist once it has committed."""
    ids: list[UUID] = g.setdefault("message_ids", [])
    return ids


def _remember(results: Iterable[tuple[object, object]]) -> None:
    """Keep the ids that captures returned among a signal's results."""
    message_ids().extend(value for _, value in results if isinstance(value, UUID))
