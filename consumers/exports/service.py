"""From messages to files: handlers keep what is said, a background worker writes what is behind."""

from __future__ import annotations

import os
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consumers.exports import model
from consumers.exports.files import DEFAULT_FOLDER, FOLDER, Writer, folder_of
from outbox.consumer import Reject, Service

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.message import Received

service = Service("exports", tables=model.Base.metadata)
_writer = Writer()


@service.at_start
def check_settings() -> None:
    """A folder that can't be written ends the service at its start, before it takes a message."""
    folder_of(os.environ)


@service.on("event.modified")
def keep_event(
    message: Received, db_session: Session, /, *, event_id: Any, change: str, event: Any, tracks: list[Any], **extra: Any
) -> None:
    """Keep the core of a conference; tracks are part of it."""
    deleted = change == "deleted"
    document = None if deleted else {"event": event, "tracks": tracks}
    _keep(message, db_session, "event", event_id, event_id, document)
    if deleted:
        model.forget_event(db_session, event_id)


@service.on("session.modified")
def keep_session(
    message: Received, db_session: Session, /, *, event_id: Any, session_id: Any, change: str, session: Any, **extra: Any
) -> None:
    """Keep a session (a talk)."""
    _keep(message, db_session, "session", session_id, event_id, None if change == "deleted" else session)


@service.on("speaker.modified")
def keep_speaker(
    message: Received, db_session: Session, /, *, event_id: Any, speaker_id: Any, change: str, speaker: Any, **extra: Any
) -> None:
    """Keep a speaker."""
    _keep(message, db_session, "speaker", speaker_id, event_id, None if change == "deleted" else speaker)


@service.on("microlocation.modified")
def keep_microlocation(
    message: Received,
    db_session: Session,
    /,
    *,
    event_id: Any,
    microlocation_id: Any,
    change: str,
    microlocation: Any,
    **extra: Any,
) -> None:
    """Keep a room."""
    _keep(message, db_session, "microlocation", microlocation_id, event_id, None if change == "deleted" else microlocation)


def _keep(message: Received, db_session: Session, kind: str, id: Any, event_id: Any, document: Any) -> None:
    for name, value in (("event_id", event_id), (f"{kind}_id", id)):
        if not model.is_id(value):  # whoever may publish chooses it, and a folder is called after it
            raise Reject(f"{name} is no whole number from 1 to {model.LARGEST_ID} but {reprlib.repr(value)}")
    # In order, the sequence has decided what is newer; the clocks of two publishers need not agree with it.
    told = model.keep_newest if message.late else model.keep
    told(db_session, kind, id, event_id, message.created_at, document)


@service.background
def write_files(engine: Engine) -> bool:
    """Write the files of one event that are behind: a burst of messages costs one writing, not one each."""
    return _writer.write_one(engine, Path(os.environ.get(FOLDER) or DEFAULT_FOLDER))
