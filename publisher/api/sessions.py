"""What only sessions have: states to move through, and speakers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Blueprint
from werkzeug.exceptions import NotFound

from publisher.api import answers, requests
from publisher.api.parts import locked, not_found
from publisher.conference import changes
from publisher.conference.describe import describe
from publisher.conference.kinds import MOVE, SESSION, SPEAKER
from publisher.conference.models import Speaker, Talk
from publisher.database import changing

if TYPE_CHECKING:
    from flask import Response

views = Blueprint("session_states", __name__, url_prefix="/v1/sessions/<id:session_id>")


@views.post("/state")
def move(session_id: int) -> Response:
    """Move a session to another state."""
    state = MOVE.check(requests.body())["state"]
    with changing() as db:
        event, talk = locked(db, Talk, SESSION, session_id)
        changes.move(db, event, talk, state)
    return answers.thing(describe(talk))


@views.put("/speakers/<id:speaker_id>")
def add_speaker(session_id: int, speaker_id: int) -> Response:
    """Put a speaker last among those of a session; doing so again changes nothing."""
    with changing() as db:
        _, talk = locked(db, Talk, SESSION, session_id)
        speaker = db.get(Speaker, speaker_id)
        if speaker is None:
            raise not_found(SPEAKER, speaker_id)
        changes.add_speaker(db, talk, speaker)
    return answers.done()


@views.delete("/speakers/<id:speaker_id>")
def remove_speaker(session_id: int, speaker_id: int) -> Response:
    """Take a speaker off a session."""
    with changing() as db:
        _, talk = locked(db, Talk, SESSION, session_id)
        if not changes.remove_speaker(db, talk, speaker_id):
            raise NotFound(f"session {session_id} has no speaker {speaker_id}")
    return answers.done()
