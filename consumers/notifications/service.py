"""From a change of state to letters."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from consumers.notifications.letters import letters
from consumers.notifications.mail import DEFAULT_SENDER, SENDER, MailServer
from outbox.consumer import Service

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from outbox.message import Received

# batch=1: mail can't be rolled back. In a batch that fails, letters of its other messages would be sent twice.
service = Service("notifications", batch=1)


@service.on("session.state_changed")
def write_to_speakers(
    message: Received,
    db_session: Session,
    /,
    *,
    change: str,
    event_name: str,
    session: dict[str, Any],
    speakers: list[dict[str, Any]],
    **extra: Any,
) -> None:
    """Tell the speakers of a session that it was accepted, rejected or cancelled."""
    server = MailServer.of(os.environ)
    server.send(
        letters(
            message.id,
            message.created_at,
            os.environ.get(SENDER, DEFAULT_SENDER),
            change=change,
            event_name=event_name,
            title=session["title"],
            speakers=speakers,
        )
    )
