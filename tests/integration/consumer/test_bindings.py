"""What a service needs of RabbitMQ while it runs, and with which rights: queues, bindings, an exchange that is another's."""

from __future__ import annotations

import re
import shlex
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from outbox.consumer import operate, queues, worker
from outbox.errors import BrokerError
from tests.consuming import EXCHANGE, Desk, Recorder, message, running, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox.settings import Settings
    from tests.kit.servers import ExternalRabbit, RabbitServer

QUEUE = f"{EXCHANGE}.exports"
OWN = rf"^{EXCHANGE}\.(exports(\.dead)?|dead)$"
#: What a service needs once the exchange is there.
LEAST = {"configure": OWN, "write": OWN, "read": rf"^{EXCHANGE}(\.(exports(\.dead)?|dead))?$"}


class Place:
    """A virtual host, an administrator who may do everything there, and a service's database."""

    def __init__(self, broker_url: str, database_url: str, server: RabbitServer | ExternalRabbit) -> None:
        self.broker_url = broker_url
        self.database_url = database_url
        self.vhost = urlsplit(broker_url).path.strip("/")
        self.manage = server.management.request
        self.management_url = server.management_url
        self.recorder = Recorder()
        self.desk = Desk(broker_url)
        operate.migrate(self.recorder.service, operate.open_engine(self.recorder.service, self.settings()))

    def settings(self, url: str | None = None, **more: str) -> Settings:
        return settings_for(url or self.broker_url, self.database_url, **more)

    @contextmanager
    def user(self, **rights: str) -> Iterator[str]:
        """The URL of a user with these rights and no others."""
        name = f"limited-{self.vhost}"
        self.manage("PUT", f"users/{name}", {"password": "secret", "tags": ""})
        self.allow(name, **rights)
        parts = urlsplit(self.broker_url)
        try:
            yield f"amqp://{name}:secret@{parts.hostname}:{parts.port}/{self.vhost}"
        finally:
            self.manage("DELETE", f"users/{name}")

    def allow(self, user: str, *, configure: str, write: str, read: str) -> None:
        body = {"configure": configure, "write": write, "read": read}
        self.manage("PUT", f"permissions/{self.vhost}/{user}", body)

    def is_applied(self, settings: Settings) -> None:
        """A message that is published while a service with *settings* runs is applied by it."""
        with running(self.recorder.service, settings) as service:
            before = service.status().applied_total
            self.desk.publish(message(1))
            eventually(lambda: service.status().applied_total == before + 1, what="the message to be applied")


@pytest.fixture
def place(broker_url: str, sqlite_url: str, rabbit_server: Any) -> Place:
    return Place(broker_url, sqlite_url, rabbit_server)


# --- rights ------------------------------------------------------------------------------------------------------------


def test_a_service_makes_its_queues_and_runs_without_a_right_to_change_the_exchange(place: Place) -> None:
    queues.declare_exchange(place.settings())
    with place.user(**LEAST) as url:
        place.is_applied(place.settings(url))
        place.is_applied(place.settings(url))


def test_a_service_whose_queues_are_there_needs_no_right_to_declare_anything(place: Place) -> None:
    queues.apply(place.recorder.service, place.settings())
    with place.user(**{**LEAST, "configure": "^$"}) as url:
        place.is_applied(place.settings(url))
        queue, dead, _ = queues.check(place.recorder.service, place.settings(url))
        assert (queue.ok, dead.ok) == (True, True)
        assert "whether as it should be, the user may not ask" in queue.text


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ({"configure": OWN}, f"exchange '{EXCHANGE}': .* the right to configure exchange '{EXCHANGE}' .*topology apply"),
        ({"configure": "^$"}, f"exchange '{EXCHANGE}.dead': user .* lacks the right to configure exchange '{EXCHANGE}.dead'"),
        ({"write": "^$"}, f"binding queue '{QUEUE}.dead' .* lacks the right to write queue '{QUEUE}.dead'"),
        ({"read": "^$"}, f"binding queue '{QUEUE}.dead' .* lacks the right to read exchange '{EXCHANGE}.dead'"),
        ({"read": rf"^{EXCHANGE}(\.dead|\.exports)?$"}, f"consuming queue '{QUEUE}.dead': .* to read queue '{QUEUE}.dead'"),
    ],
    ids=["the-exchange", "configure", "write", "read", "read-of-the-queue"],
)  # fmt: skip
def test_a_missing_right_is_named_and_the_command_that_is_printed_gives_all(
    place: Place, missing: dict[str, str], said: str
) -> None:
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    with place.user(**{**everything, **missing}) as url:
        with pytest.raises(BrokerError, match=f"^{said}") as refusal:
            worker.run(place.recorder.service, place.settings(url))
        assert "secret" not in str(refusal.value)
        command = re.search(r"rabbitmqctl set_permissions -p (.*)$", str(refusal.value))
        assert command is not None
        vhost, user, configure, write, read = shlex.split(command[1])
        assert vhost == place.vhost
        queues.declare_exchange(place.settings())
        place.allow(user, configure=configure, write=write, read=read)
        place.is_applied(place.settings(url))
