"""Fixtures that hand out servers, databases and virtual hosts. A server starts when the first test asks for it.

`TEST_DATABASE_URL` and `TEST_BROKER_URL` (with `TEST_BROKER_MANAGEMENT_URL`) name servers to use instead of our own.
Each folder of tests holds an `__init__.py`, so that two files in different folders may share a name.
"""

from __future__ import annotations

import os
import random
import signal
import uuid
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Protocol

import hypothesis
import pytest
from sqlalchemy import create_engine

from tests.kit.netns import Machine
from tests.kit.pgbouncer import PgBouncer
from tests.kit.processes import ROOT, Process
from tests.kit.server_process import ServerMissingError
from tests.kit.servers import PostgresServer, RabbitServer, shared_postgres, shared_rabbit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from typing import NoReturn

    from tests.kit.servers import ExternalPostgres, ExternalRabbit

#: A test that asks for one of these, itself or through another fixture, gets the marker.
_MARKERS = {
    "postgres_server": pytest.mark.postgres,
    "private_postgres": pytest.mark.postgres,
    "rabbit_server": pytest.mark.rabbitmq,
    "private_rabbit": pytest.mark.rabbitmq,
}


class Spawn(Protocol):
    """The type of the fixture `spawn`."""

    def __call__(self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process: ...


# How long an example takes to draw or to run says how busy the machine is, not whether the code is right.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")

# A shell that starts pytest in the background lets it ignore Ctrl-C, and every process of the tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

#: What tests decide by chance follows from this number alone, so that a run can be repeated.
SEED = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(10**6))
os.environ["TEST_SEED"] = str(SEED)  # for the children of a run that is spread over processes


def pytest_report_header() -> str:
    return f"seed: {SEED} (`make chaos SEED={SEED}` makes the same choices again)"


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_in_the_checkout() -> Iterator[None]:
    """`make demo` refuses to delete an `instance/` that it did not make: no test may make one."""
    instance = ROOT / "instance"
    was_there = instance.exists()
    yield
    assert was_there or not instance.exists(), f"a test wrote into {instance}; give its processes folders of their own"


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """The dice of this test: the same in every run with the same seed, whatever other tests run."""
    return random.Random(f"{SEED} {request.node.nodeid}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for fixture, marker in _MARKERS.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


def _unavailable(missing: ServerMissingError) -> NoReturn:
    """Loud on a laptop, fatal where the whole suite is expected to run."""
    if os.environ.get("CI", "").lower() in ("true", "1"):
        pytest.fail(f"{missing} (a missing server fails the run, because CI is set)", pytrace=False)
    pytest.skip(str(missing))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer | ExternalPostgres]:
    """The PostgreSQL that ordinary tests share; none of them may stop it."""
    with ExitStack() as running:
        try:
            server = running.enter_context(shared_postgres(os.environ))
        except ServerMissingError as missing:
            _unavailable(missing)
        yield server


@pytest.fixture(scope="session")
def rabbit_server() -> Iterator[RabbitServer | ExternalRabbit]:
    """The RabbitMQ that ordinary tests share; none of them may stop it, block it or close others' connections."""
    with ExitStack() as running:
        try:
            server = running.enter_context(shared_rabbit(os.environ))
        except ServerMissingError as missing:
            _unavailable(missing)
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[str]:
    """The URL of a new, empty PostgreSQL database."""
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def make_encoded(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[Callable[[str], str]]:
    """Make an empty database of an encoding and return its URL."""
    server, made = create_engine(postgres_server.url, isolation_level="AUTOCOMMIT"), []

    def make(encoding: str) -> str:
        name = f"encoded_{uuid.uuid4().hex[:12]}"
        with server.connect() as connection:
            connection.exec_driver_sql(
                f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
            )
        made.append(name)
        return str(server.url.set(database=name).render_as_string(hide_password=False))

    yield make
    with server.connect() as connection:
        for name in made:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a new SQLite file."""
    return f"sqlite:///{tmp_path / 'outbox.db'}"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database: the test runs once per kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def broker_url(rabbit_server: RabbitServer | ExternalRabbit) -> Iterator[str]:
    """The AMQP URL of a new virtual host."""
    with rabbit_server.vhost() as url:
        yield url


@pytest.fixture
def private_postgres() -> Iterator[Callable[..., PostgresServer]]:
    """Make a started PostgreSQL that belongs to this test alone: it may stop, kill and suspend it."""
    with ExitStack() as servers:

        def make(**settings: str | int) -> PostgresServer:
            try:
                server = PostgresServer(**settings)
            except ServerMissingError as missing:
                _unavailable(missing)
            servers.callback(server.discard)
            server.start()
            return server

        yield make


@pytest.fixture(scope="session")
def pgbouncer(postgres_server: PostgresServer | ExternalPostgres) -> Iterator[PgBouncer]:
    """A pooler in transaction mode before the PostgreSQL that ordinary tests share."""
    try:
        server = PgBouncer(postgres_server.url)
    except ServerMissingError as missing:
        _unavailable(missing)
    server.start()
    yield server
    server.discard()


@pytest.fixture
def pooled_url(pgbouncer: PgBouncer, postgres_url: str) -> str:
    """The URL of a new, empty PostgreSQL database, through the pooler."""
    return pgbouncer.through(postgres_url)


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A second machine, at the other end of a cable that can be pulled."""
    with ExitStack() as running:
        try:
            made = running.enter_context(Machine())
        except ServerMissingError as missing:
            _unavailable(missing)
        yield made


@pytest.fixture(scope="session")
def _idle_rabbits() -> Iterator[list[RabbitServer]]:
    """Nodes that were lent to a test: starting one again, or merely emptying it, is quicker than booting another."""
    idle: list[RabbitServer] = []
    yield idle
    for server in idle:
        server.discard()


@pytest.fixture
def private_rabbit(_idle_rabbits: list[RabbitServer]) -> Iterator[Callable[[], RabbitServer]]:
    """Lend a started, empty RabbitMQ to this test alone: it may stop, kill, block and suspend it, and leave it so."""
    lent: list[RabbitServer] = []

    def lend() -> RabbitServer:
        try:
            server = _idle_rabbits.pop() if _idle_rabbits else RabbitServer()
        except ServerMissingError as missing:
            _unavailable(missing)
        lent.append(server)
        server.heal()
        return server

    yield lend
    _idle_rabbits.extend(lent)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Start commands (`spawn("outbox", "relay", env=…)`) that die with the test; their output is shown if it fails."""
    numbers = count(1)
    with ExitStack() as processes:

        def start(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
            process = Process(*command, log=tmp_path / f"process-{next(numbers)}.log", env=env, cwd=cwd)
            # pytest shows what a fixture prints only for tests that fail.
            processes.callback(lambda: print(f"--- {process!r} printed:\n{process.output[-10_000:]}"))
            processes.enter_context(process)
            return process

        yield start
