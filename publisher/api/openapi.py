"""The description of the API: made from the very kinds of field that check what comes in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from publisher.api import problems
from publisher.api.requests import DEFAULT_LIMIT, MAX_LIMIT
from publisher.conference.fields import REFERENCE
from publisher.conference.kinds import EVENT, KINDS, MOVE, PARTS, SESSION, SPEAKER
from publisher.conference.states import MOVES, EventState, TalkState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from publisher.conference.kinds import Kind

Json = dict[str, Any]

_TITLE = "Open Event"
_INTRODUCTION = """\
Conferences with their sessions, speakers, rooms (microlocations) and tracks. Every change is told to other services by a
message that is written in the same transaction: an answer never waits for the message broker and is the same while it is down.

Times are RFC 3339; they are accepted with any offset and shown in UTC. Collections are read page by page: follow `next`
(also the `Link` header with `rel="next"`) until it is null. Every error is an `application/problem+json`."""

#: What is shown of a thing and never entered: name → schema.
_READ_ONLY: dict[str, Json] = {
    "id": {**REFERENCE.schema, "description": "The publisher's own number."},
    "external_id": {"type": ["string", "null"], "description": "The id in the export it was imported from."},
    "event_id": REFERENCE.schema,
    "speaker_ids": {"type": "array", "items": REFERENCE.schema, "description": "In the order of the programme."},
}


def document(version: str) -> Json:
    """Return the OpenAPI 3.1 description of the API."""
    paths: Json = _events()
    for kind in PARTS.values():
        paths |= _parts(kind)
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "version": version, "description": _INTRODUCTION},
        "paths": paths | _session_paths() | _other_paths(),
        "components": {"schemas": _schemas(), "responses": {"Problem": _problem_response()}},
    }


# --- schemas ------------------------------------------------------------------------------------------------------------


def _schemas() -> Json:
    schemas: Json = {"Problem": _PROBLEM, "Message": _MESSAGE, "Move": _writable(MOVE, partial=False)}
    for kind in KINDS.values():
        name = kind.name.capitalize()
        schemas[name] = _shown(kind)
        schemas[f"New{name}"] = _writable(kind, partial=False)
        schemas[f"{name}Changes"] = _writable(kind, partial=True)
        schemas[f"{name}Page"] = _object(
            {
                "items": {"type": "array", "items": _ref(name)},
                "next": {"type": ["string", "null"], "description": "The path of the next page."},
            }
        )
    return schemas


def _shown(kind: Kind) -> Json:
    always = kind.always
    properties = {name: _READ_ONLY[name] for name in kind.read_only}
    properties |= {name: field.schema if name in always else _nullable(field.schema) for name, field in kind.fields.items()}
    if kind is SESSION:
        properties["state"] = {"type": "string", "enum": [state.value for state in TalkState]}
    return _object(properties)


def _writable(kind: Kind, *, partial: bool) -> Json:
    always = kind.always
    properties = {name: field.schema if name in always else _nullable(field.schema) for name, field in kind.fields.items()}
    if partial:
        return _object(properties, required=())
    properties |= {name: field.schema for name, (field, _) in kind.first.items()}
    properties |= {name: {**properties[name], "default": default} for name, default in kind.defaults.items()}
    return _object(properties, required=sorted(kind.required))


def _nullable(schema: Json) -> Json:
    return {**schema, "type": [schema["type"], "null"]}


def _object(properties: Json, required: Iterable[str] | None = None) -> Json:
    """Return the schema of an object with these members and no others, all of them required unless told."""
    names = list(properties if required is None else required)
    schema: Json = {"type": "object", "properties": properties, "additionalProperties": False}
    return schema | ({"required": names} if names else {})


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


_TEXT: Json = {"type": "string"}
_LIMIT: Json = {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT, "default": DEFAULT_LIMIT}
_MOMENT: Json = {"type": "string", "format": "date-time"}

_PROBLEM: Json = {
    "type": "object",
    "description": "RFC 9457 problem details.",
    "properties": {
        "type": _TEXT,
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "errors": {
            "type": "array",
            "description": "What is wrong with which field (422).",
            "items": _object({"pointer": {"type": "string", "description": "A JSON pointer."}, "detail": _TEXT}),
        },
        "state": {"type": "string", "description": "The state a session has (409)."},
        "allowed": {"type": "array", "items": _TEXT, "description": "The states it may go to (409)."},
    },
    "required": ["type", "title", "status", "detail"],
}

_MESSAGE: Json = _object(
    {
        "id": {"type": "string", "format": "uuid"},
        "topic": _TEXT,
        "key": {"type": ["string", "null"]},
        "sequence": {"type": ["integer", "null"], "description": "Its number among the messages of its key."},
        "state": {"type": "string", "enum": ["pending", "retrying", "unroutable", "dead", "discarded", "published"]},
        "attempts": {"type": "integer"},
        "last_error": {"type": ["string", "null"]},
        "created_at": _MOMENT,
        "published_at": {**_MOMENT, "type": ["string", "null"], "description": "When the broker confirmed it."},
        "held_by": {"type": ["string", "null"], "format": "uuid", "description": "The earlier message it waits for."},
    }
)


# --- paths --------------------------------------------------------------------------------------------------------------


def _events() -> Json:
    number = _number("event_id")
    return {
        "/v1/events": {"get": _list(EVENT), "post": _create(EVENT)},
        "/v1/events/{event_id}": {"parameters": [number], **_item(EVENT)},
    }


def _parts(kind: Kind) -> Json:
    return {
        f"/v1/events/{{event_id}}/{kind.plural}": {
            "parameters": [_number("event_id")],
            "get": _list(kind),
            "post": _create(kind),
        },
        f"/v1/{kind.plural}/{{{kind.name}_id}}": {"parameters": [_number(f"{kind.name}_id")], **_item(kind)},
    }


def _session_paths() -> Json:
    moves = "\n".join(f"* `{state}` → {', '.join(f'`{next_}`' for next_ in allowed)}" for state, allowed in MOVES.items())
    return {
        "/v1/sessions/{session_id}/state": {
            "parameters": [_number("session_id")],
            "post": _operation(
                "Move a session to another state",
                SESSION.plural,
                {200: _ref("Session")},
                body="Move",
                text=f"The moves:\n\n{moves}",
                also=(404, 409),
            ),
        },
        "/v1/sessions/{session_id}/speakers/{speaker_id}": {
            "parameters": [_number("session_id"), _number("speaker_id")],
            "put": _operation(
                "Put a speaker last among those of a session",
                SESSION.plural,
                {204: None},
                text="Doing so again changes nothing.",
                also=(404, 422),
            ),
            "delete": _operation("Take a speaker off a session", SESSION.plural, {204: None}, also=(404,)),
        },
    }


def _list(kind: Kind) -> Json:
    parameters = [
        _query("limit", _LIMIT, "Things in one page."),
        _query("cursor", _TEXT, "Where the page begins: taken from `next`."),
    ]
    if kind is SESSION:
        parameters.append(_query("state", {"type": "string", "enum": [state.value for state in TalkState]}, "Only these."))
    operation = _operation(
        f"List {kind.plural}", kind.plural, {200: _ref(f"{kind.name.capitalize()}Page")}, also=() if kind is EVENT else (404,)
    )
    operation["responses"]["200"]["headers"] = {"Link": {"schema": _TEXT, "description": 'The next page, `rel="next"`.'}}
    return operation | {"parameters": parameters}


def _create(kind: Kind) -> Json:
    name = kind.name.capitalize()
    operation = _operation(
        f"Create {_an(kind)}",
        kind.plural,
        {201: _ref(name)},
        body=f"New{name}",
        also=() if kind is EVENT else (404,),
    )
    operation["responses"]["201"]["headers"] = {"Location": {"schema": _TEXT, "description": "The path of what was made."}}
    return operation


def _item(kind: Kind) -> Json:
    name, goes = kind.name.capitalize(), _GOES.get(kind.name, "")
    changing = f"Set `state` to `{EventState.PUBLISHED}` to publish it." if kind is EVENT else ""
    return {
        "get": _operation(f"Show {_an(kind)}", kind.plural, {200: _ref(name)}, also=(404,)),
        "patch": _operation(
            f"Change {_an(kind)}",
            kind.plural,
            {200: _ref(name)},
            body=f"{name}Changes",
            text=f"Fields that are not sent stay as they are. {changing}".strip(),
            also=(404,),
        ),
        "delete": _operation(f"Delete {_an(kind)}", kind.plural, {204: None}, text=goes, also=(404,)),
    }


_GOES = {
    EVENT.name: "Everything that belongs to it goes with it.",
    SPEAKER.name: "Their sessions stay, without them.",
    "microlocation": "Its sessions stay, without a room.",
    "track": "Its sessions stay, without a track.",
}


def _other_paths() -> Json:
    healthy = {"type": "object", "properties": {"ok": {"const": True}}, "required": ["ok"], "additionalProperties": False}
    message = {"name": "message_id", "in": "path", "required": True, "schema": {"type": "string", "format": "uuid"}}
    metrics = _operation("Metrics for Prometheus", "operation", {200: None}, also=(501,))
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": _TEXT}}
    document_ = _operation("This description", "operation", {200: {"type": "object"}})
    page = _operation("This description, to read", "operation", {200: None})
    page["responses"]["200"]["content"] = {"text/html": {"schema": _TEXT}}
    return {
        "/v1/messages/{message_id}": {
            "parameters": [message],
            "get": _operation(
                "Where is my message",
                "messages",
                {200: _ref("Message")},
                text='A change names the messages it sent in `Link` headers with `rel="status"`.',
                also=(404,),
            ),
        },
        "/livez": {"get": _operation("Does the process answer", "operation", {200: healthy})},
        "/readyz": {
            "get": _operation(
                "Can the database be used",
                "operation",
                {200: healthy},
                text="The broker is not asked: changes are accepted while it is down.",
                also=(503,),
            )
        },
        "/metrics": {"get": metrics},
        "/openapi.json": {"get": document_},
        "/docs": {"get": page},
    }


# --- operations ---------------------------------------------------------------------------------------------------------

_REASONS = {
    400: "The body or a parameter can't be read.",
    404: "There is no such thing.",
    409: "The session can't go there: `allowed` says where.",
    413: "The body is too long.",
    415: "The body is not `application/json`.",
    422: "Fields can't be accepted: `errors` says which.",
    501: "This process keeps no metrics.",
    503: "The database can't be used now.",
}


def _operation(
    summary: str, tag: str, answers: dict[int, Json | None], *, body: str = "", text: str = "", also: Iterable[int] = ()
) -> Json:
    """Return an operation that answers with *answers* (status → schema of its JSON, None: no JSON) or with a problem."""
    refusals = {400, *also} | ({413, 415, 422} if body else set())
    if tag != "operation":  # the others ask no database
        refusals.add(503)
    responses = {str(status): _answer(status, schema) for status, schema in answers.items()}
    responses |= {str(status): {**_problem_response(), "description": _REASONS[status]} for status in sorted(refusals)}
    operation: Json = {"summary": summary, "tags": [tag], "responses": responses | {"default": _shared("Problem")}}
    if text:
        operation["description"] = text
    if body:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return operation


def _answer(status: int, schema: Json | None) -> Json:
    answer: Json = {"description": {200: "Fine.", 201: "Made.", 204: "Done."}[status]}
    return answer | ({"content": {"application/json": {"schema": schema}}} if schema else {})


def _problem_response() -> Json:
    return {"description": "A problem.", "content": {problems.CONTENT_TYPE: {"schema": _ref("Problem")}}}


def _shared(name: str) -> Json:
    return {"$ref": f"#/components/responses/{name}"}


def _number(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": REFERENCE.schema}


def _query(name: str, schema: Json, text: str) -> Json:
    return {"name": name, "in": "query", "schema": schema, "description": text}


def _an(kind: Kind) -> str:
    return f"{'an' if kind.name[0] in 'aeiou' else 'a'} {kind.name}"
