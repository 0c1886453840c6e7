from __future__ import annotations

import gzip
import io
import json
import logging
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from outbox import Message
from publisher import create_app, database
from publisher.api.requests import MAX_BODY_BYTES
from publisher.conference.models import Track
from publisher.database import changing
from tests.integration.publisher.conftest import EVENT, Api, application

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body is no JSON"),
        (b"{", "the body is no JSON"),
        (b'{"name": "\xff"}', "the body is no JSON"),
        (b'{"latitude": NaN}', "the body is no JSON: NaN is not JSON"),
        (b'{"name": "a", "name": "b"}', "the body is no JSON: an object has one name twice"),
        (b"[" * 100_000, "the body is no JSON: it is nested too deep"),
        (b"[]", "the body must be a JSON object"),
        (b"null", "the body must be a JSON object"),
    ],
)
def test_a_body_that_can_not_be_read_is_malformed(sqlite_api: Api, body: bytes, said: str) -> None:
    problem = sqlite_api.refused("POST", "/v1/events", data=body, headers=JSON)

    assert (problem["status"], problem["type"]) == (400, "/docs#malformed")
    assert problem["detail"].startswith(said)


def test_fields_that_can_not_be_accepted_are_named_by_pointer(sqlite_api: Api) -> None:
    problem = sqlite_api.refused("POST", "/v1/events", {"name": "a\x00", "starts_at": "2027", "colour": "red"})

    assert (problem["status"], problem["type"]) == (422, "/docs#invalid")
    assert {error["pointer"] for error in problem["errors"]} == {"/name", "/starts_at", "/ends_at", "/colour"}


def test_a_name_that_utf_8_can_not_express_is_named_as_json_writes_it(sqlite_api: Api) -> None:
    problem = sqlite_api.refused("POST", "/v1/events", data=b'{"\\ud800\xc3\xa9": 1}', headers=JSON)

    assert problem["status"] == 422
    assert {"pointer": "/\ud800é", "detail": "is unknown here"} in problem["errors"]


@pytest.mark.parametrize(
    ("headers", "data"),
    [
        ({}, b"{}"),
        ({"Content-Type": "text/plain"}, b"{}"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"name=x"),
        (JSON | {"Content-Encoding": "gzip"}, gzip.compress(b"{}", mtime=0)),
    ],
)
def test_a_body_of_another_kind_is_refused(sqlite_api: Api, headers: dict[str, str], data: bytes) -> None:
    assert sqlite_api.refused("POST", "/v1/events", data=data, headers=headers)["status"] == 415


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/merge-patch+json"])
def test_a_change_is_taken_under_either_name_of_its_kind(sqlite_api: Api, content_type: str) -> None:
    path = f"/v1/events/{sqlite_api.event()['id']}"

    answer = sqlite_api.request("PATCH", path, data=b'{"name": "Other"}', headers={"Content-Type": content_type})

    assert answer.status_code == 200


def test_a_body_that_is_too_long_is_refused_however_it_comes(sqlite_api: Api) -> None:
    long = b'{"name": "' + b"x" * MAX_BODY_BYTES + b'"}'
    chunked: dict[str, Any] = {"input_stream": io.BytesIO(long), "environ_overrides": {"wsgi.input_terminated": True}}

    assert sqlite_api.refused("POST", "/v1/events", data=long, headers=JSON)["status"] == 413
    assert sqlite_api.refused("POST", "/v1/events", headers=JSON, **chunked)["status"] == 413


@pytest.mark.parametrize(
    "path",
    [
        "/nowhere",
        "/v1",
        "/v1/events/",
        "/v1/events/0",
        "/v1/events/-1",
        "/v1/events/01",
        "/v1/events/x",
        "/v1/events/9223372036854775808",
        "/v1/events/" + "9" * 5_000,
        "/v1/messages/x",
        "/v1/messages/00000000-0000-0000-0000-000000000000",
        "/docs/static/none.css",
    ],
)
def test_what_is_not_there_is_a_problem_of_the_same_form(sqlite_api: Api, path: str) -> None:
    assert sqlite_api.refused("GET", path)["status"] == 404


def test_a_method_that_is_not_allowed_says_which_are(sqlite_api: Api) -> None:
    answer = sqlite_api.request("PUT", "/v1/events")

    assert sqlite_api.refused("PUT", "/v1/events")["status"] == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS", "POST"}


def test_a_parameter_where_none_is_known_is_refused(sqlite_api: Api) -> None:
    assert (
        sqlite_api.refused("POST", "/v1/events?dry_run=1", EVENT)["detail"]
        == "unknown parameter 'dry_run': this path takes none"
    )
    assert sqlite_api.refused("GET", "/openapi.json?x=1")["status"] == 400


def test_a_mistake_of_this_program_is_told_without_its_inside(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app({"DATABASE_URL": sqlite_url, "BROKER_URL": "amqp://nobody:secret@127.0.0.1:1/"})

    @app.get("/mistake")
    def mistake() -> str:
        raise RuntimeError("the inside")

    answer = app.test_client().get("/mistake")

    assert (answer.status_code, answer.content_type) == (500, "application/problem+json")
    assert b"inside" not in answer.data
    assert "the inside" in caplog.text


def test_a_mistake_in_a_statement_is_no_outage_and_leaks_nothing(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    app = application(sqlite_url)

    @app.get("/mistake")
    def mistake() -> str:
        with changing() as db:
            event = {"name": "payload", "starts_at": None}
            db.execute(sa.text("INSERT INTO events (name, starts_at) VALUES (:name, :starts_at)"), event)
        return ""

    answer = app.test_client().get("/mistake")

    assert (answer.status_code, answer.content_type) == (500, "application/problem+json")
    assert "IntegrityError" in caplog.text
    assert "payload" not in caplog.text
    database.of(app).engine.dispose()


def test_a_change_that_can_not_be_told_is_not_made(api: Api, sent: list[Message]) -> None:
    event = api.event()
    with api.app.app_context(), changing() as db:
        db.add_all(Track(event_id=event["id"], name=f"T{n}", description="🎤" * 1_000, color="#000000") for n in range(100))
    sent.clear()

    problem = api.refused("PATCH", f"/v1/events/{event['id']}", {"name": "Other"})

    assert (problem["status"], problem["type"]) == (422, "/docs#too-large")
    assert "OUTBOX_MAX_BODY=262144" in problem["detail"]
    assert api.get(f"/v1/events/{event['id']}") == event
    assert sent == []


def problems_of(app: Flask) -> tuple[Any, Any]:
    """Return what a list and what readiness answer."""
    client = app.test_client()
    answers = [client.get("/v1/events"), client.get("/readyz")]
    assert {answer.content_type for answer in answers} == {"application/problem+json"}
    assert {answer.headers["Retry-After"] for answer in answers} == {"5"}
    assert client.get("/livez").status_code == 200
    listed, ready = (json.loads(answer.data) for answer in answers)
    return listed, ready


def test_tables_that_are_not_made_are_said_with_the_command_that_makes_them(empty_url: str) -> None:
    app = create_app({"DATABASE_URL": empty_url, "BROKER_URL": "amqp://nobody:secret@127.0.0.1:1/"})

    listed, ready = problems_of(app)

    assert listed["status"] == ready["status"] == 503
    assert listed["detail"] == ready["detail"] == "the publisher tables do not exist; run: flask --app publisher migrate"
    database.of(app).engine.dispose()


def test_a_database_that_is_away_is_said_and_nothing_leaks(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    url = "postgresql+psycopg://ada:geheim@127.0.0.1:1/nowhere"
    app = create_app({"DATABASE_URL": url, "BROKER_URL": "amqp://nobody:secret@127.0.0.1:1/"})

    listed, ready = problems_of(app)

    assert listed["status"] == ready["status"] == 503
    assert listed["detail"] == ready["detail"] == "the database does not answer"
    assert "database.failed" in [getattr(record, "outbox_event", "") for record in caplog.records]
    assert "geheim" not in caplog.text


def test_a_database_that_another_holds_for_too_long_can_be_tried_again(sqlite_url: str) -> None:
    app = application(sqlite_url)
    engine = database.of(app).engine
    engine.dispose()
    sa.event.listen(engine, "checkout", lambda connection, *_: connection.execute("PRAGMA busy_timeout=10"))

    with engine.begin():  # holds the only writer's place
        answer = app.test_client().post("/v1/events", json=EVENT)
        listed = app.test_client().get("/v1/events")
        ready = app.test_client().get("/readyz")

    assert (answer.status_code, listed.status_code, ready.status_code) == (503, 200, 200)
    assert json.loads(answer.data)["detail"] == "the database was busy with others for too long"
    assert app.test_client().post("/v1/events", json=EVENT).status_code == 201
    engine.dispose()


def test_every_answer_is_hardened(sqlite_api: Api) -> None:
    for path in ("/v1/events", "/nowhere", "/docs"):
        assert sqlite_api.request("GET", path).headers["X-Content-Type-Options"] == "nosniff"
