"""From a change of state to letters: the handler keeps them, a background worker hands them in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from consumers.notifications import model
from consumers.notifications.letters import letters
from consumers.notifications.mail import MailServer
from consumers.notifications.sender import Sender, now_utc
from outbox.consumer import Reject, Service

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.orm import Session

    from outbox.message import Received

service = Service("notifications", tables=model.Base.metadata)
_sender = Sender()


@service.at_start
def check_settings() -> None:
    """A wrong setting ends the service before it takes a message, not letter by letter."""
    MailServer.of(os.environ)


@service.on("session.state_changed")
def write_to_speakers(
    message: Received, db_session: Session, /, *, change: str, event_name: Any, session: Any, speakers: Any, **extra: Any
) -> None:
    """Tell the speakers of a session that it was accepted, rejected or cancelled."""
    if not isinstance(session, dict) or not isinstance(speakers, list) or not all(map(_is_speaker, speakers)):
        raise Reject("session is no object, or speakers is no list of objects with a whole number as id")
    due = letters(change, event_name, session.get("title"), speakers)
    model.add(db_session, message.source, message.id, message.created_at, due, now_utc())


def _is_speaker(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("id")) is int and abs(value["id"]) < 2**63


@service.background
def hand_in_letters(engine: Engine) -> bool:
    """Hand in the letters that are due."""
    return _sender.work(engine, MailServer.of(os.environ))
