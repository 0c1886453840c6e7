"""The promise of capture: what is in the outbox is what committed beside it.

Random programs of begin, savepoint, release, rollback, failing flush, close, commit and send run against a database. Beside
each message goes a row of a ledger, by ordinary SQL in the same transaction: the truth. After every end of a transaction
both must agree, and the numbers of each key must run 1, 2, 3, … in the order of the commits.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction

from outbox import InvalidMessage, Outbox, database, migrations, tables
from outbox.capture import work
from outbox.database import create_engine
from outbox.errors import CaptureError
from tests.integration.capture.conftest import Talk, empty, ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine, NestedTransaction

    from tests.kit.servers import PostgresServer

_PROGRAMS = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)


def send(outbox: Outbox, session: Session, key: str | None) -> None:
    """Send a message and write its row of the ledger, in one transaction or savepoint."""
    message_id = outbox.send("talk.modified", {"n": 1}, key=key, session=session)
    session.execute(sa.insert(ledger).values(message_id=message_id, key=key))


def differences(engine: Engine) -> list[str]:
    """Return how outbox and ledger disagree, and which keys have other numbers than 1, 2, 3, …"""
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(tables.message.c.message_id, tables.pending.c.key, tables.pending.c.sequence)
            .join(tables.pending, tables.pending.c.message_row == tables.message.c.id)
            .order_by(tables.pending.c.id)
        ).all()
        committed = set(connection.scalars(sa.select(ledger.c.message_id)))
        counters = {row.key: row.sequence for row in connection.execute(sa.select(tables.key))}
    found = [row.message_id for row in rows]
    problems = [f"lost {each}" for each in committed - set(found)] + [f"phantom {each}" for each in set(found) - committed]
    problems += [f"twice {each}" for each in found if found.count(each) > 1]
    sequences: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if row.key is not None:
            sequences[row.key].append(row.sequence)
    problems += [f"{key}: {n}" for key, n in sequences.items() if n != list(range(1, len(n) + 1))]
    return problems + [f"{key} counts {n}" for key, n in counters.items() if n != len(sequences[key])]


class Programs(RuleBasedStateMachine):
    """One session, doing whatever sessions can do, in any order."""

    engine: Engine
    outbox: Outbox

    def __init__(self) -> None:
        super().__init__()
        #: What listeners of the session do when they are called next.
        self.on_commit: Callable[[], None] | None = None
        self.on_flush: Callable[[], None] | None = None
        self.session = self.open()
        #: Innermost last: those of the session, and those that were made on its connection.
        self.savepoints: list[SessionTransaction | NestedTransaction] = []
        self.names = 0

    def open(self) -> Session:
        return self.listened(Session(self.engine))

    def listened(self, session: Session) -> Session:
        def before_commit(session: Session) -> None:
            if self.on_commit is not None and not session.in_nested_transaction():
                work, self.on_commit = self.on_commit, None
                work()

        def after_flush(_session: Session, _context: object) -> None:
            if self.on_flush is not None:
                work, self.on_flush = self.on_flush, None
                work()

        event.listen(session, "before_commit", before_commit)
        event.listen(session, "after_flush", after_flush)
        return session

    @initialize()
    def start_empty(self) -> None:
        empty(self.engine)

    @property
    def begun(self) -> bool:
        return self.session.in_transaction()

    @property
    def inner_is_of_the_session(self) -> bool:
        return bool(self.savepoints) and isinstance(self.savepoints[-1], SessionTransaction)

    @property
    def is_in_savepoint_of_the_connection(self) -> bool:
        return any(not isinstance(each, SessionTransaction) for each in self.savepoints)

    def over(self) -> None:
        """A transaction of the session has ended."""
        self.savepoints.clear()
        self.on_commit = self.on_flush = None
        assert differences(self.engine) == []

    def name(self) -> str:
        self.names += 1
        return f"number {self.names}"

    def key(self, key: str | None) -> str | None:
        # A message may not overtake an earlier one of its key that is still held: there each has a key of its own.
        return self.name() if self.is_in_savepoint_of_the_connection and key is not None else key

    def add_the_same_twice(self) -> None:
        name = self.name()
        self.session.add_all([Talk(title=name), Talk(title=name)])

    # --- work ---

    @precondition(lambda self: not self.begun)
    @rule(work=st.booleans())
    def begin(self, work: bool) -> None:
        if work:
            self.session.execute(sa.text("SELECT 1"))
        else:
            self.session.begin()

    @precondition(lambda self: not self.begun)
    @rule()
    def send_before_any_work(self) -> None:
        with pytest.raises(CaptureError):
            self.outbox.send("talk.modified", {}, key="a", session=self.session)

    @precondition(lambda self: self.begun)
    @rule(key=st.sampled_from(["a", "b", "c", None]))
    def send(self, key: str | None) -> None:
        send(self.outbox, self.session, self.key(key))

    @precondition(lambda self: self.begun)
    @rule(sends=st.booleans())
    def add_a_row(self, sends: bool) -> None:
        """It is flushed by whatever comes next; the flush may send, too."""
        self.session.add(Talk(title=self.name()))
        if sends and self.on_flush is None:
            key = self.name()
            self.on_flush = lambda: send(self.outbox, self.session, key)

    # --- savepoints ---

    @precondition(lambda self: self.begun and len(self.savepoints) < 4)
    @rule()
    def savepoint(self) -> None:
        self.savepoints.append(self.session.begin_nested())

    @precondition(lambda self: self.begun and len(self.savepoints) < 4)
    @rule()
    def savepoint_on_the_connection(self) -> None:
        self.savepoints.append(self.session.connection().begin_nested())

    @precondition(lambda self: self.savepoints)
    @rule()
    def release(self) -> None:
        self.savepoints.pop().commit()

    @precondition(lambda self: self.savepoints)
    @rule()
    def roll_back_to_savepoint(self) -> None:
        self.savepoints.pop().rollback()

    @precondition(lambda self: self.savepoints and not self.is_in_savepoint_of_the_connection)
    @rule(data=st.data())
    def end_an_outer_savepoint(self, data: st.DataObject) -> None:
        """Release or roll back a savepoint while inner ones are open: they end with it."""
        depth = data.draw(st.integers(0, len(self.savepoints) - 1))
        outer = self.savepoints[depth]
        del self.savepoints[depth:]
        if data.draw(st.booleans()):
            outer.commit()
        else:
            outer.rollback()

    # --- beneath the session ---

    @property
    def holds(self) -> bool:
        doing = work.known(self.session)
        return doing is not None and any(doing.held())

    @precondition(lambda self: self.begun)
    @rule(end=st.sampled_from(["commit", "rollback", "close"]), sends=st.booleans())
    def use_a_helper_session(self, end: str, sends: bool) -> None:
        """It comes and goes on the connection of the session, in a savepoint of its own."""
        helper = Session(self.session.connection(), join_transaction_mode="create_savepoint")
        helper.add(Talk(title=self.name()))
        helper.flush()
        if sends:
            send(self.outbox, helper, self.name())
        getattr(helper, end)()
        helper.close()

    @precondition(lambda self: self.begun and not self.is_in_savepoint_of_the_connection)
    @rule(bound=st.booleans())
    def look_with_a_helper_session(self, bound: bool) -> None:
        connection = self.session.connection()
        with Session(connection) if bound else Session(binds={Talk: connection}) as helper:
            helper.scalars(sa.select(Talk.id).limit(1)).all()
            # What the connection is given still has its place among what the session sends.
            # (In a savepoint a helper makes one of its own: there a key that is held would be overtaken.)
            if self.holds:
                key = self.name() if self.savepoints else "a"
                message_id = self.outbox.send("talk.modified", {"n": 1}, key=key, session=connection)
                self.session.execute(sa.insert(ledger).values(message_id=message_id, key=key))

    @precondition(lambda self: self.holds)
    @rule(command=st.sampled_from(["COMMIT", "/* x */ rollback", "SELECT 1; END; COMMIT", "ROLLBACK TO SAVEPOINT own"]))
    def end_it_as_text(self, command: str) -> None:
        with pytest.raises(CaptureError, match="as text would end the transaction"):
            self.session.execute(sa.text(command))

    @precondition(lambda self: self.holds and not self.savepoints)
    @rule(how=st.sampled_from(["connection commits", "driver rolls back"]))
    def end_it_beneath(self, how: str) -> None:
        connection = self.session.connection()
        if how == "driver rolls back":
            connection.connection.rollback()
        with pytest.raises(CaptureError):
            connection.commit() if how == "connection commits" else self.session.commit()
        self.session.rollback()
        self.over()

    # --- failures ---

    @precondition(lambda self: self.begun)
    @rule(sends=st.booleans())
    def fail_to_flush_in_a_savepoint(self, sends: bool) -> None:
        savepoint = self.session.begin_nested()
        if sends:
            send(self.outbox, self.session, self.key("a"))
        self.add_the_same_twice()
        with pytest.raises(IntegrityError):
            self.session.flush()
        savepoint.rollback()

    @precondition(lambda self: self.begun and not self.savepoints)
    @rule()
    def fail_to_flush(self) -> None:
        self.add_the_same_twice()
        with pytest.raises(IntegrityError):
            self.session.flush()
        self.session.rollback()
        self.over()

    @precondition(lambda self: self.inner_is_of_the_session)
    @rule()
    def refuse_in_a_savepoint(self) -> None:
        with pytest.raises(InvalidMessage):
            self.outbox.send("talk.modified", object(), key="a", session=self.session)
        innermost = self.savepoints.pop()
        with pytest.raises(CaptureError):
            innermost.commit()
        innermost.rollback()

    @precondition(lambda self: self.begun and not self.savepoints)
    @rule()
    def stop_a_commit(self) -> None:
        """Another listener raises after the batch was written; the transaction goes on."""

        def stop() -> None:
            raise ZeroDivisionError

        self.on_commit = stop
        with pytest.raises(ZeroDivisionError):
            self.session.commit()

    # --- ends ---

    def release_those_of_the_connection(self) -> None:
        """SQLAlchemy does not know what to do with them when the session commits."""
        while self.is_in_savepoint_of_the_connection:
            self.savepoints.pop().commit()

    @precondition(lambda self: self.begun)
    @rule()
    def commit(self) -> None:
        self.release_those_of_the_connection()
        self.session.commit()
        self.over()

    @precondition(lambda self: self.begun)
    @rule(savepoint=st.sampled_from(["release", "rollback", None]))
    def commit_and_send_in_a_listener(self, savepoint: str | None) -> None:
        def work() -> None:
            nested = self.session.begin_nested() if savepoint else None
            send(self.outbox, self.session, "a")
            if nested is not None:
                nested.commit() if savepoint == "release" else nested.rollback()
            send(self.outbox, self.session, "b")

        self.release_those_of_the_connection()
        self.on_commit = work
        self.session.commit()
        self.over()

    @precondition(lambda self: self.begun)
    @rule()
    def commit_the_root_over_open_savepoints(self) -> None:
        self.release_those_of_the_connection()
        root = self.session.get_transaction()
        assert root is not None
        root.commit()
        self.over()

    @precondition(lambda self: self.begun)
    @rule()
    def fail_to_commit(self) -> None:
        self.release_those_of_the_connection()
        self.add_the_same_twice()
        with pytest.raises(IntegrityError):
            self.session.commit()
        self.session.rollback()
        self.over()

    @rule(end=st.sampled_from(["rollback", "close", "reset"]))
    def end(self, end: str) -> None:
        if end == "rollback":
            while self.session.in_transaction():
                self.session.rollback()
        else:
            getattr(self.session, end)()
        self.over()

    @invariant()
    def savepoints_are_as_deep_as_the_program_thinks(self) -> None:
        own = any(isinstance(each, SessionTransaction) for each in self.savepoints)
        assert self.session.in_nested_transaction() == own

    def teardown(self) -> None:
        self.session.close()
        assert differences(self.engine) == []


class JoinedPrograms(Programs):
    """The same while the session is joined to a transaction that somebody else began on its connection."""

    mode: Any

    def open(self) -> Session:
        self.connection = self.engine.connect()
        self.outer = self.connection.begin()
        return self.listened(Session(self.connection, join_transaction_mode=self.mode))

    def over(self) -> None:
        self.savepoints.clear()
        self.on_commit = self.on_flush = None
        if not self.outer.is_active:
            self.end_the_outer_transaction(commit=True)

    @rule(commit=st.booleans())
    def end_the_outer_transaction(self, commit: bool) -> None:
        """With or without a word to the session."""
        self.savepoints.clear()
        self.on_commit = self.on_flush = None
        if self.outer.is_active:
            self.outer.commit() if commit else self.outer.rollback()
        self.session.close()
        self.connection.close()
        assert differences(self.engine) == []
        self.session = self.open()

    @initialize()
    def start_empty(self) -> None:
        self.outer.rollback()
        self.connection.close()
        empty(self.engine)
        self.session = self.open()

    def teardown(self) -> None:
        self.end_the_outer_transaction(commit=True)
        self.connection.close()

    @rule(end=st.sampled_from(["rollback", "close", "reset"]))
    def end(self, end: str) -> None:
        # SQLAlchemy would keep those of the connection for open, and refuse what comes next.
        while self.is_in_savepoint_of_the_connection:
            self.savepoints.pop().rollback()
        super().end(end)

    @precondition(lambda self: False)
    @rule()
    def refuse_in_a_savepoint(self) -> None:
        """A refusal ends the outer transaction, too, where the session's savepoint was not sent yet: tested by itself."""


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:nested transaction already deassociated")  # its savepoint was rolled back with an outer one
@pytest.mark.parametrize("mode", [None, "create_savepoint", "rollback_only", "conditional_savepoint", "control_fully"])
def test_what_is_in_the_outbox_is_what_committed_beside_it(engine: Engine, mode: str | None) -> None:
    class OnThisDatabase(Programs if mode is None else JoinedPrograms):  # type: ignore[misc]
        pass

    OnThisDatabase.engine, OnThisDatabase.outbox, OnThisDatabase.mode = engine, Outbox(source="/tests"), mode
    run_state_machine_as_test(OnThisDatabase, settings=settings(_PROGRAMS, max_examples=100 if mode is None else 25))


@pytest.mark.timeout(120)
def test_an_async_session_is_as_true(engine: Engine, chance: random.Random) -> None:
    """Random trees of savepoints, on aiosqlite and on psycopg's asynchronous connections."""
    outbox = Outbox(source="/tests")

    async def write(session: AsyncSession, key: str | None) -> None:
        message_id = outbox.send("talk.modified", {"n": 1}, key=key, session=session)
        await session.execute(sa.insert(ledger).values(message_id=message_id, key=key))

    async def tree(session: AsyncSession, depth: int) -> None:
        for _ in range(chance.randint(1, 4)):
            if depth < 3 and chance.random() < 0.4:
                savepoint = await session.begin_nested()
                await tree(session, depth + 1)
                await (savepoint.commit() if chance.random() < 0.6 else savepoint.rollback())
            else:
                await write(session, chance.choice(["a", "b", None]))

    async def programs() -> None:
        url = engine.url.set(drivername=engine.url.drivername.replace("sqlite", "sqlite+aiosqlite"))
        asynchronous = database.prepare(create_async_engine(url))
        for _ in range(40):
            async with AsyncSession(asynchronous) as session:
                await session.execute(sa.text("SELECT 1"))
                await tree(session, 0)
                await getattr(session, chance.choice(["commit", "commit", "rollback", "close"]))()
        await asynchronous.dispose()

    asyncio.run(programs())
    assert differences(engine) == []
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(ledger))


# --- several writers ----------------------------------------------------------------------------------------------------


def write_in_threads(engine: Engine, chance: random.Random, *, threads: int, transactions: int) -> None:
    """Hot keys, several of them in a transaction, savepoints and rollbacks."""
    outbox = Outbox(source="/tests")
    problems: list[Any] = []

    def write(dice: random.Random) -> None:
        try:
            for _ in range(transactions):
                with Session(engine) as session:
                    session.begin()
                    for _ in range(dice.randint(1, 5)):
                        send(outbox, session, dice.choice(["hot", "a", "b", "c", None]))
                    if dice.random() < 0.2:
                        savepoint = session.begin_nested()
                        send(outbox, session, "hot")
                        savepoint.rollback()
                    if dice.random() < 0.15:
                        session.rollback()
                    else:
                        session.commit()
        except Exception as error:  # noqa: BLE001 - shown by the assertion below
            problems.append(error)

    workers = [threading.Thread(target=write, args=(random.Random(chance.random()),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert problems == []


@pytest.mark.timeout(120)
def test_numbers_follow_the_order_in_which_concurrent_writers_commit(
    private_postgres: Callable[..., PostgresServer], chance: random.Random
) -> None:
    """The order is PostgreSQL's own: it notes when each transaction committed."""
    engine = create_engine(private_postgres(track_commit_timestamp="on").url)
    migrations.upgrade(engine)
    ledger.create(engine)
    write_in_threads(engine, chance, threads=6, transactions=60)
    assert differences(engine) == []
    with engine.connect() as connection:
        rows = connection.execute(
            sa.text(
                "SELECT key, sequence, pg_xact_commit_timestamp(xmin) AS committed FROM outbox_message WHERE key IS NOT NULL "
                "ORDER BY key, sequence"
            )
        ).all()
    for earlier, later in pairwise(rows):
        assert earlier.key != later.key or earlier.committed <= later.committed, (earlier, later)
    assert len(rows) > 300
    engine.dispose()


@pytest.mark.timeout(120)
def test_writers_of_one_file_wait_for_one_another(sqlite_url: str, chance: random.Random) -> None:
    engine = create_engine(sqlite_url)
    migrations.upgrade(engine)
    ledger.create(engine)
    write_in_threads(engine, chance, threads=3, transactions=15)
    assert differences(engine) == []
    engine.dispose()
