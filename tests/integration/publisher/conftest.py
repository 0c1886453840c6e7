"""An application on a new database, and a client that speaks to it like a person with curl. Its broker does not exist."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

import publisher
from outbox import Message
from publisher import database, migrations, topics

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.test import TestResponse

EVENT = {
    "name": "Blinker Day",
    "timezone": "Europe/Berlin",
    "starts_at": "2027-05-23T09:00:00+02:00",
    "ends_at": "2027-05-23T18:00:00+02:00",
}


def application(url: str, **config: Any) -> Flask:
    """Return the application on *url*; nobody listens at its broker's address, and it must never notice."""
    app = publisher.create_app({"DATABASE_URL": url, "BROKER_URL": "amqp://nobody:secret@127.0.0.1:1/", **config})
    migrations.upgrade(database.of(app).engine)
    return app


@dataclass(frozen=True, slots=True)
class Api:
    """Requests to one application; the short methods check the status that success has."""

    app: Flask

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> TestResponse:
        if body is not None:
            options["json"] = body
        return self.app.test_client().open(path, method=method, **options)

    def get(self, path: str) -> Any:
        return self._checked(self.request("GET", path), 200)

    def make(self, path: str, **fields: Any) -> Any:
        return self._checked(self.request("POST", path, fields), 201)

    def change(self, path: str, **fields: Any) -> Any:
        return self._checked(self.request("PATCH", path, fields), 200)

    def delete(self, path: str) -> None:
        assert self.request("DELETE", path).status_code == 204

    def put(self, path: str) -> None:
        assert self.request("PUT", path).status_code == 204

    def move(self, session_id: int, state: str) -> Any:
        return self._checked(self.request("POST", f"/v1/sessions/{session_id}/state", {"state": state}), 200)

    def all(self, path: str) -> list[Any]:
        """Return everything of a collection, page after page."""
        items, following = [], f"{path}?limit=200"
        while following:
            page = self.get(following)
            items += page["items"]
            following = page["next"]
        return items

    def event(self, **fields: Any) -> Any:
        return self.make("/v1/events", **(EVENT | fields))

    def refused(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """Return the problem that a request is answered with."""
        answer = self.request(method, path, body, **options)
        assert answer.status_code >= 400, answer.get_data(as_text=True)
        assert answer.content_type == "application/problem+json"
        problem: dict[str, Any] = json.loads(answer.data)
        assert problem["status"] == answer.status_code
        assert problem.keys() >= {"type", "title", "detail"}
        return problem

    @staticmethod
    def _checked(answer: TestResponse, status: int) -> Any:
        assert answer.status_code == status, answer.get_data(as_text=True)
        return answer.json


def data_of(message: Message) -> Any:
    """Return the payload of *message*."""
    return json.loads(message.body)


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    """The application: the test runs on SQLite and on PostgreSQL."""
    made = application(database_url)
    yield made
    database.of(made).engine.dispose()


@pytest.fixture
def api(app: Flask) -> Api:
    """A client of `app`."""
    return Api(app)


@pytest.fixture
def sent() -> Iterator[list[Message]]:
    """The messages whose transactions committed during the test."""
    with topics.outbox.record() as messages:
        yield messages


@pytest.fixture
def sqlite_api(sqlite_url: str) -> Iterator[Api]:
    """A client of an application on SQLite, for what does not depend on the database."""
    made = application(sqlite_url)
    yield Api(made)
    database.of(made).engine.dispose()
