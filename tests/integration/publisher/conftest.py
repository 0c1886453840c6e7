"""An application on an empty database, and a client that speaks to it like a person with curl. Its broker does not exist.

Every answer in these tests is held to /openapi.json.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

import publisher
from outbox import Message
from outbox.database import create_engine
from publisher import database, migrations, topics
from publisher.api import openapi
from tests.integration.publisher.contract import Contract

if TYPE_CHECKING:
    from flask import Flask
    from werkzeug.datastructures import Headers
    from werkzeug.test import TestResponse

    from tests.kit.servers import ExternalPostgres, PostgresServer

CONTRACT = Contract(openapi.document("0"))

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
        answer = self.app.test_client().open(path, method=method, **options)
        CONTRACT.check(method, path, body, answer)
        return answer

    def post(self, path: str, body: Any) -> tuple[Any, Headers]:
        """Make something; return it and the headers of the answer."""
        answer = self.request("POST", path, body)
        return self._checked(answer, 201), answer.headers

    def get(self, path: str) -> Any:
        return self._checked(self.request("GET", path), 200)

    def make(self, path: str, **fields: Any) -> Any:
        return self.post(path, fields)[0]

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


@pytest.fixture(scope="package")
def shared_postgres_url(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[str]:
    """One database for these tests: making one takes longer than any of them."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def empty_postgres_url(shared_postgres_url: str) -> str:
    """The shared database without any row."""
    engine = create_engine(shared_postgres_url)
    with engine.begin() as connection:
        tables = [name for name in sa.inspect(connection).get_table_names() if name not in ("outbox_version", "outbox_shard")]
        if tables:
            connection.exec_driver_sql(f"TRUNCATE {', '.join(tables)}")
    engine.dispose()
    return shared_postgres_url


@pytest.fixture(scope="package")
def made_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with all tables and no row, to copy."""
    path = tmp_path_factory.mktemp("publisher") / "made.db"
    database.of(application(f"sqlite:///{path}")).engine.dispose()
    return path


@pytest.fixture
def empty_sqlite_url(made_sqlite: Path, tmp_path: Path) -> str:
    """A new file with all tables and no row."""
    return f"sqlite:///{shutil.copy(made_sqlite, tmp_path / 'openevent.db')}"


@pytest.fixture(params=["empty_sqlite_url", pytest.param("empty_postgres_url", marks=pytest.mark.postgres)])
def app(request: pytest.FixtureRequest) -> Iterator[Flask]:
    """The application: the test runs on SQLite and on PostgreSQL."""
    made = application(request.getfixturevalue(request.param))
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


@pytest.fixture(scope="package")
def sqlite_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A client of one application on SQLite, for what depends neither on the database nor on what others put into it."""
    made = application(f"sqlite:///{tmp_path_factory.mktemp('publisher') / 'shared.db'}")
    yield Api(made)
    database.of(made).engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    url: str = request.getfixturevalue("postgres_url")
    return url
