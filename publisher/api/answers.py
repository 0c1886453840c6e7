"""What goes out: things, pages of things, and where to find them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from flask import Response, jsonify, request

from publisher.conference import announce
from publisher.conference.describe import describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from publisher.api.requests import Page
    from publisher.conference.models import Event, Part

#: Deleting a room can change hundreds of sessions; proxies refuse long headers.
MAX_LINKS = 20


def thing(state: dict[str, Any]) -> Response:
    """Return 200 with *state*."""
    return jsonify(state)


def made(state: dict[str, Any], path: str) -> Response:
    """Return 201 with *state* and its place."""
    answer = jsonify(state)
    answer.status_code = 201
    answer.headers["Location"] = path
    return answer


def done() -> Response:
    """Return 204."""
    answer = Response(status=204)
    del answer.headers["Content-Type"]
    return answer


def collection(found: Sequence[Event | Part], page: Page) -> Response:
    """Return one page of *found*, which holds one row more than asked for where there is a next page."""
    rows = found[: page.limit]
    following = None
    if len(found) > page.limit:
        parameters = {**request.args.to_dict(), "limit": page.limit, "cursor": f"after-{rows[-1].id}"}
        following = f"{request.path}?{urlencode(parameters)}"
    answer = jsonify({"items": [describe(row) for row in rows], "next": following})
    if following:
        answer.headers["Link"] = f'<{following}>; rel="next"'
    return answer


def link_messages(answer: Response) -> Response:
    """Say where to ask what became of the messages that a change sent: a `Link` header for each of the first few."""
    if answer.status_code < 300:
        for message_id in announce.message_ids()[:MAX_LINKS]:
            answer.headers.add("Link", f'</v1/messages/{message_id}>; rel="status"')
    return answer
