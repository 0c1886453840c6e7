"""The fixtures on servers that run anyway, and without any server."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pika
import psycopg
import pytest

from tests import conftest
from tests.kit.ports import free_port
from tests.kit.server_process import ServerMissingError
from tests.kit.servers import ExternalPostgres, ExternalRabbit, shared_postgres, shared_rabbit

if TYPE_CHECKING:
    from tests.kit.servers import PostgresServer, RabbitServer


def test_a_database_server_named_by_its_url_is_used_instead_of_a_private_one(
    postgres_server: PostgresServer | ExternalPostgres,
) -> None:
    with shared_postgres({"TEST_DATABASE_URL": postgres_server.url}) as server, server.database() as url:
        assert isinstance(server, ExternalPostgres)
        with psycopg.connect(url.replace("+psycopg", "")) as connection:
            assert connection.execute("SELECT current_database()").fetchone() == (urlsplit(url).path[1:],)


def test_a_broker_named_by_its_url_is_used_instead_of_a_private_one(
    rabbit_server: RabbitServer | ExternalRabbit,
) -> None:
    environ = {"TEST_BROKER_URL": rabbit_server.url, "TEST_BROKER_MANAGEMENT_URL": rabbit_server.management_url}
    with shared_rabbit(environ) as server, server.vhost() as url:
        assert isinstance(server, ExternalRabbit)
        with pika.BlockingConnection(pika.URLParameters(url)) as connection:
            connection.channel().queue_declare("here", durable=True)
        assert [queue["vhost"] for queue in server.management.request("GET", f"queues{urlsplit(url).path}")]


def test_a_broker_without_its_management_api_is_refused_with_the_next_step() -> None:
    silent = f"http://guest:guest@127.0.0.1:{free_port()}"
    with pytest.raises(ServerMissingError, match="set TEST_BROKER_MANAGEMENT_URL"):
        ExternalRabbit("amqp://guest:guest@127.0.0.1/", silent)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_missing_server_fails_in_ci_and_is_a_skip_elsewhere(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="install it"):
        conftest._unavailable(ServerMissingError("no PostgreSQL here: install it"))
