"""docs/operating.md is true: its units and manifests are valid, and each role it describes can do its work and no more."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
import yaml
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from outbox import Outbox
from tests.kit.commands import Commands
from tests.kit.guides import files, page, write

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kit.servers import ExternalPostgres, ExternalRabbit, PostgresServer, RabbitServer

SECRET = "a-role-of-the-tests"


# --- units and manifests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["outbox-relay.service", "outbox-consumer@.service"])
def test_systemd_takes_the_units(tmp_path: Path, unit: str) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine: install systemd")
    # It looks for the program; who installs the unit has it in /opt.
    text = files("operating.md", "ini")[unit].replace("/opt/shop/.venv/bin/outbox", sys.executable)
    instance = tmp_path / unit.replace("@.", "@seats.")
    instance.write_text(text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", instance], capture_output=True, text=True, check=False)
    about_ours = [line for line in done.stderr.splitlines() if "outbox" in line]
    assert (done.returncode, about_ours) == (0, []), done.stderr


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(files("operating.md", "yaml")["outbox.yaml"]))


def test_the_manifests_hang_together() -> None:
    kinds = {"Job": "batch/v1", "Deployment": "apps/v1"}
    found = manifests()
    assert len(found) == 3
    for manifest in found:
        assert manifest["apiVersion"] == kinds[manifest["kind"]]
        assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
        assert re.fullmatch(r"[a-z0-9-]{1,63}", manifest["metadata"]["name"])
        pod = manifest["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        assert {"name", "image", "command"} <= set(container)
        assert all(isinstance(each["value"], str) for each in container.get("env", []))
        if manifest["kind"] == "Deployment":
            assert manifest["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
            ports = {each["name"] for each in container["ports"]}
            for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
                assert container[probe]["httpGet"] == {"path": path, "port": "probes"}
            assert ports == {"probes"}
            assert pod["spec"]["terminationGracePeriodSeconds"] > 25 + 3


# --- roles --------------------------------------------------------------------------------------------------------------


class Roles:
    """The roles of the page on a real server, under names of their own: roles belong to the whole server."""

    def __init__(self, server: str) -> None:
        self._server = sa.create_engine(server, isolation_level="AUTOCOMMIT")
        self._suffix = uuid.uuid4().hex[:8]
        self._databases: list[str] = []
        self.names = ("app", "relay", "operator", "seats")
        with self._server.connect() as connection:
            for name in self.names:
                connection.exec_driver_sql(f"CREATE ROLE {self._own(name)} LOGIN PASSWORD '{SECRET}'")

    def _own(self, name: str) -> str:
        return f"{name}_{self._suffix}"

    def grant(self, url: str, script: str) -> None:
        """Run *script* of the page in the database *url*."""
        self._databases.append(url)
        text = re.sub(r"TO (\w+);", lambda match: f"TO {self._own(match[1])};", files("operating.md", "sql")[script])
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(text)
        engine.dispose()

    def url(self, name: str, url: str) -> str:
        """Return *url* for the role *name*."""
        return sa.make_url(url).set(username=self._own(name), password=SECRET).render_as_string(hide_password=False)

    def drop(self) -> None:
        for url in self._databases:
            engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                for name in self.names:
                    connection.exec_driver_sql(f"DROP OWNED BY {self._own(name)}")
            engine.dispose()
        with self._server.connect() as connection:
            for name in self.names:
                connection.exec_driver_sql(f"DROP ROLE {self._own(name)}")
        self._server.dispose()


@pytest.fixture
def roles(postgres_server: PostgresServer | ExternalPostgres, postgres_url: str, seats_url: str) -> Iterator[Roles]:
    made = Roles(postgres_server.url)
    yield made
    made.drop()


@pytest.fixture
def seats_url(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[str]:
    """The database of the service."""
    with postgres_server.database() as url:
        yield url


def permissions() -> dict[str, tuple[str, ...]]:
    """Return the permissions on RabbitMQ that the page lists: user → patterns of configure, write, read."""
    rows = re.findall(
        r"^\| (deployment|relay|service)[^|]* \| `(.*)` \| `(.*)` \| `(.*)` \|$", page("operating.md"), re.MULTILINE
    )
    return {user: tuple(each.replace(r"\|", "|").replace("NAME", "seats") for each in patterns) for user, *patterns in rows}


@pytest.fixture
def brokers(rabbit_server: RabbitServer | ExternalRabbit, broker_url: str) -> Iterator[dict[str, str]]:
    """The broker's URL for each user of the page."""
    management, suffix = rabbit_server.management, uuid.uuid4().hex[:8]
    vhost = broker_url.rpartition("/")[2]
    host = broker_url.rpartition("@")[2]
    urls = {}
    with contextlib.ExitStack() as users:
        for user, (configure, write_, read) in permissions().items():
            name = f"{user}-{suffix}"
            management.request("PUT", f"users/{name}", {"password": SECRET, "tags": ""})
            users.callback(management.request, "DELETE", f"users/{name}")
            rights = {"configure": configure, "write": write_, "read": read}
            management.request("PUT", f"permissions/{vhost}/{name}", rights)
            urls[user] = f"amqp://{name}:{SECRET}@{host}"
        yield urls


@pytest.mark.timeout(180)
def test_each_role_of_the_page_can_do_its_work(
    tmp_path: Path,
    roles: Roles,
    postgres_url: str,
    seats_url: str,
    brokers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("services.md", tmp_path, "python")
    monkeypatch.chdir(tmp_path)  # where the service is imported from
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "seats", raising=False)

    def outbox(*command: str, broker: str = "", role: str = "", code: int = 0) -> None:
        environ = {
            "OUTBOX_EXCHANGE": "openevent",
            "DATABASE_URL": roles.url(role, postgres_url) if role else postgres_url,
            "CONSUMER_DATABASE_URL": roles.url(role, seats_url) if role else seats_url,
            **({"BROKER_URL": brokers[broker]} if broker else {}),
        }
        done = Commands(environ)(*command)
        assert done.exit_code == code, f"outbox {' '.join(command)}: {done.output}"

    outbox("migrate")
    outbox("consumer", "migrate", "seats:service")
    roles.grant(postgres_url, "outbox.sql")
    roles.grant(seats_url, "seats.sql")
    outbox("topology", "apply", broker="deployment")
    outbox("consumer", "run", "seats:service", "--drain", broker="service", role="seats")
    send(roles.url("app", postgres_url))
    outbox("relay", "--drain", broker="relay", role="relay", code=75)  # two stay: nobody listens
    outbox("consumer", "run", "seats:service", "--drain", broker="service", role="seats")
    assert column(seats_url, "SELECT tickets FROM sold") == [3]
    again, never = column(
        postgres_url, "SELECT m.message_id FROM outbox_message m JOIN outbox_pending p ON m.id = p.message_row ORDER BY p.id"
    )
    for command in ("status", "list", f"show {never}", f"requeue {again} --yes", f"discard {never} --reason test --yes"):
        outbox(*command.split(), role="operator")
    (parked,) = column(seats_url, "SELECT message_id FROM consumer_parked")
    for command in ("status", "parked list", f"parked requeue {parked} --yes", f"parked discard {parked} --reason test --yes"):
        verb, *rest = command.split()
        name = [verb, "seats:service", *rest] if verb == "status" else [verb, rest[0], "seats:service", *rest[1:]]
        outbox("consumer", *name, role="seats")
    assert column(postgres_url, "SELECT state FROM outbox_pending ORDER BY id") == ["pending", "discarded"]
    for role, forbidden in (("app", "DELETE FROM outbox_pending"), ("relay", "DELETE FROM outbox_message")):
        with pytest.raises(ProgrammingError, match="permission denied"):
            column(roles.url(role, postgres_url), forbidden)


def send(url: str) -> None:
    """Commit as the application does: one message, then some, of which two interest nobody and one can't be applied."""
    engine = sa.create_engine(url)
    outbox = Outbox(source="/shop", session=lambda: None)
    with Session(engine) as session, session.begin():
        outbox.send("ticket.sold", {"event_id": 7}, key="event:7", session=session)
    with Session(engine) as session, session.begin():
        for _ in range(2):
            outbox.send("ticket.sold", {"event_id": 7}, key="event:7", session=session)
        for _ in range(2):
            outbox.send("nobody.listens", {}, session=session)
        outbox.send("ticket.sold", {}, session=session)
    engine.dispose()


def column(url: str, query: str) -> list[Any]:
    engine = sa.create_engine(url)
    try:
        with engine.connect() as connection:
            return list(connection.execute(sa.text(query)).scalars())
    finally:
        engine.dispose()
