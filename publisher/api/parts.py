"""What belongs to an event: tracks, rooms, speakers and sessions are listed, made, shown, changed and deleted alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from flask import Blueprint, request
from werkzeug.exceptions import NotFound

from publisher.api import answers, events, problems, requests
from publisher.conference import changes
from publisher.conference.describe import describe
from publisher.conference.models import Event, Talk
from publisher.conference.states import TalkState
from publisher.database import changing, reading

if TYPE_CHECKING:
    from flask import Response
    from sqlalchemy.orm import Session

    from publisher.conference.changes import AnyPart
    from publisher.conference.kinds import Kind
    from publisher.conference.models import Part


def views(row: type[Part], kind: Kind) -> Blueprint:
    """Return the routes of one *kind* of part, whose table is *row*."""
    blueprint = Blueprint(kind.plural, __name__, url_prefix="/v1")
    collection, item = f"/events/<id:event_id>/{kind.plural}", f"/{kind.plural}/<id:part_id>"

    @blueprint.get(collection)
    @requests.takes("limit", "cursor", *(("state",) if row is Talk else ()))
    def index(event_id: int) -> Response:
        page = requests.page()
        query = sa.select(row).where(row.event_id == event_id, row.id > page.after).order_by(row.id).limit(page.limit + 1)
        if "state" in request.args:
            query = query.where(Talk.state == _state(request.args["state"]))
        with reading() as db:
            if db.get(Event, event_id) is None:
                raise events.not_found(event_id)
            return answers.collection(db.scalars(query).all(), page)

    @blueprint.post(collection)
    def create(event_id: int) -> Response:
        values = kind.check(requests.body())
        with changing() as db:
            event = changes.lock(db, event_id)
            if event is None:
                raise events.not_found(event_id)
            part = changes.create(db, event, row, values)
        return answers.made(describe(part), f"/v1/{kind.plural}/{part.id}")

    @blueprint.get(item)
    def show(part_id: int) -> Response:
        with reading() as db:
            part = db.get(row, part_id)
            if part is None:
                raise not_found(kind, part_id)
            return answers.thing(describe(part))

    @blueprint.patch(item)
    def change(part_id: int) -> Response:
        values = kind.check(requests.body(), partial=True)
        with changing() as db:
            event, part = locked(db, row, kind, part_id)
            changes.update(db, event, part, values)
        return answers.thing(describe(part))

    @blueprint.delete(item)
    def delete(part_id: int) -> Response:
        with changing() as db:
            event, part = locked(db, row, kind, part_id)
            changes.delete(db, event, part)
        return answers.done()

    return blueprint


def locked(db: Session, row: type[AnyPart], kind: Kind, part_id: int) -> tuple[Event, AnyPart]:
    """Return the part and its event, locked for a change. Raises 404."""
    found = changes.lock_part(db, row, part_id)
    if found is None:
        raise not_found(kind, part_id)
    return found


def not_found(kind: Kind, part_id: int) -> NotFound:
    """Return the answer where there is no such part."""
    return NotFound(f"there is no {kind.name} {part_id}")


def _state(word: str) -> TalkState:
    try:
        return TalkState(word)
    except ValueError as error:
        raise problems.malformed(f"state={word[:20]} must be one of {', '.join(TalkState)}") from error
