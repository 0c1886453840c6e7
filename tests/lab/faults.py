"""The faults of the lab: each is held while its block runs, and healed at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psycopg

from tests.kit.waiting import eventually
from tests.kit.world import EXCHANGE
from tests.lab.topics import FULL, SILENT, UNBOUND

if TYPE_CHECKING:
    from tests.kit.processes import Process
    from tests.kit.server_process import ServerProcess
    from tests.lab.run import Run


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault by name."""

    name: str
    hold: Callable[[Run], AbstractContextManager[None]]
    #: It must disturb nobody else: the canary keeps its latency.
    contained: bool
    #: How many windows of duplicates it explains.
    windows: int

    @property
    def sentence(self) -> str:
        """The fault in words."""
        return self.name.replace("_", " ")


#: All faults by name, in the order of this file.
FAULTS: dict[str, Fault] = {}


def _fault(*, contained: bool = False, windows: int = 0) -> Callable[[Callable[[Run], Iterator[None]]], None]:
    def register(hold: Callable[[Run], Iterator[None]]) -> None:
        FAULTS[hold.__name__] = Fault(hold.__name__, contextmanager(hold), contained, windows)

    return register


# --- one queue, one row, one person: nobody else notices --------------------------------------------------------------------


@_fault(contained=True, windows=1)
def a_queue_that_withholds_its_confirms(run: Run) -> Iterator[None]:
    """As one without a majority does: its process takes nothing from its mailbox."""
    run.canary.trouble.add(SILENT)
    run.stage.rabbit.ctl("eval", _queue_process("sys:suspend", SILENT))
    yield
    run.canary.trouble.discard(SILENT)
    run.stage.rabbit.ctl("eval", _queue_process("sys:resume", SILENT))


@_fault(contained=True, windows=1)
def a_queue_that_is_full(run: Run) -> Iterator[None]:
    """It refuses whatever comes."""
    run.stage.make_queue(FULL, **{"x-max-length": 1, "x-overflow": "reject-publish"})
    run.canary.trouble.add(FULL)
    yield
    run.canary.trouble.discard(FULL)
    run.stage.make_queue(FULL)


@_fault(contained=True)
def a_topic_that_nobody_hears(run: Run) -> Iterator[None]:
    """No queue is bound to it."""
    run.stage.hear(unbound=False)
    run.canary.trouble.add(UNBOUND)
    yield
    run.canary.trouble.discard(UNBOUND)
    run.stage.hear(unbound=True)


@_fault(contained=True, windows=1)
def rows_that_a_person_has_locked(run: Run) -> Iterator[None]:
    """Rows that wait for a retry are locked by somebody's open transaction, and then their queue takes messages again."""
    run.stage.make_queue(FULL, **{"x-max-length": 1, "x-overflow": "reject-publish"})
    run.canary.trouble.add(FULL)
    eventually(lambda: run.stage.world.status()["retrying"] > 0, 60, "rows to wait for a retry")
    with psycopg.connect(run.outbox_dsn) as person:
        person.execute("SELECT id FROM outbox_pending WHERE state = 'retrying' FOR UPDATE")
        run.stage.make_queue(FULL)
        run.canary.trouble.discard(FULL)
        yield


@_fault(contained=True)
def a_snapshot_that_is_held(run: Run) -> Iterator[None]:
    """A transaction that only reads, and does not end."""
    with psycopg.connect(run.outbox_dsn) as person:
        person.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        person.execute("SELECT count(*) FROM outbox_pending")
        yield


@_fault(contained=True)
def the_database_of_a_service_is_away(run: Run) -> Iterator[None]:
    """It crashes, and comes back at the end."""
    run.stage.service_postgres.kill()
    yield
    run.stage.service_postgres.start()


@_fault(contained=True)
def a_service_is_killed(run: Run) -> Iterator[None]:
    """And replaced at once."""
    victim = run.chance.choice(run.stage.services)
    victim.kill()
    run.stage.replace(victim)
    yield


@_fault(contained=True)
def a_service_hangs_and_goes_on(run: Run) -> Iterator[None]:
    """SIGSTOP, then SIGCONT."""
    victim = run.chance.choice(run.stage.services)
    victim.stop()
    yield
    victim.cont()


@_fault(contained=True)
def a_service_is_restarted(run: Run) -> Iterator[None]:
    """SIGTERM, as in a rolling deployment."""
    _restart(run, run.chance.choice(run.stage.services))
    yield


# --- relays -----------------------------------------------------------------------------------------------------------------


@_fault(windows=1)
def a_relay_is_killed(run: Run) -> Iterator[None]:
    """SIGKILL, whichever it is; a new one comes."""
    victim = run.chance.choice(run.stage.relays)
    victim.kill()
    run.stage.replace(victim)
    yield


@_fault(windows=2)
def a_relay_hangs_and_goes_on(run: Run) -> Iterator[None]:
    """SIGSTOP for longer than its lease, then SIGCONT."""
    victim = run.chance.choice(run.stage.relays)
    victim.stop()
    yield
    victim.cont()


@_fault()
def a_relay_is_restarted(run: Run) -> Iterator[None]:
    """SIGTERM, as in a rolling deployment."""
    _restart(run, run.chance.choice(run.stage.relays))
    yield


def _restart(run: Run, victim: Process) -> None:
    victim.terminate()
    assert victim.wait(60) == 0, victim.output
    run.stage.replace(victim)


@_fault(windows=2)
def the_network_of_a_machine_is_lost(run: Run) -> Iterator[None]:
    """A relay and a process of the service can't reach anybody, and no end of their connections is told."""
    run.stage.machine.pull()
    yield
    run.stage.machine.plug()


@_fault(windows=2)
def a_pooler_hangs(run: Run) -> Iterator[None]:
    """The one between a relay and the database keeps its connections and answers nothing."""
    yield from _hanging(run.stage.pooler)


@_fault(windows=1)
def a_pooler_is_restarted(run: Run) -> Iterator[None]:
    """It crashes, and is there again at the end."""
    run.stage.pooler.kill()
    yield
    run.stage.pooler.start()


# --- the broker -------------------------------------------------------------------------------------------------------------


@_fault(windows=1)
def the_broker_crashes(run: Run) -> Iterator[None]:
    """SIGKILL, and a restart at the end."""
    run.stage.rabbit.kill()
    yield
    run.stage.rabbit.start()


@_fault(windows=2)
def the_broker_hangs(run: Run) -> Iterator[None]:
    """It keeps its connections and answers nothing."""
    yield from _hanging(run.stage.rabbit)


@_fault(windows=1)
def the_broker_closes_all_connections(run: Run) -> Iterator[None]:
    """Ours and everybody's."""
    run.stage.rabbit.close_all_connections()
    yield


@_fault(windows=2)
def the_broker_is_out_of_memory(run: Run) -> Iterator[None]:
    """It reads nothing from publishers."""
    run.stage.rabbit.set_memory_alarm()
    yield
    run.stage.rabbit.clear_memory_alarm()


@_fault(windows=1)
def the_exchange_is_deleted(run: Run) -> Iterator[None]:
    """And made anew at the end: all bindings are gone with it; they are made again before a relay is let in."""
    with run.stage.world.channel() as channel:
        channel.exchange_delete(EXCHANGE)
    yield
    run.stage.bind_again()


# --- the outbox's database --------------------------------------------------------------------------------------------------


@_fault(windows=1)
def the_database_crashes(run: Run) -> Iterator[None]:
    """And recovers at the end."""
    run.stage.postgres.kill()
    yield
    run.stage.postgres.start()


@_fault(windows=2)
def the_database_hangs(run: Run) -> Iterator[None]:
    """It keeps its connections and answers nothing."""
    yield from _hanging(run.stage.postgres)


@_fault(windows=1)
def the_database_cuts_all_connections(run: Run) -> Iterator[None]:
    """An administrator's pg_terminate_backend."""
    run.stage.postgres.terminate_backends()
    yield


@_fault(windows=1)
def the_database_takes_no_writes(run: Run) -> Iterator[None]:
    """As a primary that was demoted."""
    run.administer(f'ALTER DATABASE "{run.stage.database}" SET default_transaction_read_only = on')
    run.stage.postgres.terminate_backends()
    yield
    run.administer(f'ALTER DATABASE "{run.stage.database}" RESET default_transaction_read_only')
    run.stage.postgres.terminate_backends()


@_fault(windows=4)
def a_standby_that_lags_is_promoted(run: Run) -> Iterator[None]:
    """The primary crashes; what it committed in the last moments is gone. Relays and services live on."""
    run.keep_a_copy()
    run.wait(run.chance.uniform(0.5, 3.0))
    run.go_back_in_time()
    yield


@_fault(windows=4)
def a_standby_is_promoted_while_answers_are_due(run: Run) -> Iterator[None]:
    """As many messages as may be are in flight when the primary crashes, and are answered after its numbers began again."""
    run.keep_a_copy()
    run.stage.rabbit.suspend()
    run.wait(run.chance.uniform(0.5, 2.0))
    run.go_back_in_time()
    run.wait(run.chance.uniform(0.0, 1.0))
    run.stage.rabbit.resume()
    yield


@_fault(windows=4)
def a_backup_is_restored(run: Run) -> Iterator[None]:
    """The database comes back as it was at the beginning of the fault."""
    run.keep_a_copy()
    yield
    run.go_back_in_time()


def _hanging(server: ServerProcess) -> Iterator[None]:
    server.suspend()
    yield
    server.resume()


def _queue_process(call: str, queue: str) -> str:
    """Erlang that applies *call* to the process of a quorum queue in the virtual host `/`."""
    return (
        f'{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)), '
        f"{{Name, _}} = amqqueue:get_pid(Q), {call}(Name)."
    )
