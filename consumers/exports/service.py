"""From messages to files: handlers keep what is said, a background worker writes what is behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consumers.exports import model
from consumers.exports.files import DEFAULT_FOLDER, FOLDER, write_one
from outbox.consumer import Service

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.message import Received

service = Service("exports", tables=model.Base.metadata)


@service.on("event.modified")
def keep_event(
    message: Received, db_session: Session, /, *, event_id: int, change: str, event: Any, tracks: list[Any], **extra: Any
) -> None:
    """Keep the core of a conference; tracks are part of it."""
    deleted = change == "deleted"
    document = None if deleted else {"event": event, "tracks": tracks}
    model.keep(db_session, "event", event_id, event_id, message.created_at, document)
    if deleted:
        model.forget_event(db_session, event_id)


@service.on("session.modified")
def keep_session(
    message: Received, db_session: Session, /, *, event_id: int, session_id: int, change: str, session: Any, **extra: Any
) -> None:
    """Keep a session (a talk)."""
    document = None if change == "deleted" else session
    model.keep(db_session, "session", session_id, event_id, message.created_at, document)


@service.on("speaker.modified")
def keep_speaker(
    message: Received, db_session: Session, /, *, event_id: int, speaker_id: int, change: str, speaker: Any, **extra: Any
) -> None:
    """Keep a speaker."""
    document = None if change == "deleted" else speaker
    model.keep(db_session, "speaker", speaker_id, event_id, message.created_at, document)


@service.on("microlocation.modified")
def keep_microlocation(
    message: Received,
    db_session: Session,
    /,
    *,
    event_id: int,
    microlocation_id: int,
    change: str,
    microlocation: Any,
    **extra: Any,
) -> None:
    """Keep a room."""
    document = None if change == "deleted" else microlocation
    model.keep(db_session, "microlocation", microlocation_id, event_id, message.created_at, document)


@service.background
def write_files(engine: Engine) -> bool:
    """Write the files of one event that are behind: a burst of messages costs one writing, not one each."""
    return write_one(engine, Path(os.environ.get(FOLDER, DEFAULT_FOLDER)))
