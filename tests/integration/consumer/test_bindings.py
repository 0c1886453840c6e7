"""What a service needs of RabbitMQ while it runs, and with which rights: queues, bindings, an exchange that is another's."""

from __future__ import annotations

import json
import re
import shlex
import sys
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from outbox import topology
from outbox.cli import services
from outbox.consumer import bindings, operating, provisioning, runtime
from outbox.errors import BrokerError, ConfigurationError
from tests.kit.commands import Commands
from tests.kit.consuming import EXCHANGE, TOPIC, Desk, Recorder, message, running, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
        operating.migrate(self.recorder.service, operating.open_engine(self.recorder.service, self.settings()))

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

    def is_bound(self) -> bool:
        """Whether the service's queue gets its topic."""
        found = topology.bound(self.settings(BROKER_MANAGEMENT_URL=self.management_url), QUEUE)
        return TOPIC in (found or ())

    def is_applied(self, settings: Settings) -> None:
        """A message that is published while a service with *settings* runs is applied by it."""
        with running(self.recorder.service, settings) as service:
            before = service.status().applied_total
            self.desk.publish(message(1))
            eventually(lambda: service.status().applied_total == before + 1, what="the message to be applied")


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said, by its name."""
    return [getattr(record, "outbox_event", "") for record in caplog.records]


@pytest.fixture
def place(broker_url: str, sqlite_url: str, rabbit_server: Any) -> Place:
    return Place(broker_url, sqlite_url, rabbit_server)


# --- rights ------------------------------------------------------------------------------------------------------------


def test_a_service_makes_its_queues_and_runs_without_a_right_to_change_the_exchange(place: Place) -> None:
    provisioning.declare_exchange(place.settings())
    with place.user(**LEAST) as url:
        place.is_applied(place.settings(url))
        place.is_applied(place.settings(url))


def test_a_service_whose_queues_are_there_needs_no_right_to_declare_anything(place: Place) -> None:
    provisioning.apply(place.recorder.service, place.settings())
    with place.user(**{**LEAST, "configure": "^$"}) as url:
        place.is_applied(place.settings(url))
        queue, dead, _ = provisioning.check(place.recorder.service, place.settings(url))
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
            runtime.run(place.recorder.service, place.settings(url))
        assert "secret" not in str(refusal.value)
        command = re.search(r"rabbitmqctl set_permissions -p (.*)$", str(refusal.value))
        assert command is not None
        vhost, user, configure, write, read = shlex.split(command[1])
        assert vhost == place.vhost
        provisioning.declare_exchange(place.settings())
        place.allow(user, configure=configure, write=write, read=read)
        place.is_applied(place.settings(url))


# --- bindings ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service looks after its bindings so often that nobody waits."""
    monkeypatch.setattr(bindings, "_USUAL_SECONDS", 0.1)
    monkeypatch.setattr(bindings, "_MISSING_SECONDS", 0.1)


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("sees", [True, False], ids=["with-management", "without"])
def test_a_binding_that_went_is_made_again_and_said_where_it_can_be_seen(
    place: Place, caplog: pytest.LogCaptureFixture, sees: bool
) -> None:
    settings = place.settings(**({"BROKER_MANAGEMENT_URL": place.management_url} if sees else {}))
    with running(place.recorder.service, settings) as service:
        with place.desk.channel() as channel:
            channel.queue_unbind(QUEUE, EXCHANGE, TOPIC)
        eventually(place.is_bound, what="the queue to be bound again")
        place.desk.publish(message(1))
        eventually(lambda: service.status().applied_total == 1, what="the message to be applied")
        said = f"'{QUEUE}' was not bound to {TOPIC}: what was sent there meanwhile did not reach it; it is bound again"
        assert caplog.text.count(said) == (1 if sees else 0)


@pytest.mark.usefixtures("often")
def test_a_deleted_exchange_is_said_and_not_made_by_a_service_that_runs_and_bound_to_when_it_is_there_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with running(place.recorder.service, place.settings()) as service:
        with place.desk.channel() as channel:
            channel.exchange_delete(EXCHANGE)
            channel.exchange_delete(f"{EXCHANGE}.dead")
        eventually(lambda: "consumer.exchange_gone" in events(caplog), what="the loss of the exchange to be said")
        assert provisioning.declare_exchange(place.settings()), "the service made the exchange"
        eventually(place.is_bound, what="the queue to be bound")
        eventually(lambda: "consumer.bound_again" in events(caplog), what="that to be said")
        place.desk.publish(message(1))
        eventually(lambda: service.status().applied_total == 1, what="the message to be applied")
        assert events(caplog).count("consumer.exchange_gone") == 1
        assert "consumer.disconnected" not in events(caplog)


@pytest.mark.usefixtures("often")
def test_a_service_that_may_not_bind_any_more_goes_on_with_the_bindings_it_has(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    provisioning.declare_exchange(place.settings())
    with place.user(**LEAST) as url, running(place.recorder.service, place.settings(url)) as service:
        place.allow(urlsplit(url).username or "", **{**LEAST, "read": rf"^{EXCHANGE}\.exports(\.dead)?$"})
        eventually(lambda: "consumer.may_not_bind" in events(caplog), what="that to be said")
        place.desk.publish(message(1))
        eventually(lambda: service.status().applied_total == 1, what="the message to be applied")
        assert "consumer.disconnected" not in events(caplog)


@pytest.mark.usefixtures("often")
def test_a_topic_that_has_no_handler_any_more_is_said_checked_and_unbound_when_asked(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.recorder.service.on("session.old")(lambda message, db_session, /, **extra: None)
    sees = place.settings(BROKER_MANAGEMENT_URL=place.management_url)
    provisioning.apply(place.recorder.service, sees)
    newer = Recorder().service
    with running(newer, sees):
        eventually(lambda: "consumer.bound_without_handler" in events(caplog), what="the topic to be said")
    assert f"'{QUEUE}' is bound to session.old, for which this version has no handler" in caplog.text
    assert [item.ok for item in provisioning.check(newer, sees)] == [True, True, False]
    assert provisioning.prune(newer, sees) == ["session.old"]
    assert provisioning.prune(newer, sees) == []
    assert [item.ok for item in provisioning.check(newer, sees)] == [True, True, True]
    with pytest.raises(ConfigurationError, match="set BROKER_MANAGEMENT_URL"):
        provisioning.prune(newer, place.settings())


def test_the_embedded_broker_shows_what_is_bound_without_a_handler(tmp_path: Path) -> None:
    settings = settings_for(f"embedded:///{tmp_path}/broker.db", f"sqlite:///{tmp_path}/service.db")
    older, newer = Recorder().service, Recorder().service
    older.on("session.old")(lambda message, db_session, /, **extra: None)
    provisioning.apply(older, settings)
    assert "session.old" in provisioning.check(newer, settings)[-1].text
    assert provisioning.prune(newer, settings) == ["session.old"]


def test_the_doctor_compares_the_services_here_with_what_is_bound(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType("shop_exports")
    module.service = place.recorder.service  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop_exports", module)
    monkeypatch.setattr(services, "all_names", lambda: ["shop_exports:service", "not_there:service"])
    env = {"BROKER_URL": place.broker_url, "BROKER_MANAGEMENT_URL": place.management_url, "OUTBOX_EXCHANGE": EXCHANGE}
    outbox = Commands({**env, "DATABASE_URL": f"sqlite:///{tmp_path}/outbox.db"})
    outbox.fine("migrate")
    outbox.fine("topology", "apply")

    def found() -> list[tuple[str, str]]:
        items = json.loads(outbox("doctor", "--json").stdout)
        return [(item["verdict"], item["detail"]) for item in items if item["check"] == "service"]

    assert [verdict for verdict, _ in found()] == ["WARN", "UNKNOWN"]
    outbox.fine("consumer", "topology", "shop_exports:service", "--apply")
    assert [verdict for verdict, _ in found()] == ["OK", "OK", "OK", "UNKNOWN"]
    with place.desk.channel() as channel:
        channel.queue_bind(QUEUE, EXCHANGE, "something.else")
        channel.queue_unbind(QUEUE, EXCHANGE, TOPIC)
    said = [detail for verdict, detail in found() if verdict == "FAIL"]
    assert said == [
        f"topic '{TOPIC}' does not reach '{QUEUE}'; outbox consumer topology shop_exports:service --apply",
        f"'{QUEUE}' is bound to 'something.else', which has no handler: such messages are parked; "
        "outbox consumer topology shop_exports:service --apply --prune",
    ]
    assert "Unbound from: something.else" in outbox.fine("consumer", "topology", "shop_exports:service", "--apply", "--prune")
    assert [verdict for verdict, _ in found()] == ["OK", "OK", "OK", "UNKNOWN"]
