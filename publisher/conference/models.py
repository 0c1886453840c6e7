"""The tables of a conference. An *event* is the conference, a *talk* is what Open Event calls a session.

Rows of an event are changed by one transaction at a time: whoever writes locks the event first (`changes.locked`). That is what
makes the state in a message the state after its commit.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from publisher.conference.columns import Moment, Number
from publisher.conference.states import EventState, TalkState

# An id names one thing for ever: services remember the ids of what was deleted.
_NEVER_REUSED = {"sqlite_autoincrement": True}


def _words(states: type[StrEnum]) -> sa.Enum:
    return sa.Enum(states, native_enum=False, length=20, values_callable=lambda enum: [state.value for state in enum])


class Base(DeclarativeBase):
    """All tables of the publisher; the outbox's are the outbox's own business."""

    type_annotation_map: ClassVar = {
        str: sa.Text,
        float: sa.Double,
        datetime: Moment,
        EventState: _words(EventState),
        TalkState: _words(TalkState),
    }


class Event(Base):
    """A conference."""

    __tablename__ = "events"
    __table_args__ = _NEVER_REUSED

    #: The publisher's own number.
    id: Mapped[int] = mapped_column(Number, primary_key=True)
    #: `identifier` (else `id`) in the export it came from: what makes importing again find it.
    external_id: Mapped[str | None] = mapped_column(sa.String(255), unique=True)
    name: Mapped[str]
    description: Mapped[str | None]
    starts_at: Mapped[datetime]
    ends_at: Mapped[datetime]
    timezone: Mapped[str]
    location_name: Mapped[str | None]
    latitude: Mapped[float | None]
    longitude: Mapped[float | None]
    url: Mapped[str | None]
    ticket_url: Mapped[str | None]
    logo_url: Mapped[str | None]
    image_url: Mapped[str | None]
    organizer_name: Mapped[str | None]
    organizer_description: Mapped[str | None]
    email: Mapped[str | None]
    type: Mapped[str | None]
    topic: Mapped[str | None]
    sub_topic: Mapped[str | None]
    code_of_conduct: Mapped[str | None]
    state: Mapped[EventState]


class Part(Base):
    """What belongs to an event and goes with it: tracks, rooms, speakers, sessions."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(Number, primary_key=True)
    event_id: Mapped[int] = mapped_column(Number, sa.ForeignKey("events.id"))
    #: The id in the export it came from, unique within the event only.
    external_id: Mapped[str | None] = mapped_column(sa.String(255))


def _table_args(name: str) -> tuple[Any, ...]:
    return (
        sa.UniqueConstraint("event_id", "external_id", name=f"{name}_external_id"),
        # Pages of an event's rows are read in the order of their ids.
        sa.Index(f"{name}_event", "event_id", "id"),
        _NEVER_REUSED,
    )


class Track(Part):
    """A subject that sessions share."""

    __tablename__ = "tracks"
    __table_args__ = _table_args("tracks")

    name: Mapped[str]
    description: Mapped[str | None]
    color: Mapped[str]
    font_color: Mapped[str | None]


class Microlocation(Part):
    """A room."""

    __tablename__ = "microlocations"
    __table_args__ = _table_args("microlocations")

    name: Mapped[str]
    floor: Mapped[int | None]
    room: Mapped[str | None]
    latitude: Mapped[float | None]
    longitude: Mapped[float | None]


class Speaker(Part):
    """A person on the programme of one event."""

    __tablename__ = "speakers"
    __table_args__ = _table_args("speakers")

    name: Mapped[str]
    email: Mapped[str | None]
    short_biography: Mapped[str | None]
    long_biography: Mapped[str | None]
    speaking_experience: Mapped[str | None]
    organisation: Mapped[str | None]
    position: Mapped[str | None]
    city: Mapped[str | None]
    country: Mapped[str | None]
    gender: Mapped[str | None]
    website: Mapped[str | None]
    twitter: Mapped[str | None]
    facebook: Mapped[str | None]
    github: Mapped[str | None]
    linkedin: Mapped[str | None]
    photo_url: Mapped[str | None]
    is_featured: Mapped[bool]


class Talk(Part):
    """A session."""

    __tablename__ = "sessions"
    __table_args__ = (
        sa.CheckConstraint("(starts_at IS NULL) = (ends_at IS NULL)", name="sessions_times"),
        *_table_args("sessions"),
    )

    title: Mapped[str]
    subtitle: Mapped[str | None]
    short_abstract: Mapped[str | None]
    long_abstract: Mapped[str | None]
    comments: Mapped[str | None]
    language: Mapped[str | None]
    level: Mapped[str | None]
    session_type: Mapped[str | None]
    track_id: Mapped[int | None] = mapped_column(Number, sa.ForeignKey("tracks.id"), index=True)
    microlocation_id: Mapped[int | None] = mapped_column(Number, sa.ForeignKey("microlocations.id"), index=True)
    starts_at: Mapped[datetime | None]
    ends_at: Mapped[datetime | None]
    state: Mapped[TalkState]
    slides_url: Mapped[str | None]
    video_url: Mapped[str | None]
    audio_url: Mapped[str | None]
    signup_url: Mapped[str | None]

    links: Mapped[list[TalkSpeaker]] = relationship(order_by="TalkSpeaker.place", cascade="all, delete-orphan", lazy="selectin")

    @property
    def speaker_ids(self) -> list[int]:
        """The speakers, in the order in which they were added."""
        return [link.speaker_id for link in self.links]


class TalkSpeaker(Base):
    """Who speaks in a session, and at which place among its names."""

    __tablename__ = "session_speakers"

    session_id: Mapped[int] = mapped_column(Number, sa.ForeignKey("sessions.id"), primary_key=True)
    speaker_id: Mapped[int] = mapped_column(Number, sa.ForeignKey("speakers.id"), primary_key=True, index=True)
    place: Mapped[int]


class Deleted(Base):
    """Something imported that was deleted here: importing its export again must not bring it back."""

    __tablename__ = "deleted_imports"

    #: The table it was in.
    kind: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    #: The event it belonged to; 0 for an event.
    event_id: Mapped[int] = mapped_column(Number, primary_key=True, autoincrement=False)
    external_id: Mapped[str] = mapped_column(sa.String(255), primary_key=True)
