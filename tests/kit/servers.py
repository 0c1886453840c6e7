"""PostgreSQL and RabbitMQ servers of the tests' own: free ports, temporary folders, nothing shared with the machine's.

`PostgresServer` and `RabbitServer` can be killed and started again on the same ports and data. `ExternalPostgres` and
`ExternalRabbit` offer what ordinary tests need on servers somebody else runs (`TEST_DATABASE_URL`, `TEST_BROKER_URL`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import uuid
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from tests.kit.guardian import guardian
from tests.kit.management import Management
from tests.kit.ports import accepts, free_port
from tests.kit.server_process import STOP_SECONDS, ServerMissingError, ServerProcess, first_folder_with
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class PostgresServer(ServerProcess):
    """A private PostgreSQL cluster; trusts every loopback connection.

    fsync is off, which only an operating system's crash could tell: what was committed survives kill().
    """

    # "Immediate shutdown": a crash for the data, but the postmaster still removes its shared memory.
    last_signal = signal.SIGQUIT

    def __init__(self, **settings: str | int) -> None:
        """*settings* are more of `postgresql.conf`, e.g. `max_connections=20`."""
        self._bin = self.programs()
        super().__init__("postgres", system_user="postgres")
        self.port = free_port()
        self._env = {"PATH": f"{self._bin}:{os.environ.get('PATH', os.defpath)}", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
        self._data = self.folder / "data"
        self._settings: dict[str, str | int] = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": self.port,
            "fsync": "off",
            "full_page_writes": "off",
            "shared_buffers": "64MB",
            "max_connections": 200,
            "log_line_prefix": "%m [%p] %d ",
            **settings,
        }

    @staticmethod
    def programs() -> Path:
        """The folder of initdb and postgres, the newest first. Raises ServerMissingError."""
        versions = sorted(glob("/usr/lib/postgresql/*/bin"), key=lambda path: float(path.split("/")[4]), reverse=True)
        others = [*glob("/usr/pgsql-*/bin"), *glob("/opt/homebrew/opt/postgresql*/bin")]
        path = os.environ.get("PATH", os.defpath).split(os.pathsep)
        found = first_folder_with([*versions, *others, *path], ["initdb", "postgres"])
        if found is None:
            raise ServerMissingError(
                "no PostgreSQL (initdb, postgres) on this machine: install it (Debian: apt-get install postgresql; "
                "macOS: brew install postgresql) or set TEST_DATABASE_URL"
            )
        return found

    def start(self) -> None:
        """Boot, on the first call also create the cluster; returns when queries are answered."""
        if not self._data.exists():
            options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
            self._run([self._bin / "initdb", "-D", self._data, *options], self._env)
        arguments = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        self._launch([self._bin / "postgres", "-D", self._data, *arguments], self._env)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.dsn("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Shut down in order, cutting open connections ("fast")."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Crash: connections are cut, open transactions are gone, recovery runs at the next start()."""
        if self.running:
            self.resume()
        self._end(signal.SIGQUIT)

    def dsn(self, database: str) -> str:
        """The libpq URL of *database*."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the maintenance database; tests want database()."""
        return _sqlalchemy_url(self.dsn("postgres"))

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The SQLAlchemy URL of a new, empty database."""
        with _new_database(self.dsn("postgres")) as dsn:
            yield _sqlalchemy_url(dsn)

    def admit(self, network: str) -> None:
        """Trust the clients of *network*, too (`listen_addresses` must name an address that they reach)."""
        with (self._data / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {network} trust\n")
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute("SELECT pg_reload_conf()")

    def terminate_backends(self) -> int:
        """Cut every client's connection, the server stays up; returns how many."""
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            return connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ).rowcount


class ExternalPostgres:
    """A server that runs anyway. Its user must be allowed to create databases."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._dsn = urlunsplit(urlsplit(url)._replace(scheme="postgresql"))

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The SQLAlchemy URL of a new, empty database."""
        with _new_database(self._dsn) as dsn:
            yield _sqlalchemy_url(dsn)


def _sqlalchemy_url(dsn: str) -> str:
    return urlunsplit(urlsplit(dsn)._replace(scheme="postgresql+psycopg"))


@contextlib.contextmanager
def _new_database(dsn: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield urlunsplit(urlsplit(dsn)._replace(path=f"/{name}"))
    # A test may have left its server dead; then the database goes with the server's folder.
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


class RabbitServer(ServerProcess):
    """A private RabbitMQ node with the management plugin, an Erlang port mapper of its own, and guest/guest."""

    def __init__(self, also_listen: str = "") -> None:
        """*also_listen*: an address beside 127.0.0.1; guest may come from there, too."""
        self._sbin = self.programs()
        super().__init__("rabbitmq", system_user="rabbitmq")
        self.port, self._management_port, distribution_port, epmd_port = (free_port() for _ in range(4))
        self.management = Management(self.management_url)
        self.host = f"127.0.0.1:{self.port}"
        self._epmd: subprocess.Popen[bytes] | None = None
        self._alarmed = False
        self._silenced: set[str] = set()
        self._epmd_port = epmd_port
        configuration = self._write(
            "rabbitmq.conf",
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "management.tcp.ip = 127.0.0.1\n"
            f"management.tcp.port = {self._management_port}\n"
            "disk_free_limit.absolute = 50MB\n"
            "raft.wal_max_size_bytes = 33554432\n"
            "log.file.level = info\n"
            + (f"listeners.tcp.2 = {also_listen}:{self.port}\nloopback_users = none\n" if also_listen else ""),
        )
        self._write(".erlang.cookie", uuid.uuid4().hex, mode=0o400)
        for empty in ("conf.d", "mnesia", "log"):
            (self.folder / empty).mkdir()
            self._own(self.folder / empty)
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        self._env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"outbox{self.port}@localhost",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution_port),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(configuration),
            "RABBITMQ_CONFIG_FILES": str(self.folder / "conf.d"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._write("enabled_plugins", "[rabbitmq_management].\n")),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "rabbitmq.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            "RABBITMQ_CTL_ERL_ARGS": loopback,
        }

    @staticmethod
    def programs() -> Path:
        """The folder of rabbitmq-server and rabbitmqctl. Raises ServerMissingError."""
        # Debian's wrapper in /usr/sbin changes the user and boots the machine's own node, whatever it was asked.
        path = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder != "/usr/sbin"]
        packaged = sorted(glob("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin"), reverse=True)
        found = first_folder_with([*packaged, "/opt/homebrew/opt/rabbitmq/sbin", *path], ["rabbitmq-server", "rabbitmqctl"])
        if found is None or shutil.which("epmd") is None:
            raise ServerMissingError(
                "no RabbitMQ (rabbitmq-server, rabbitmqctl, epmd) on this machine: install it (Debian: apt-get install "
                "rabbitmq-server; macOS: brew install rabbitmq) or set TEST_BROKER_URL and TEST_BROKER_MANAGEMENT_URL"
            )
        return found

    def start(self) -> None:
        """Boot (about five seconds); returns when connections and the management API are answered."""
        self._start_port_mapper()
        # Erlang sizes a table by the limit of open files; an unlimited one costs gigabytes and seconds.
        script = 'ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"; exec "$0"'
        self._launch(["/bin/sh", "-c", script, self._sbin / "rabbitmq-server"], self._env)

    def _start_port_mapper(self) -> None:
        """Our own epmd: one that the node starts itself would be a daemon that outlives it."""
        if self._epmd is not None:
            return
        epmd = shutil.which("epmd")
        assert epmd is not None
        self._epmd = self._spawn([epmd], self._env, self.folder / "epmd.log")
        guardian().watch(self._epmd.pid)
        eventually(lambda: accepts(self._epmd_port), what="epmd to start")

    def _answers(self) -> bool:
        return accepts(self.port) and self.management.alive()

    def stop(self) -> None:
        """Shut down in order: clients see `connection.close` (320)."""
        self._end(signal.SIGTERM)
        self._alarmed = False
        self._silenced.clear()

    def kill(self) -> None:
        """Crash: SIGKILL to the Erlang machine, with the queues' directory and the bindings on disk.

        RabbitMQ writes that directory up to a second after a quorum queue was declared; killed before, 3.10 starts the
        queue again as an empty one that never elects a leader. No test is about that second.
        """
        if self.running and not self._suspended:
            self.ctl("eval", "lists:foreach(fun dets:sync/1, dets:all()), mnesia:sync_log().")
        self._crash()

    def _crash(self) -> None:
        self._end(signal.SIGKILL, whole_group=True)
        self._alarmed = False
        self._silenced.clear()

    def discard(self) -> None:
        """End node and port mapper, and remove the data."""
        self._crash()
        super().discard()
        epmd, self._epmd = self._epmd, None
        if epmd is not None:
            epmd.kill()
            epmd.wait(STOP_SECONDS)
            guardian().spare(epmd.pid)

    @property
    def url(self) -> str:
        """The AMQP URL of the virtual host `/`; tests want vhost()."""
        return f"amqp://guest:guest@{self.host}/%2F"

    @property
    def management_url(self) -> str:
        """The base URL of the management API, with user and password."""
        return f"http://guest:guest@127.0.0.1:{self._management_port}"

    @contextlib.contextmanager
    def vhost(self) -> Iterator[str]:
        """The AMQP URL of a new virtual host."""
        with self.management.new_vhost() as name:
            yield f"amqp://guest:guest@{self.host}/{name}"

    def ctl(self, *arguments: str) -> str:
        """What `rabbitmqctl` prints; takes a second or two, most of it Erlang's start."""
        return self._run([self._sbin / "rabbitmqctl", "--quiet", *arguments], self._env)

    def close_all_connections(self, reason: str = "closed by a test") -> None:
        """Close every client connection from the broker's side."""
        self.ctl("close_all_connections", reason)

    def set_memory_alarm(self) -> None:
        """Block publishers as if memory ran out: the broker reads no more from a connection that published."""
        self._alarmed = True
        self.ctl("set_vm_memory_high_watermark", "absolute", "1")

    def clear_memory_alarm(self) -> None:
        """Back to the usual limit: publishers are unblocked."""
        self.ctl("set_vm_memory_high_watermark", "0.4")
        self._alarmed = False

    def silence(self, queue: str) -> None:
        """Let a quorum queue of the virtual host `/` say nothing: confirms are withheld, as when it has lost its majority."""
        self.ctl("eval", f"sys:suspend(whereis('%2F_{queue}')).")
        self._silenced.add(queue)

    def answer_again(self, queue: str) -> None:
        """Let *queue* work off what it was given meanwhile."""
        self.ctl("eval", f"sys:resume(whereis('%2F_{queue}')).")
        self._silenced.discard(queue)

    def heal(self) -> None:
        """As after the first start(), whatever was done to it; much cheaper than another node."""
        if not self.running:
            self._crash()  # forgets a process that ended without our doing
            self.start()
        self.resume()
        if self._alarmed:
            self.clear_memory_alarm()
        for queue in list(self._silenced):
            self.answer_again(queue)
        self.management.empty()


class ExternalRabbit:
    """A broker that runs anyway; its management API makes a virtual host per test."""

    def __init__(self, url: str, management_url: str | None = None) -> None:
        self.url = url
        parts = urlsplit(url)
        credentials = parts.netloc.rpartition("@")[0] or "guest:guest"
        self.management_url = management_url or f"http://{credentials}@{parts.hostname}:15672"
        self.management = Management(self.management_url)
        if not self.management.alive():
            raise ServerMissingError(
                f"the management API at {parts.hostname}:{urlsplit(self.management_url).port} does not answer, and "
                "each test needs a virtual host: enable rabbitmq_management, or set TEST_BROKER_MANAGEMENT_URL"
            )
        self._user = unquote(parts.username or "guest")

    @contextlib.contextmanager
    def vhost(self) -> Iterator[str]:
        """The AMQP URL of a new virtual host."""
        with self.management.new_vhost(self._user) as name:
            yield urlunsplit(urlsplit(self.url)._replace(path="/" + quote(name, safe="")))


@contextlib.contextmanager
def shared_postgres(environ: Mapping[str, str]) -> Iterator[PostgresServer | ExternalPostgres]:
    """The PostgreSQL that `TEST_DATABASE_URL` names, else one of our own until the end. Raises ServerMissingError."""
    if url := environ.get("TEST_DATABASE_URL"):
        yield ExternalPostgres(url)
        return
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.discard()


@contextlib.contextmanager
def shared_rabbit(environ: Mapping[str, str]) -> Iterator[RabbitServer | ExternalRabbit]:
    """The RabbitMQ that `TEST_BROKER_URL` names, else one of our own until the end. Raises ServerMissingError."""
    if url := environ.get("TEST_BROKER_URL"):
        yield ExternalRabbit(url, environ.get("TEST_BROKER_MANAGEMENT_URL"))
        return
    server = RabbitServer()
    try:
        server.start()
        yield server
    finally:
        server.discard()
