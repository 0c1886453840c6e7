"""`/v1/events`: conferences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from flask import Blueprint
from werkzeug.exceptions import NotFound

from publisher.api import answers, requests
from publisher.conference import changes
from publisher.conference.describe import describe
from publisher.conference.kinds import EVENT
from publisher.conference.models import Event
from publisher.database import changing, reading

if TYPE_CHECKING:
    from flask import Response

views = Blueprint("events", __name__, url_prefix="/v1/events")


@views.get("")
@requests.takes("limit", "cursor")
def index() -> Response:
    """List events."""
    page = requests.page()
    with reading() as db:
        found = db.scalars(sa.select(Event).where(Event.id > page.after).order_by(Event.id).limit(page.limit + 1)).all()
        return answers.collection(found, page)


@views.post("")
def create() -> Response:
    """Create an event."""
    values = EVENT.check(requests.body())
    with changing() as db:
        event = changes.create_event(db, values)
    return answers.made(describe(event), f"/v1/events/{event.id}")


@views.get("/<id:event_id>")
def show(event_id: int) -> Response:
    """Show an event."""
    with reading() as db:
        event = db.get(Event, event_id)
        if event is None:
            raise not_found(event_id)
        return answers.thing(describe(event))


@views.patch("/<id:event_id>")
def change(event_id: int) -> Response:
    """Change an event; publish it by setting its state."""
    values = EVENT.check(requests.body(), partial=True)
    with changing() as db:
        event = changes.lock(db, event_id)
        if event is None:
            raise not_found(event_id)
        changes.update_event(db, event, values)
    return answers.thing(describe(event))


@views.delete("/<id:event_id>")
def delete(event_id: int) -> Response:
    """Delete an event with everything that belongs to it."""
    with changing() as db:
        event = changes.lock(db, event_id)
        if event is None:
            raise not_found(event_id)
        changes.delete_event(db, event)
    return answers.done()


def not_found(event_id: int) -> NotFound:
    """Return the answer where there is no such event."""
    return NotFound(f"there is no event {event_id}")
