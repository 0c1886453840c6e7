"""What happens beneath a session that holds messages: other sessions on its connection, and transactions ended past it.

Each is right, a message beside its rows, or refused by name. Nothing in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import StaticPool

from outbox import CaptureError, Outbox, database, migrations, tables
from outbox.database import create_engine
from tests.integration.capture.conftest import Base, Talk, World
from tests.integration.capture.test_sessions import in_asyncio

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

COMMANDS = [
    "COMMIT",
    "commit work;",
    "END",
    "ROLLBACK",
    "/* a comment */ COMMIT",
    "-- a comment\n  ROLLBACK",
    "SELECT 1; COMMIT",
    "COMMIT; BEGIN",
]


def talks(world: World) -> int:
    with world.engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Talk)) or 0


def begin_with_a_talk(world: World) -> Session:
    session = world.begin()
    session.add(Talk(title="beside it"))
    session.flush()
    return session


# --- other sessions on the connection -----------------------------------------------------------------------------------


def helper_that_is_bound(connection: Connection) -> Session:
    return Session(connection)


def helper_that_binds_classes(connection: Connection) -> Session:
    return Session(binds={Talk: connection})


def helper_with_savepoints(connection: Connection) -> Session:
    return sessionmaker(connection, join_transaction_mode="create_savepoint")()


HELPERS: list[Callable[[Connection], Session]] = [helper_that_is_bound, helper_that_binds_classes, helper_with_savepoints]


@pytest.mark.parametrize("make", HELPERS)
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
def test_a_helper_session_does_not_make_the_connection_forget_who_holds_messages(
    world: World, make: Callable[[Connection], Session], closed: bool
) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    for helper in [make(session.connection()) for _ in range(2)]:
        helper.scalars(sa.select(Talk)).all()
        if closed:
            helper.close()
    with pytest.raises(CaptureError, match=r"signal 'talks_modified' sent; call session.commit\(\)"):
        session.connection().commit()
    session.rollback()
    assert (talks(world), world.rows()) == (0, [])


@pytest.mark.parametrize("make", HELPERS)
def test_after_a_helper_session_the_connection_still_stands_for_its_session(
    world: World, make: Callable[[Connection], Session]
) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    with make(session.connection()) as helper:
        helper.scalars(sa.select(Talk)).all()
    world.outbox.send("a.b", {"n": 2}, key="event:1", session=session.connection())
    session.commit()
    assert (talks(world), world.numbers(), [row.sequence for row in world.rows()]) == (1, [1, 2], [1, 2])


@pytest.mark.filterwarnings("ignore:transaction already deassociated")  # the refusal has rolled it back
@pytest.mark.parametrize("make", HELPERS)
def test_a_helper_session_does_not_overtake_the_session_whose_connection_it_uses(
    world: World, make: Callable[[Connection], Session]
) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    helper = make(session.connection())
    helper.scalars(sa.select(Talk)).all()
    world.outbox.send("a.b", {"n": 2}, key="event:2", session=helper)
    with pytest.raises(CaptureError, match="an earlier message of key 'event:1' waits for the commit of its session"):
        world.outbox.send("a.b", {"n": 3}, key="event:1", session=helper)
    session.rollback()
    assert (talks(world), world.rows()) == (0, [])


@pytest.mark.parametrize("make", HELPERS)
@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
@pytest.mark.parametrize("outer", ["commit", "rollback"])
def test_what_a_helper_session_sends_is_where_its_rows_are(
    world: World, make: Callable[[Connection], Session], end: str, outer: str
) -> None:
    with world.engine.connect() as connection:
        connection.begin()
        helper = make(connection)
        helper.add(Talk(title="the helper's"))
        helper.flush()
        world.outbox.send("a.b", {"n": 1}, key="k", session=helper)
        getattr(helper, end)()
        helper.close()
        if connection.in_transaction():
            getattr(connection, outer)()
    assert len(world.rows()) == talks(world)


def test_what_is_sent_while_a_helper_session_has_a_savepoint_has_the_fate_of_the_rows_in_it(world: World) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    session.begin_nested()
    with Session(session.connection()) as helper:  # in a savepoint of its own, because the session is in one
        helper.scalars(sa.select(Talk)).all()
        session.execute(sa.insert(Talk).values(title="in the savepoint of the helper"))
        with pytest.raises(CaptureError, match="an earlier message of key 'event:1' waits for the commit of its session"):
            world.outbox.send("a.b", {"n": 2}, key="event:1", session=session.connection())
    session.rollback()
    session = begin_with_a_talk(world)
    world.send(n=1)
    session.begin_nested()
    with Session(session.connection()) as helper:
        helper.scalars(sa.select(Talk)).all()
        session.execute(sa.insert(Talk).values(title="in the savepoint of the helper"))
        world.outbox.send("a.b", {"n": 2}, key="event:2", session=session.connection())
    session.commit()
    assert (talks(world), world.numbers()) == (1, [1])


def test_sessions_that_share_the_connection_of_a_database_in_memory_do_not_commit_for_each_other() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    migrations.upgrade(engine)
    Base.metadata.create_all(engine)
    outbox = Outbox(source="/tests", engine=engine)
    with Session(engine) as first, Session(engine) as second:
        first.add(Talk(title="one"))
        first.flush()
        outbox.send("a.b", 1, session=first)
        second.add(Talk(title="two"))
        with pytest.raises(CaptureError, match=r"outbox\.send\(\) sent; call session\.commit\(\)"):
            second.commit()
        second.rollback()
    with Session(engine) as session:
        assert session.scalars(sa.select(Talk)).all() == []
        assert session.scalars(sa.select(tables.message.c.id)).all() == []


# --- ended as text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_transaction_is_not_ended_as_text_while_a_message_waits_for_it(world: World, command: str) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    for execute in (
        session.execute,
        session.connection().execute,
        lambda text: session.connection().exec_driver_sql(text.text),
    ):
        with pytest.raises(CaptureError, match=r"as text would end .* signal 'talks_modified' sent; call session\.commit\(\)"):
            execute(sa.text(command))
    session.commit()
    assert (talks(world), world.numbers()) == (1, [1])


@pytest.mark.parametrize("command", ["COMMIT", "ROLLBACK"])
def test_what_ended_as_text_before_the_first_message_is_over(world: World, command: str) -> None:
    session = begin_with_a_talk(world)
    session.execute(sa.text(command))
    if world.engine.dialect.name == "sqlite":
        session.execute(sa.text("BEGIN"))
    session.execute(sa.insert(Talk).values(title="after it"))
    world.send(n=1)
    session.commit()
    assert (talks(world), world.numbers()) == (2 if command == "COMMIT" else 1, [1])


def test_a_savepoint_of_ones_own_is_not_rolled_back_as_text_beneath_a_message(world: World) -> None:
    session = world.begin()
    session.execute(sa.text("SAVEPOINT own"))
    session.execute(sa.insert(Talk).values(title="inside"))
    world.send(n=1)
    with pytest.raises(CaptureError, match=r"ROLLBACK as text .* use session\.begin_nested\(\)"):
        session.execute(sa.text("ROLLBACK TO SAVEPOINT own"))
    session.execute(sa.text("RELEASE SAVEPOINT own"))
    session.commit()
    assert (talks(world), world.numbers()) == (1, [1])


def test_an_async_session_is_not_ended_as_text_either(world: World) -> None:
    async def program(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(sa.insert(Talk).values(title="beside it"))
            world.outbox.send("a.b", {"n": 1}, session=session)
            with pytest.raises(CaptureError, match="COMMIT as text"):
                await session.execute(sa.text("COMMIT"))
            await session.commit()

    in_asyncio(world, program)
    assert (talks(world), world.numbers()) == (1, [1])


# --- ended on the driver's own connection -------------------------------------------------------------------------------


def on_its_cursor(command: str) -> Callable[[Any], object]:
    return lambda driver: driver.cursor().execute(command)


@pytest.mark.parametrize(
    "end",
    [lambda driver: driver.commit(), lambda driver: driver.rollback(), on_its_cursor("COMMIT"), on_its_cursor("ROLLBACK")],
    ids=["commit", "rollback", "COMMIT", "ROLLBACK"],
)
@pytest.mark.parametrize("then", ["commit", "statement"])
def test_a_transaction_that_the_driver_ended_is_noticed_before_it_goes_on(
    world: World, end: Callable[[Any], object], then: str
) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    end(session.connection().connection)
    with pytest.raises(CaptureError, match="ended past the session after signal 'talks_modified' sent"):
        session.commit() if then == "commit" else session.execute(sa.text("SELECT 1"))
    with pytest.raises(CaptureError, match="ended past the session"):
        session.commit()
    session.rollback()
    assert world.rows() == []
    session.begin()
    world.send(n=2)
    session.commit()
    assert world.numbers() == [2]


def test_a_rollback_that_comes_after_the_drivers_own_commit_says_so(world: World, caplog: pytest.LogCaptureFixture) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    session.connection().connection.commit()
    session.rollback()
    (warning,) = caplog.messages
    assert "ended past the session before this rollback, after signal 'talks_modified' sent: if that was a commit" in warning
    world.begin().add(Talk(title="another"))
    world.session.flush()
    world.send(n=2)
    world.session.rollback()
    assert len(caplog.messages) == 1


def test_a_transaction_that_sqlite_rolled_back_by_itself_is_noticed(world: World) -> None:
    if world.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL leaves every rollback to the client")
    session = begin_with_a_talk(world)
    world.send(n=1)
    with pytest.raises(sa.exc.IntegrityError):
        session.execute(sa.text("INSERT OR ROLLBACK INTO talk (title) VALUES ('beside it')"))
    with pytest.raises(CaptureError, match="ended past the session"):
        session.commit()
    session.rollback()
    assert (talks(world), world.rows()) == (0, [])


# --- a connection that is lost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["rollback", "close", "commit"])
def test_a_session_whose_connection_is_lost_ends_as_any_other_and_what_it_held_goes_with_it(world: World, end: str) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    session.connection().invalidate()
    if end == "commit":
        with pytest.raises(PendingRollbackError):
            session.commit()
        session.rollback()
    else:
        getattr(session, end)()
    assert talks(world) == len(world.rows()) == 0

    begin_with_a_talk(world)
    world.send(n=2)
    world.session.commit()
    assert talks(world) == len(world.rows()) == 1


def test_a_message_sent_after_the_connection_was_lost_is_never_committed(world: World) -> None:
    session = begin_with_a_talk(world)
    session.connection().invalidate()

    def send_and_commit() -> None:  # on SQLite the first asks the connection already
        world.send(n=1)
        session.commit()

    with pytest.raises(PendingRollbackError):
        send_and_commit()
    session.rollback()
    assert talks(world) == len(world.rows()) == 0


@pytest.mark.parametrize("end", ["rollback", "close", "commit"])
def test_in_a_savepoint_a_session_whose_connection_is_lost_ends_as_well(world: World, end: str) -> None:
    session = begin_with_a_talk(world)
    world.send(n=1)
    session.begin_nested()
    session.connection().invalidate()
    if end == "commit":
        with pytest.raises(PendingRollbackError):
            session.commit()
        session.rollback()
    else:
        getattr(session, end)()
    assert talks(world) == len(world.rows()) == 0


# --- other listeners ----------------------------------------------------------------------------------------------------


def test_a_session_or_a_message_that_is_an_engines_first_does_not_break_what_is_under_way_on_it(world: World) -> None:
    """Other threads may be in a listener of the application then, as this one is."""
    engine = database.prepare(sa.create_engine(world.engine.url))

    def begin_the_first(*_: object) -> None:
        with Session(database.reading(engine)) as session:
            session.connection()

    def send_the_first(*_: object) -> None:
        with engine.begin() as connection:
            world.outbox.send("a.b", {"n": 1}, session=connection)

    event.listen(engine, "before_cursor_execute", begin_the_first, once=True)
    event.listen(engine, "checkin", send_the_first, once=True)
    with database.reading(engine).connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    engine.dispose()
    assert world.numbers() == [1]
