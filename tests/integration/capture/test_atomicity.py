"""The promise of capture: what is in the outbox is what committed beside it.

Random programs of begin, savepoint, release, rollback, failing flush, close, commit and send run against a database. Beside
each message goes a row of a ledger, by ordinary SQL in the same transaction: the truth. After every end of a transaction
both must agree, and the numbers of each key must run 1, 2, 3, … in the order of the commits.
"""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, SessionTransaction

from outbox import InvalidMessage, Outbox, migrations, tables
from outbox.database import create_engine
from outbox.errors import CaptureError
from tests.integration.capture.conftest import Base, Talk

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

_ledger = sa.Table(
    "ledger",
    sa.MetaData(),
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("message_id", sa.Uuid, nullable=False),
    sa.Column("key", sa.String(50)),
)


def prepare(url: str) -> Engine:
    engine = create_engine(url)
    migrations.upgrade(engine)
    Base.metadata.create_all(engine)
    _ledger.create(engine)
    return engine


def send(outbox: Outbox, session: Session, key: str | None) -> None:
    """Send a message and write its row of the ledger, in one transaction or savepoint."""
    message_id = outbox.send("talk.modified", {"n": 1}, key=key, session=session)
    session.execute(sa.insert(_ledger).values(message_id=message_id, key=key))


def differences(engine: Engine) -> list[str]:
    """Return how outbox and ledger disagree, and which keys have other numbers than 1, 2, 3, …"""
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(tables.message.c.message_id, tables.pending.c.key, tables.pending.c.sequence)
            .join(tables.pending, tables.pending.c.message_row == tables.message.c.id)
            .order_by(tables.pending.c.id)
        ).all()
        committed = set(connection.scalars(sa.select(_ledger.c.message_id)))
    found = {row.message_id for row in rows}
    problems = [f"lost {each}" for each in committed - found] + [f"phantom {each}" for each in found - committed]
    sequences: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        if row.key is not None:
            sequences[row.key].append(row.sequence)
    return problems + [f"{key}: {n}" for key, n in sequences.items() if n != list(range(1, len(n) + 1))]


class Programs(RuleBasedStateMachine):
    """One session, doing whatever sessions can do, in any order."""

    engine: Engine
    outbox: Outbox

    def __init__(self) -> None:
        super().__init__()
        self.session = Session(self.engine)
        self.savepoints: list[SessionTransaction] = []
        self.titles = 0

    @initialize()
    def empty(self) -> None:
        with self.engine.begin() as connection:
            for table in (_ledger, Talk.__table__, tables.pending, tables.message, tables.key):
                connection.execute(sa.delete(table))  # type: ignore[arg-type]

    @property
    def begun(self) -> bool:
        return self.session.in_transaction()

    def over(self) -> None:
        self.savepoints.clear()
        assert differences(self.engine) == []

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
        send(self.outbox, self.session, key)

    @precondition(lambda self: self.begun and len(self.savepoints) < 4)
    @rule()
    def savepoint(self) -> None:
        self.savepoints.append(self.session.begin_nested())

    @precondition(lambda self: self.savepoints)
    @rule()
    def release(self) -> None:
        self.savepoints.pop().commit()

    @precondition(lambda self: self.savepoints)
    @rule()
    def roll_back_to_savepoint(self) -> None:
        self.savepoints.pop().rollback()

    @precondition(lambda self: self.savepoints)
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

    @precondition(lambda self: self.begun)
    @rule()
    def add_a_row(self) -> None:
        self.titles += 1
        self.session.add(Talk(title=f"talk {self.titles}"))

    @precondition(lambda self: self.savepoints)
    @rule(sends=st.booleans())
    def fail_to_flush_in_a_savepoint(self, sends: bool) -> None:
        self.savepoints.append(self.session.begin_nested())
        if sends:
            send(self.outbox, self.session, "a")
        self.titles += 1
        self.session.add_all([Talk(title=f"twice {self.titles}"), Talk(title=f"twice {self.titles}")])
        with pytest.raises(IntegrityError):
            self.session.flush()
        self.savepoints.pop().rollback()

    @precondition(lambda self: self.begun and not self.savepoints)
    @rule()
    def fail_to_flush(self) -> None:
        self.titles += 1
        self.session.add_all([Talk(title=f"twice {self.titles}"), Talk(title=f"twice {self.titles}")])
        with pytest.raises(IntegrityError):
            self.session.flush()
        self.session.rollback()
        self.over()

    @precondition(lambda self: self.savepoints)
    @rule()
    def refuse_in_a_savepoint(self) -> None:
        with pytest.raises(InvalidMessage):
            self.outbox.send("talk.modified", object(), key="a", session=self.session)
        innermost = self.savepoints.pop()
        with pytest.raises(CaptureError):
            innermost.commit()
        innermost.rollback()

    @precondition(lambda self: self.begun)
    @rule()
    def commit(self) -> None:
        self.session.commit()
        self.over()

    @precondition(lambda self: self.begun)
    @rule()
    def commit_the_root_over_open_savepoints(self) -> None:
        root = self.session.get_transaction()
        assert root is not None
        root.commit()
        self.over()

    @precondition(lambda self: self.begun)
    @rule()
    def fail_to_commit(self) -> None:
        self.titles += 1
        self.session.add_all([Talk(title=f"twice {self.titles}"), Talk(title=f"twice {self.titles}")])
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
        assert self.session.in_nested_transaction() == bool(self.savepoints)

    def teardown(self) -> None:
        self.session.close()
        assert differences(self.engine) == []


@pytest.mark.timeout(300)
def test_what_is_in_the_outbox_is_what_committed_beside_it(database_url: str) -> None:
    engine = prepare(database_url)

    class OnThisDatabase(Programs):
        pass

    OnThisDatabase.engine, OnThisDatabase.outbox = engine, Outbox(source="/tests")
    run_state_machine_as_test(
        OnThisDatabase,
        settings=settings(
            max_examples=120,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
        ),
    )
    engine.dispose()


@pytest.mark.timeout(120)
def test_concurrent_writers_get_gapless_numbers_in_the_order_of_their_commits(postgres_url: str, chance: random.Random) -> None:
    engine = prepare(postgres_url)
    outbox = Outbox(source="/tests")
    problems: list[Any] = []

    def write(dice: random.Random) -> None:
        try:
            for _ in range(60):
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

    threads = [threading.Thread(target=write, args=(random.Random(chance.random()),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert differences(engine) == []
    engine.dispose()
