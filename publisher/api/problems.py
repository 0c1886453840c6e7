"""Errors as RFC 9457 problem details: one form for all of them, no stack trace in any."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from flask import Response, current_app
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException

from outbox import InvalidMessage, SchemaError
from outbox.database import Meaning, meaning
from outbox.process.logs import say
from publisher import database, migrations
from publisher.conference.errors import Fault, IllegalMove, Invalid

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"

#: The kinds of problem that are this API's own: slug → (title, what to do). `/docs#<slug>` explains each.
KINDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "malformed": ("The request can't be read", "The body is no JSON object, or a parameter is unknown or wrong."),
        "invalid": ("Some fields can't be accepted", "`errors` names each by its JSON pointer, with the reason."),
        "illegal-move": ("The session can't go to that state", "`allowed` holds the states it may go to from `state`."),
        "too-large": ("The change is too large for a message", "Shorten the texts: a change that can't be told isn't made."),
        "no-metrics": ("This process keeps no metrics", "Install prometheus-client."),
        "unavailable": ("The database can't be used now", "Nothing was changed; try again later."),
    }
)


class Problem(Exception):
    """A refusal of this API; *kind* is one of KINDS, *extra* are further members of the answer."""

    def __init__(self, status: int, kind: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.extra = extra


def malformed(detail: str) -> Problem:
    """Return the problem of a request that can't be read."""
    return Problem(400, "malformed", detail)


def invalid(faults: tuple[Fault, ...]) -> Problem:
    """Return the problem of fields that can't be accepted."""
    errors = [{"pointer": fault.pointer, "detail": fault.detail} for fault in faults]
    named = ", ".join(fault.pointer or "the whole" for fault in faults[:5])
    return Problem(422, "invalid", f"{len(faults)} problem(s): {named}", errors=errors)


def init_app(app: Flask) -> None:
    """Let every error of *app* be answered as a problem."""
    app.register_error_handler(Problem, _of_problem)
    app.register_error_handler(HTTPException, _of_http)
    app.register_error_handler(Invalid, lambda error: _of_problem(invalid(error.faults)))
    app.register_error_handler(IllegalMove, _of_move)
    app.register_error_handler(InvalidMessage, lambda error: _of_problem(Problem(422, "too-large", str(error))))
    app.register_error_handler(DBAPIError, _of_database)


def answer(status: int, members: Mapping[str, Any], headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    """Return *members* as a problem."""
    # A pointer names what was sent, which may hold a lone surrogate: UTF-8 has none, and JSON writes it as this escape.
    body = json.dumps({"status": status, **members}, ensure_ascii=False).encode(errors="backslashreplace")
    return Response(body, status, headers=dict(headers), content_type=CONTENT_TYPE)


def _of_problem(problem: Problem) -> Response:
    title, _ = KINDS[problem.kind]
    headers = {"Retry-After": "5"} if problem.status == 503 else {}
    members = {"type": f"/docs#{problem.kind}", "title": title, "detail": problem.detail, **problem.extra}
    return answer(problem.status, members, headers)


def _of_http(error: HTTPException) -> Response:
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name.lower() not in ("content-type", "content-length")}
    return answer(status, {"type": "about:blank", "title": error.name, "detail": error.description}, headers)


def _of_move(error: IllegalMove) -> Response:
    words = ", ".join(error.allowed)
    detail = f"{error}; it may become {words}"
    return _of_problem(Problem(409, "illegal-move", detail, state=error.state, allowed=list(error.allowed)))


def _of_database(error: DBAPIError) -> Response:
    """A server that is away or tables that are not made are not this program's mistake; anything else is."""
    detail = "the database does not answer"
    try:
        migrations.check(database.of(current_app).engine)
    except SchemaError as missing:
        detail = str(missing)
    except DBAPIError:
        pass
    else:
        said = meaning(error)
        if not said.is_passing and said is not Meaning.CANCELLED:
            raise error
        detail = "the database was busy with others for too long"
    # The statement's parameters are hidden by the engine: no payload gets into the log.
    say(log, logging.ERROR, "database.failed", f"{detail}: {type(error.orig).__name__}")
    return _of_problem(Problem(503, "unavailable", detail))
