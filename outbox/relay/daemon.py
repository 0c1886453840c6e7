"""The life of a relay: start before its servers are up, work, survive their loss, stop without leaving anything in doubt."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from enum import Enum, auto
from typing import TYPE_CHECKING

from outbox import database, migrations
from outbox.errors import BrokerError
from outbox.process import failpoints, stopping
from outbox.process.backoff import Backoff
from outbox.process.logs import say
from outbox.process.probes import Health, Server
from outbox.relay import open_broker, telemetry
from outbox.relay.census import Counting
from outbox.relay.commit_listener import Listener
from outbox.relay.database_health import Availability
from outbox.relay.forwarder import Forwarder, Limits
from outbox.relay.shards import Shards, boottime
from outbox.relay.verdict import Policy
from outbox.store import leases, locks, relaying
from outbox.store.wakeup import THROTTLE_SECONDS
from outbox.tables import SHARDS, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine

    from outbox.relay.broker import Broker
    from outbox.settings import Settings

log = logging.getLogger(__name__)

OK, TRY_LATER = 0, 75
#: The longest a turn waits for answers: heartbeats and signals are looked at this often.
_TURN_SECONDS = 0.25
_HEARTBEAT_SECONDS = 1.0
_FORGET_SECONDS = 3600.0
#: A loop that has not turned for this long, though no database made it wait, hangs.
_LIVE_SECONDS = 30.0
#: A database may make it wait this long, or four leases: longer than its outages take to be noticed. Then a restart helps
#: more than waiting: over a new connection the server may be there.
_LIVE_CALL_SECONDS = 60.0
_STOP_BROKER_SECONDS = 2.0
#: A relay asked to end that has not by `OUTBOX_SHUTDOWN_TIMEOUT` and this much is held up by a call that does not return.
_OVERDUE_SECONDS = _STOP_BROKER_SECONDS + 1.0
#: How long `--once` and `--drain` wait for a broker that refuses us: long enough for a service to declare the exchange.
_REFUSED_SECONDS = 5.0


class Mode(Enum):
    """When the relay ends by itself."""

    RUN = auto()
    ONCE = auto()
    DRAIN = auto()


def run(settings: Settings, *, once: bool = False, drain: bool = False) -> int:
    """Publish what is committed until SIGTERM, SIGINT or SIGHUP (or as *once* and *drain* say) and return the exit code.

    Raises ConfigurationError for settings that can't be used, SchemaError for tables that don't fit this code, and BrokerError
    for a broker that refuses us (user, password, virtual host, certificate) and did so from the beginning.
    """
    settings.require("DATABASE_URL", "BROKER_URL")
    mode = Mode.DRAIN if drain else Mode.ONCE if once else Mode.RUN
    engine = open_database(settings.database_url or "")
    try:
        relay = Relay(settings, engine, open_broker(settings), mode)
        with stopping.on_signals(relay.stop, patience_seconds=settings.shutdown_timeout_seconds + _OVERDUE_SECONDS):
            return relay.run()
    finally:
        engine.dispose()


def open_database(url: str) -> Engine:
    """Return the relay's engine: few connections, kept open, which notice a server that vanished."""
    if not url.startswith("postgresql"):
        return database.create_engine(url, role=database.Role.RELAY)
    # No ping before each use: the relay retries everything, and a ping would double the round trips. It needs no prepared
    # statements either: a generic plan would not see how many ids a read leaves out.
    return database.create_engine(url, role=database.Role.RELAY, isolation_level="READ COMMITTED", pool_pre_ping=False)


class Relay:
    """One relay process."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        broker: Broker,
        mode: Mode = Mode.RUN,
        *,
        clock: Callable[[], float] = time.monotonic,
        lease_clock: Callable[[], float] = boottime,
        patience_seconds: float | None = None,
    ) -> None:
        """*patience_seconds*: how long `ONCE` and `DRAIN` wait for something to move; by default a little over a lease."""
        self._settings = settings
        self._patience = patience_seconds or 5.0 + max(settings.lease_seconds, settings.confirm_timeout_seconds)
        self._engine = engine
        self._broker = broker
        self._mode = mode
        self._clock = clock
        self.id = f"{socket.gethostname()[:40]}:{os.getpid()}:{secrets.token_hex(3)}"
        self.shards = Shards(engine, self.id, settings.lease_seconds, lease_clock)
        self.forwarder = Forwarder(
            engine,
            broker,
            self.shards,
            Policy(
                exchange=settings.exchange,
                max_attempts=settings.max_attempts,
                backoff=Backoff(settings.backoff_base_seconds, settings.backoff_max_seconds),
            ),
            Limits(
                batch_rows=settings.batch_size,
                window=settings.window,
                poll_seconds=settings.poll_seconds,
                woken_seconds=2 * THROTTLE_SECONDS,
            ),
            relay_id=self.id,
            clock=clock,
        )
        self._let_in = False
        self._database = Availability(clock)
        self._announcer = telemetry.Announcer(log)
        self._announcer.first("rows", "free")
        self._hindered = ""
        self._stopping = False
        self._state = "starting"
        self._beat_at = self._forget_at = 0.0
        self._turned_at = self._progress_at = clock()
        self._passes = 0
        self._woken = False

    def wake(self) -> None:
        """There is something to read; from any thread."""
        self._woken = True
        self._broker.wake()

    def stop(self) -> None:
        """Ask it to end, in order; safe in a signal handler and from any thread."""
        self._stopping = True

    # --- from start to end ---

    def run(self) -> int:
        """Work until told to stop, or until the mode is satisfied; return the exit code.

        Raises SchemaError and BrokerError for what waiting would not mend.
        """
        address = self._settings.http_address
        server = Server(address, live=self._live, ready=self._ready) if address else None
        if server:
            server.start()
        listener = Listener(self._engine, self.wake, self._settings.poll_seconds)
        counting = Counting(self._engine)
        self._broker.start()
        try:
            if not self._await_schema():
                return OK if self._stopping else TRY_LATER
            say(log, logging.INFO, "relay.started", f"relay {self.id} publishes to exchange {self._settings.exchange!r}")
            if self._mode is Mode.RUN:
                listener.start()
                counting.start()
            try:
                code = self._work()
            except BrokerError:
                self._finish()  # another relay need not wait for our leases
                raise
            self._finish()
            return code
        finally:
            listener.stop()
            counting.stop()
            self._broker.stop(_STOP_BROKER_SECONDS)
            if server:
                server.stop()

    def _await_schema(self) -> bool:
        """Wait for the database; False when stopped or out of patience meanwhile. Raises SchemaError."""
        while not self._stopping:
            self._require_admission()
            now = self._clock()
            if self._database.may_try(now):
                with self._database.attempt():
                    if (self._settings.broker_url or "").startswith("embedded:"):
                        migrations.upgrade(self._engine)
                    migrations.check(self._engine)
                    self._progress_at = self._clock()
                    return True
            self._turned_at = now
            if self._out_of_patience(now):
                self._say_remaining(f"the database does not answer: {self._database.problem}")
                return False
            self._broker.answers(_TURN_SECONDS)
        return False

    def _work(self) -> int:
        while not self._stopping:
            self._require_admission()
            self.turn()
            if self._mode is not Mode.RUN and (code := self._satisfied()) is not None:
                return code
        return OK

    def _require_admission(self) -> None:
        """Raise BrokerError while the broker refuses us and never let us in; once it did, it is waited for."""
        broker = self._broker.state()
        self._let_in = self._let_in or broker.connected or broker.let_in
        if broker.refused and not self._let_in:
            raise BrokerError(broker.detail)

    def turn(self) -> None:
        """Collect, settle, read, send, and keep the leases: once round."""
        if self.forwarder.collect(self._wait_seconds()):
            self._progress_at = self._clock()
        self.forwarder.send()
        if self._woken:
            self._woken = False
            self.forwarder.wake()
        now = self._turned_at = self._clock()
        if self._database.may_try(now):
            with self._database.attempt():
                self._use_database(now)
        self.forwarder.send()

    def _wait_seconds(self) -> float:
        now = self._clock()
        due = [now + _TURN_SECONDS]
        if self._database.may_try(now):
            due.append(now + self.shards.keep_in())
            due += [
                at
                for at in (self.forwarder.answers.due_at, self.forwarder.read_due_at if self._may_read() else None)
                if at is not None
            ]
        return max(0.0, min(due) - now)

    def _may_read(self) -> bool:
        return self.shards.valid() and not (self._mode is Mode.ONCE and self._passes)

    def _use_database(self, now: float) -> None:
        if self._database.problem:
            self._beat_at = now  # only a write says that it is back: one that is full or was demoted answers reads
        self._keep_shards()
        settle_at = self.forwarder.answers.due_at
        if settle_at is not None and settle_at <= now:
            self.forwarder.settle()
            self._progress_at = self._clock()
        read_at = self.forwarder.read_due_at
        if read_at is not None and read_at <= now and self._may_read():
            loaded = self.forwarder.read()
            self._passes += bool(loaded or not self.forwarder.reads_on)  # a page of what must wait is no pass
        self.forwarder.prove()
        self._report(now)

    def _keep_shards(self) -> None:
        if not self.shards.keep():
            self._say_who_is_waited_for()
            return
        if self.shards.owned:
            self._state = "running"
            self._announcer.state("shards", "taken", logging.INFO, f"works on all {SHARDS} shards")
            self.forwarder.wake()
        else:
            self._state = "idle"
            telemetry.LEASES_LOST.inc()
            self._announcer.state(
                "shards", "lost", logging.WARNING, "the shards are not this relay's any more; what is in flight ends"
            )
            self.forwarder.abandon()
        telemetry.SHARDS_OWNED.set(len(self.shards.epochs))

    def _say_who_is_waited_for(self) -> None:
        if self.shards.missing:
            self._announcer.state("shards", "missing", logging.ERROR, self._damage())
        elif self.shards.holder is not None:
            owner = self.shards.holder.relay
            sentence = f"relay {owner} has the shards; this one takes over when it ends or its lease runs out"
            self._announcer.state("shards", "waiting", logging.INFO, sentence)

    def _damage(self) -> str:
        return (
            f"outbox_shard lacks {self.shards.missing} of its {SHARDS} rows, so no relay works; put them back: outbox migrate"
        )

    def _report(self, now: float) -> None:
        if now >= self._beat_at:
            self._beat_at = now + _HEARTBEAT_SECONDS
            broker = self._broker.state()
            telemetry.show_broker(broker)
            with database.autocommitting(self._engine).begin() as connection:
                state = "idle" if self.shards.holder else self._state
                leases.beat(
                    connection,
                    self.id,
                    state,
                    connected=broker.connected,
                    blocked=broker.blocked,
                    detail=broker.detail,
                    trouble=self._trouble(connection, now),
                )
                if now >= self._forget_at:
                    self._forget_at = now + _FORGET_SECONDS
                    leases.forget_old(connection)

    def _trouble(self, connection: Connection, now: float) -> str:
        """Return what hinders it, and say so once."""
        locked = self.forwarder.answers.locked(now)
        if not locked:
            self._hindered = ""
            self._announcer.state("rows", "free", logging.INFO, "what was answered is recorded")
            return ""
        # Nobody: several share the lock, or it has just gone.
        who = locks.holders(connection, locked) or ([] if self._hindered else ["another session"])
        if who:
            rows = f"the rows of {len(locked)} answered messages"
            step = "let it commit or roll back, or end it: SELECT pg_terminate_backend(its process)"
            self._hindered = f"{'; '.join(who)} keeps {rows} locked; they are recorded when it ends, the rest goes on; {step}"
            self._announcer.state("rows", "locked", logging.WARNING, self._hindered)
        return self._hindered

    # --- ending ---

    def _finish(self) -> None:
        """Wait for what is in flight, settle it, give the shards back: within `OUTBOX_SHUTDOWN_TIMEOUT`."""
        failpoints.reached("R7")
        self._state = "draining"
        self._beat_at = 0.0  # say so now
        flying = self.forwarder.lanes.flying
        say(log, logging.INFO, "relay.stopping", f"waiting for {flying} answers" if flying else "settling what was answered")
        deadline = self._clock() + self._settings.shutdown_timeout_seconds
        while self.forwarder.lanes.flying and self._clock() < deadline:
            self.forwarder.collect(min(_TURN_SECONDS, deadline - self._clock()))
            self._turned_at = now = self._clock()
            if self._database.may_try(now):
                with self._database.attempt():
                    if self.shards.owned:
                        self._keep_shards()
                    self.forwarder.settle()
                    self._report(now)
        while not self._database.within(self._leave) and self._clock() < deadline:
            self._broker.answers(_TURN_SECONDS)
        unanswered, unsettled = self.forwarder.lanes.flying, len(self.forwarder.answers)
        level = logging.WARNING if unanswered or unsettled else logging.INFO
        rest = f"; {unanswered} unanswered and {unsettled} unsettled messages go out again" if level == logging.WARNING else ""
        say(log, level, "relay.stopped", f"relay {self.id} has stopped{rest}")

    def _leave(self) -> None:
        self.forwarder.settle(even_locked=True)
        self.shards.release()
        with database.autocommitting(self._engine).begin() as connection:
            leases.depart(connection, self.id)

    # --- one pass, and drain ---

    def _satisfied(self) -> int | None:
        """Return the exit code when the mode is, or can't be, satisfied; None to go on."""
        now = self._clock()
        if self.forwarder.lanes.idle:
            if self._mode is Mode.ONCE and self._passes:
                return OK
            if self._mode is Mode.DRAIN and self.forwarder.exhausted:
                return self._remaining()
        if self._out_of_patience(now):
            self._say_remaining(self._obstacle())
            return TRY_LATER
        return None

    def _out_of_patience(self, now: float) -> bool:
        patience = min(self._patience, _REFUSED_SECONDS) if self._broker.state().refused else self._patience
        return self._mode is not Mode.RUN and now - self._progress_at > patience

    def _obstacle(self) -> str:
        broker = self._broker.state()
        if self._database.problem:
            return f"the database does not answer: {self._database.problem}"
        if self.shards.missing:
            return self._damage()
        if self.shards.holder is not None:
            return f"relay {self.shards.holder.relay} has the shards and goes on renewing its leases"
        if not broker.connected or broker.blocked:
            return f"the broker takes nothing: {broker.detail}"
        return "the broker has not answered"

    def _remaining(self) -> int | None:
        """Return the exit code of a drain that has sent what it could."""
        census: list[relaying.Census] = []

        def count() -> None:
            with database.reading(self._engine).connect() as connection:
                census.append(relaying.census(connection))

        if not self._database.within(count):
            return None
        waiting = {state: n for state, n in census[0].by_state.items() if state != State.DISCARDED and n}
        if not waiting:
            return OK
        self._say_remaining(", ".join(f"{number} {state}" for state, number in sorted(waiting.items())) + ": outbox status")
        return TRY_LATER

    def _say_remaining(self, what: str) -> None:
        say(log, logging.WARNING, "relay.remaining", f"not everything could be sent now: {what}")

    # --- probes ---

    def _live(self) -> Health:
        silent = self._clock() - self._turned_at
        limit = max(_LIVE_CALL_SECONDS, 4 * self._settings.lease_seconds) if self._database.in_use else _LIVE_SECONDS
        return Health(silent < limit, {"turned_seconds_ago": round(silent, 3)})

    def _ready(self) -> Health:
        broker = self._broker.state()
        role = "working" if self.shards.owned else "standby" if self.shards.holder else "starting"
        complaint = self._database.complaint()
        ok = broker.connected and not complaint and role != "starting"
        detail = {"role": role, "database": complaint or "ok", "broker": broker.detail or "ok"}
        return Health(ok, detail)
