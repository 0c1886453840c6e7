"""What comes in: bodies, ids and parameters, each refused where it is not what was said."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

from flask import current_app, request
from werkzeug.exceptions import UnsupportedMediaType
from werkzeug.routing import BaseConverter, ValidationError

from publisher.api.problems import malformed
from publisher.conference.fields import MAX_ID

if TYPE_CHECKING:
    from collections.abc import Callable

    from flask import Flask

    View = TypeVar("View", bound=Callable[..., Any])

#: Larger than any thing that is accepted, also where each character is written as an escape.
MAX_BODY_BYTES = 1024 * 1024
DEFAULT_LIMIT, MAX_LIMIT = 50, 200
_parameters: WeakKeyDictionary[Callable[..., Any], tuple[str, ...]] = WeakKeyDictionary()
_JSON = ("application/json", "application/merge-patch+json")


class RowId(BaseConverter):
    """`<id:name>` in a route: the number of a row."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> int:
        """Return the number; what no row can have is not found."""
        if int(value) > MAX_ID:
            raise ValidationError
        return int(value)


def init_app(app: Flask) -> None:
    """Teach *app* the ids in its routes and the limit of its bodies."""
    app.url_map.converters["id"] = RowId
    app.url_map.strict_slashes = True
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.before_request(_refuse_unknown_parameters)


def body() -> dict[str, Any]:
    """Return the JSON object that was sent. Raises 415 for other media types, 400 for what is no JSON object."""
    if request.mimetype not in _JSON or request.headers.get("Content-Encoding", "identity") != "identity":
        raise UnsupportedMediaType("send application/json, not compressed")
    try:
        value = json.loads(request.get_data(), parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        text = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise malformed(f"the body is no JSON: {text}") from error
    if not isinstance(value, dict):
        raise malformed("the body must be a JSON object")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has one name twice")
    return members


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a collection is asked for: at most *limit* rows, with ids above *after*."""

    limit: int
    after: int


def page() -> Page:
    """Return what `limit` and `cursor` say. Raises 400 for what they can't be."""
    limit = request.args.get("limit", str(DEFAULT_LIMIT))
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= MAX_LIMIT:
        raise malformed(f"limit={limit[:20]} must be a number from 1 to {MAX_LIMIT}")
    cursor = request.args.get("cursor", "after-0")
    found = re.fullmatch("after-([0-9]{1,19})", cursor)
    if found is None or int(found[1]) > MAX_ID:
        raise malformed("cursor is none of this API's; take it from `next`, unchanged")
    return Page(limit=int(limit), after=int(found[1]))


def takes(*names: str) -> Callable[[View], View]:
    """Say which query parameters a view knows; on every other path and for every other name they are refused."""

    def mark(view: View) -> View:
        _parameters[view] = names
        return view

    return mark


def _refuse_unknown_parameters() -> None:
    """Raise 400 for parameters that are unknown or repeated: a misspelt filter must not be ignored."""
    view = current_app.view_functions.get(request.endpoint or "")
    if view is None:  # 404 or 405, decided already
        return
    known = _parameters.get(view, ())
    for name, values in request.args.lists():
        if name not in known:
            offer = f"there are {', '.join(known)}" if known else "this path takes none"
            raise malformed(f"unknown parameter {name[:50]!r}: {offer}")
        if len(values) > 1:
            raise malformed(f"parameter {name!r} is given twice")
