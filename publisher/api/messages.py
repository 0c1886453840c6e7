"""`/v1/messages/{id}`: what became of a message that a change sent. Its content is not shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint, jsonify
from werkzeug.exceptions import NotFound

from outbox import OutboxError
from outbox.store import operating
from publisher.conference.describe import moment_text
from publisher.database import reading

if TYPE_CHECKING:
    from uuid import UUID

    from flask import Response

views = Blueprint("messages", __name__, url_prefix="/v1/messages")


@views.get("/<uuid:message_id>")
def show(message_id: UUID) -> Response:
    """Show where a message stands."""
    with reading() as db:
        try:
            found = operating.detail(db.connection(), message_id)
        except OutboxError as error:
            raise NotFound(f"there is no message {message_id}; published ones are kept for OUTBOX_RETENTION") from error
    entry = found.entry
    return jsonify(
        {
            "id": str(entry.id),
            "topic": entry.topic,
            "key": entry.key,
            "sequence": entry.sequence,
            "state": entry.state,
            "attempts": entry.attempts,
            "last_error": entry.last_error,
            "created_at": moment_text(entry.created_at),
            "published_at": moment_text(found.publications[-1].at) if found.publications else None,
            "held_by": str(found.held_by.id) if found.held_by else None,
        }
    )
