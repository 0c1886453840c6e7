"""What the lab plays on: two PostgreSQL servers, a RabbitMQ node, relays, a service and writers, all private."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit.netns import Machine
from tests.kit.pgbouncer import PgBouncer
from tests.kit.processes import ROOT, Process
from tests.kit.recorder import NAME
from tests.kit.replication import FailingOverPostgres
from tests.kit.servers import PostgresServer, RabbitServer
from tests.kit.waiting import eventually
from tests.kit.world import EXCHANGE, rabbit_world
from tests.lab.tap import Tap
from tests.lab.topics import FULL, SILENT, TAPPED, UNBOUND

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from tests.kit.world import World

#: Long enough for a busy machine with two cores, short enough that an hour holds many faults.
_ENV = {"OUTBOX_LEASE": "6s", "OUTBOX_CONFIRM_TIMEOUT": "4s", "OUTBOX_WINDOW": "500", "OUTBOX_BATCH_SIZE": "200"}
#: Seconds between two transactions of one writer, at most.
_PACE = "0.25"


class Stage:
    """The servers, and the processes of the project on them; a context manager that ends them all."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._closing = ExitStack()
        self._folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="outbox-lab-")))
        self._numbers = itertools.count(1)
        #: A second machine, with a cable that can be pulled: every second relay and service runs there.
        self.machine = self._closing.enter_context(Machine())
        here_and_there = f"127.0.0.1,{self.machine.outer_address}"
        #: The outbox's database; the service has another server, which does not go back in time.
        self.postgres = FailingOverPostgres(max_connections=100, listen_addresses=here_and_there)
        self.service_postgres = PostgresServer(listen_addresses=here_and_there)
        self.rabbit = RabbitServer(also_listen=self.machine.outer_address)
        self.pooler: PgBouncer
        self.world: World
        self.relays: list[Process] = []
        self.services: list[Process] = []
        self.writers: list[Process] = []
        #: Everything ever started, for its last words.
        self.started: list[Process] = []

    def __enter__(self) -> Self:
        for server in (self.postgres, self.service_postgres, self.rabbit):
            self._closing.callback(server.discard)
            server.start()
        for server in (self.postgres, self.service_postgres):
            server.admit(self.machine.network)
        self.pooler = PgBouncer(self.postgres.url, pool_size=10)
        self._closing.callback(self.pooler.discard)
        self.pooler.start()
        url = self._closing.enter_context(self.postgres.database())
        service_url = self._closing.enter_context(self.service_postgres.database())
        self.world = rabbit_world(self._spawn, url, self.rabbit.url, service_url, **_ENV)
        self.world.prepare(tap=())
        self.declare()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for process in self.started:
            process.kill()
        self._closing.close()

    @property
    def database(self) -> str:
        """The name of the outbox's database."""
        return self.world.env["DATABASE_URL"].rpartition("/")[2]

    def _spawn(self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Process:
        process = Process(*command, log=self._folder / f"{next(self._numbers)}.log", env=env, cwd=cwd)
        self.started.append(process)
        return process

    def declare(self) -> None:
        """Make the queues that the lab needs, with their bindings; again after the exchange was deleted."""
        with self.world.channel() as channel:
            Tap.declare(channel, TAPPED)
        for topic in (SILENT, FULL):
            self.make_queue(topic)

    def make_queue(self, topic: str, **arguments: object) -> None:
        """Make the queue that only *topic* is bound to, anew."""
        with self.world.channel() as channel:
            channel.queue_delete(topic)
            channel.queue_declare(topic, durable=True, arguments={"x-queue-type": "quorum", **arguments})
            channel.queue_bind(topic, EXCHANGE, topic)

    def hear(self, *, unbound: bool) -> None:
        """Let the tap hear UNBOUND, or not."""
        with self.world.channel() as channel:
            (channel.queue_bind if unbound else channel.queue_unbind)(Tap.QUEUE, EXCHANGE, UNBOUND)

    # --- processes ---

    def start(self) -> None:
        """Start what an installation runs: two relays, two processes of the service, two writers."""
        self.relays = [self._new_relay(0), self._new_relay(1)]
        self.services = [self._new_service(0), self._new_service(1)]
        self.writers = [self.world.start("python", "-m", "tests.kit.writers", str(self._chance.random()), _PACE) for _ in "12"]
        for writer in self.writers:
            writer.wait_for_line("writing")

    def _new_relay(self, place: int) -> Process:
        """A relay: the first one behind the pooler, the second on the other machine."""
        if place:
            return self._elsewhere("outbox", "relay")
        return self.world.relay(DATABASE_URL=self.pooler.through(self.world.env["DATABASE_URL"]))

    def _new_service(self, place: int) -> Process:
        """A process of the service; the second one on the other machine."""
        return self._elsewhere("outbox", "consumer", "run", NAME) if place else self.world.service()

    def _elsewhere(self, program: str, *arguments: str) -> Process:
        """Start one of the project's commands on the other machine, where the servers have another address."""
        there = {
            name: self.world.env[name].replace("127.0.0.1", self.machine.outer_address)
            for name in ("DATABASE_URL", "BROKER_URL", "CONSUMER_DATABASE_URL")
        }
        beside = str(Path(sys.executable).parent / program)
        return self.world.start(*self.machine.inside, beside, *arguments, **there)

    def replace(self, victim: Process) -> None:
        """Put a new process where *victim* was, as a supervisor does."""
        for processes, new in ((self.relays, self._new_relay), (self.services, self._new_service)):
            if victim in processes:
                place = processes.index(victim)
                processes[place] = new(place)

    def fallen(self) -> list[str]:
        """Return what ended by itself and should not have; each is started again, as a supervisor would."""
        ended = []
        for process in [each for each in (*self.relays, *self.services) if each.exit_code is not None]:
            ended.append(f"{process!r}: {process.output.splitlines()[-1:]}")
            self.replace(process)
        return ended

    # --- the end ---

    def heal(self) -> None:
        """Everything as it was at the start, whatever a fault left behind."""
        for server in (self.postgres, self.service_postgres, self.rabbit, self.pooler):
            if not server.running:
                server.start()
        with contextlib.suppress(AssertionError):
            self.rabbit.clear_memory_alarm()

    def end_writers(self) -> None:
        for writer in self.writers:
            writer.terminate()
        for writer in self.writers:
            assert writer.wait(60) == 0, writer.output

    def drain(self, timeout: float) -> None:
        """Wait until nothing is pending and everything was applied. A run that did not drain proves nothing."""

        def quiet() -> bool:
            status = self.world.status()
            return bool(not status["pending"] + status["retrying"] + status["unroutable"] and not self.world.backlog())

        eventually(quiet, timeout, "everything to be sent and applied", interval=1.0)

    def bind_again(self) -> None:
        """Make the exchange, and all bindings that were lost with it."""
        self.world.ask.fine("topology", "apply")
        self.world.ask.fine("consumer", "topology", NAME, "--apply")
        self.declare()

    def keep_logs(self, folder: Path) -> None:
        """Copy what all processes printed into *folder*."""
        shutil.copytree(self._folder, folder, dirs_exist_ok=True)

    def end(self) -> None:
        for process in (*self.relays, *self.services):
            process.terminate()
        for process in (*self.relays, *self.services):
            assert process.wait(60) == 0, process.output
