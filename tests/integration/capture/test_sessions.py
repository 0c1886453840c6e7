"""Every kind of session: which one a message belongs to, and that it shares its end."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from blinker import Namespace, Signal
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from sqlalchemy.pool import StaticPool

from outbox import CaptureError, Outbox, database, migrations, tables
from tests.integration.capture.conftest import Talk, World

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from sqlalchemy.engine import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine


def signal_of(outbox: Outbox) -> Signal:
    signal = Namespace().signal("talks_modified")
    outbox.capture(signal, topic="talk.modified", key="talk:{id}")
    return signal


# --- found by what the outbox was given ---------------------------------------------------------------------------------


def test_a_session_itself(world: World) -> None:
    with Session(world.engine) as session:
        signal = signal_of(Outbox(session=session, source="/tests"))
        session.begin()
        signal.send("anybody", id=1)
        session.commit()
    assert world.numbered() == [("talk:1", 1)]


def test_a_function_that_returns_the_current_session(world: World) -> None:
    signal = signal_of(Outbox(session=lambda: world.session, source="/tests"))
    world.begin()
    signal.send("anybody", id=1)
    world.session.commit()
    assert world.numbered() == [("talk:1", 1)]


def test_a_sessionmaker_has_one_open_session_at_a_time(world: World) -> None:
    maker = sessionmaker(world.engine)
    signal = signal_of(Outbox(session=maker, source="/tests"))
    with pytest.raises(CaptureError, match="no session of the sessionmaker has a transaction open here"):
        signal.send("anybody", id=1)
    with maker.begin() as session:
        session.add(Talk(title="one"))
        signal.send("anybody", id=1)
    with maker() as first, maker() as second:
        first.begin()
        signal.send("anybody", id=1)
        second.begin()
        with pytest.raises(CaptureError, match=r"2 sessions of the sessionmaker are open here; say which one: signal\.send"):
            signal.send("anybody", id=1)
        signal.send(second, id=2)
        second.commit()
        signal.send("anybody", id=1)
        first.commit()
    assert world.numbered() == [("talk:1", 1), ("talk:2", 1), ("talk:1", 2), ("talk:1", 3)]


def test_each_thread_has_its_own_session_of_a_sessionmaker(world: World) -> None:
    maker = sessionmaker(world.engine)
    signal = signal_of(Outbox(session=maker, source="/tests"))
    begun = threading.Barrier(2)

    def write(id_: int) -> None:
        with maker.begin():
            begun.wait(10)  # both are open now
            signal.send("anybody", id=id_)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (1, 2)))
    assert sorted(world.numbered()) == [("talk:1", 1), ("talk:2", 1)]


# --- found by the sender ------------------------------------------------------------------------------------------------


def test_a_sender_that_is_a_session_or_an_object_of_one_says_it_all(world: World) -> None:
    signal = signal_of(Outbox(source="/tests", session=world.sessions))
    with Session(world.engine) as session:
        talk = Talk(title="one")
        session.add(talk)
        session.flush()
        signal.send(session, id=1)
        signal.send(talk, id=2)
        signal.send(scoped_session(lambda: session), id=3)  # type: ignore[arg-type]
        session.commit()
    assert world.numbered() == [("talk:1", 1), ("talk:2", 1), ("talk:3", 1)]
    with pytest.raises(CaptureError, match="no transaction is open on the session"):
        signal.send(Talk(title="of no session"), id=1)


# --- which database -----------------------------------------------------------------------------------------------------


def test_a_session_that_binds_classes_uses_the_database_of_its_transaction(world: World) -> None:
    outbox = Outbox(source="/tests")
    with Session(binds={Talk: world.engine}) as session:
        session.add(Talk(title="one"))
        outbox.send("a.b", 1, session=session)
        session.commit()
        session.begin()
        outbox.send("a.b", 2, session=session)
        with pytest.raises(CaptureError, match=r"does not say in which database the outbox tables are; .*Outbox\(engine=…\)"):
            session.commit()
        session.rollback()
        session.begin()
        Outbox(engine=world.engine, source="/tests").send("a.b", 3, session=session)
        session.commit()
    assert [row.body for row in world.rows()] == [b"1", b"3"]


def test_the_engine_of_the_outbox_is_used_where_the_session_has_another(world: World, tmp_path: Path) -> None:
    other = database.create_engine(f"sqlite:///{tmp_path}/other.db")
    outbox = Outbox(engine=world.engine, source="/tests")
    with Session(other, binds={Talk: world.engine}) as session:
        session.add(Talk(title="one"))
        outbox.send("a.b", 1, session=session)
        session.commit()
        session.execute(sa.text("CREATE TABLE note (n INTEGER)"))
        with pytest.raises(CaptureError, match="second database"):
            outbox.send("a.b", 1, session=session)
    assert len(world.rows()) == 1
    other.dispose()


def test_engines_that_share_a_pool_are_one_database(world: World) -> None:
    outbox = Outbox(engine=world.engine, source="/tests")
    with Session(world.engine.execution_options(logging_token="app")) as session:
        session.add(Talk(title="one"))
        session.flush()
        outbox.send("a.b", 1, session=session)
        session.commit()
    assert len(world.rows()) == 1


def test_the_info_of_a_session_is_the_applications(world: World) -> None:
    session = world.begin()
    world.send(n=1)
    session.info.clear()
    session.commit()
    assert world.numbers() == [1]


# --- Core connections ---------------------------------------------------------------------------------------------------


def test_a_connection_is_written_on_at_once_and_decides(world: World) -> None:
    with world.engine.begin() as connection:
        world.outbox.send("a.b", {"n": 1}, key="k", session=connection)
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == 1
        connection.rollback()
    with world.engine.begin() as connection:
        world.outbox.send("a.b", {"n": 2}, key="k", session=connection)
        savepoint = connection.begin_nested()
        world.outbox.send("a.b", {"n": 3}, key="k", session=connection)
        savepoint.rollback()
        world.outbox.send("a.b", {"n": 4}, key="k", session=connection)
    assert (world.numbers(), world.numbered()) == ([2, 4], [("k", 1), ("k", 2)])


def test_on_a_connection_without_transaction_it_is_refused(world: World) -> None:
    with world.engine.connect() as connection, pytest.raises(CaptureError, match=r"send inside `with connection\.begin\(\):`"):
        world.outbox.send("a.b", 1, session=connection)


def test_after_an_error_on_a_connection_its_transaction_is_rolled_back(world: World) -> None:
    with world.engine.connect() as connection:
        connection.begin()
        connection.execute(sa.insert(Talk).values(title="beside it"))
        connection.execute(sa.text("ALTER TABLE outbox_pending RENAME TO elsewhere"))
        with pytest.raises(Exception, match="run: outbox migrate"):
            world.outbox.send("a.b", 1, key="k", session=connection)
        connection.commit()
    with world.engine.connect() as connection:
        assert connection.scalars(sa.select(Talk.title)).all() == []
        assert connection.scalars(sa.select(tables.key.c.key)).all() == []


def test_the_connection_of_a_session_stands_for_the_session(world: World) -> None:
    """What a listener of a mapper sends on the connection that it is given keeps its place."""

    def after_insert(_mapper: object, connection: Connection, _talk: Talk) -> None:
        world.outbox.send("a.b", {"n": 2}, key="k", session=connection)

    event.listen(Talk, "after_insert", after_insert)
    try:
        session = world.begin()
        world.outbox.send("a.b", {"n": 1}, key="k", session=session)
        session.add(Talk(title="one"))
        session.commit()
    finally:
        event.remove(Talk, "after_insert", after_insert)
    assert (world.numbers(), world.numbered()) == ([1, 2], [("k", 1), ("k", 2)])


# --- SQLite engines made elsewhere --------------------------------------------------------------------------------------


@pytest.fixture
def plain_url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/plain.db"
    with database.create_engine(url).begin() as connection:
        migrations.upgrade(connection)
        connection.execute(sa.text("CREATE TABLE note (n INTEGER)"))
    return url


def contents(url: str) -> tuple[int, int]:
    """Return how many notes and messages there are."""
    with sa.create_engine(url).connect() as connection:
        notes, messages = (connection.scalar(sa.text(f"SELECT count(*) FROM {name}")) for name in ("note", "outbox_pending"))
    return notes or 0, messages or 0


def test_an_engine_that_the_outbox_is_given_is_prepared(plain_url: str) -> None:
    engines = [sa.create_engine(plain_url) for _ in range(4)]
    Outbox(source="/tests", engine=engines[0])
    Outbox(source="/tests", session=sessionmaker(engines[1]))
    Outbox(source="/tests", session=scoped_session(sessionmaker(engines[2])))
    Outbox(source="/tests", session=Session(engines[3]))
    asynchronous = create_async_engine(plain_url.replace("sqlite:", "sqlite+aiosqlite:"))
    Outbox(source="/tests", engine=asynchronous)
    engines.append(asynchronous.sync_engine)
    assert all(database.is_prepared(engine) for engine in engines)


def test_an_engine_that_nobody_prepared_is_prepared_where_it_is_found_unused(plain_url: str) -> None:
    engine = sa.create_engine(plain_url)
    with Session(engine) as session:
        session.begin()
        Outbox(source="/tests").send("a.b", 1, session=session)
        with session.begin_nested():
            session.execute(sa.text("INSERT INTO note VALUES (1)"))
        session.rollback()
    assert database.is_prepared(engine)
    assert contents(plain_url) == (0, 0)


def test_a_savepoint_after_the_message_is_inside_the_transaction_of_an_unprepared_engine(plain_url: str) -> None:
    outbox = Outbox(source="/tests")
    for end, expected in (("rollback", (0, 0)), ("commit", (1, 1))):
        with Session(sa.create_engine(plain_url)) as session:
            session.execute(sa.text("SELECT 1"))  # the driver begins nothing here
            outbox.send("a.b", 1, session=session)
            with session.begin_nested():
                session.execute(sa.text("INSERT INTO note VALUES (1)"))
            getattr(session, end)()
        assert contents(plain_url) == expected


@pytest.mark.parametrize("released", [True, False], ids=["released", "open"])
def test_a_savepoint_before_the_message_is_refused_on_an_unprepared_engine(plain_url: str, released: bool) -> None:
    outbox = Outbox(source="/tests")
    with Session(sa.create_engine(plain_url)) as session:
        savepoint = session.begin_nested()
        session.execute(sa.text("INSERT INTO note VALUES (1)"))
        if released:
            savepoint.commit()
        with pytest.raises(
            CaptureError, match=r"sends no BEGIN before a SAVEPOINT, .* call outbox\.database\.prepare\(engine\)"
        ):
            outbox.send("a.b", 1, session=session)
        session.rollback()
    with sa.create_engine(plain_url).connect() as connection:
        connection.begin()
        connection.begin_nested()
        with pytest.raises(CaptureError, match=r"outbox\.database\.prepare\(engine\)"):
            outbox.send("a.b", 1, session=connection)


def test_an_engine_with_begin_events_of_its_own_is_left_as_it_is(plain_url: str) -> None:
    """The recipe of SQLAlchemy's documentation."""
    engine = sa.create_engine(plain_url)

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    for outbox in (Outbox(source="/tests"), Outbox(source="/tests", engine=engine)):
        with Session(engine) as session:
            with session.begin_nested():
                session.execute(sa.text("INSERT INTO note VALUES (1)"))
                outbox.send("a.b", 1, session=session)
            session.rollback()
    assert contents(plain_url) == (0, 0)


def test_a_database_in_memory_is_still_there_after_it_was_prepared() -> None:
    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    migrations.upgrade(engine)
    outbox = Outbox(engine=engine, source="/tests")
    with Session(engine) as session:
        session.begin()
        with session.begin_nested():
            outbox.send("a.b", 1, session=session)
        session.commit()
        assert session.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == 1


# --- asyncio ------------------------------------------------------------------------------------------------------------


def in_asyncio(world: World, program: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    """Run *program* with an asynchronous engine on the database of *world*."""
    url = world.engine.url.set(drivername=world.engine.url.drivername.replace("sqlite", "sqlite+aiosqlite"))

    async def run() -> None:
        engine = database.prepare(create_async_engine(url))
        try:
            await program(engine)
        finally:
            await engine.dispose()

    asyncio.run(run())


def test_an_async_session_shares_the_fate_of_its_messages(world: World) -> None:
    async def program(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            signal = signal_of(Outbox(session=session, source="/tests"))
            await session.execute(sa.text("SELECT 1"))
            signal.send("anybody", id=1)
            async with session.begin_nested():
                await signal.send_async("anybody", id=2)
            lost = await session.begin_nested()
            signal.send("anybody", id=3)
            await lost.rollback()
            await session.commit()
            async with session.begin():
                signal.send(session, id=4)
                await session.rollback()

    in_asyncio(world, program)
    assert world.numbered() == [("talk:1", 1), ("talk:2", 1)]


def test_each_task_has_its_own_session_of_an_async_scoped_session(world: World) -> None:
    async def program(engine: AsyncEngine) -> None:
        sessions = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        signal = signal_of(Outbox(session=sessions, source="/tests"))

        async def write(id_: int) -> None:
            await sessions.execute(sa.text("SELECT 1"))
            signal.send("anybody", id=id_)
            await (sessions.commit() if id_ % 2 else sessions.rollback())
            await sessions.remove()

        for ids in ((1, 2), (3, 4)):
            await asyncio.gather(*map(write, ids))

    in_asyncio(world, program)
    assert sorted(world.numbered()) == [("talk:1", 1), ("talk:3", 1)]


def test_an_async_sqlite_engine_must_be_prepared_where_the_outbox_can_not_know_it(plain_url: str) -> None:
    async def program() -> None:
        outbox = Outbox(source="/tests")
        engine = create_async_engine(plain_url.replace("sqlite:", "sqlite+aiosqlite:"))
        async with AsyncSession(engine) as session:
            await session.execute(sa.text("SELECT 1"))
            with pytest.raises(CaptureError, match=r"call outbox\.database\.prepare\(engine\)"):
                outbox.send("a.b", 1, session=session)
            await session.rollback()
            database.prepare(engine)
            await session.execute(sa.text("SELECT 1"))
            outbox.send("a.b", 1, session=session)
            await session.commit()
        await engine.dispose()

    asyncio.run(program())
    assert contents(plain_url) == (0, 1)


def test_what_must_be_written_at_once_is_refused_outside_of_run_sync(world: World) -> None:
    async def program(engine: AsyncEngine) -> None:
        outbox = Outbox(source="/tests")
        async with engine.connect() as connection:
            await connection.begin()
            with pytest.raises(CaptureError, match=r"which asyncio can't do inside a plain call; use `await session\.run_sync"):
                outbox.send("a.b", {"n": 1}, session=connection)
            await connection.rollback()
            await connection.begin()
            await connection.run_sync(lambda inner: outbox.send("a.b", {"n": 2}, session=inner))
            await connection.commit()
        async with AsyncSession(engine) as session:
            savepoint = await (await session.connection()).begin_nested()
            with pytest.raises(CaptureError, match="run_sync"):
                outbox.send("a.b", {"n": 3}, session=session)
            with pytest.raises(CaptureError, match="can only be rolled back"):
                await session.commit()
            await session.rollback()
            savepoint = await (await session.connection()).begin_nested()
            await session.run_sync(lambda inner: outbox.send("a.b", {"n": 4}, session=inner))
            await savepoint.commit()
            await session.commit()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a driver's coroutine that nobody could await
        in_asyncio(world, program)
        gc.collect()
    assert world.numbers() == [2, 4]
