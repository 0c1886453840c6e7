"""The conference over HTTP: JSON in, JSON out, every error an `application/problem+json`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from publisher.api import answers, docs, events, health, messages, parts, problems, requests, sessions
from publisher.conference.kinds import PARTS

if TYPE_CHECKING:
    from flask import Flask


def init_app(app: Flask) -> None:
    """Give *app* all routes of the API and the form of its errors."""
    requests.init_app(app)
    problems.init_app(app)
    app.after_request(answers.link_messages)
    app.register_blueprint(events.views)
    for row, kind in PARTS.items():
        app.register_blueprint(parts.views(row, kind))
    for views in (sessions.views, messages.views, health.views, docs.views):
        app.register_blueprint(views)
