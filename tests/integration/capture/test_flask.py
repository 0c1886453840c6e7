"""In Flask: whose session it is, two apps in a process, and what a forgotten commit looks like."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flask_sqlalchemy
import flask_sqlalchemy_lite
import pytest
import sqlalchemy as sa
from blinker import NamedSignal, Namespace
from flask import Flask, current_app
from sqlalchemy.orm import DeclarativeBase, Session

from outbox import CaptureError, ConfigurationError, Outbox, database, migrations, tables
from tests.integration.capture.conftest import counted

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.engine import Engine

Make = Callable[[Flask, str], Any]


class Model(DeclarativeBase):
    """The models of Flask-SQLAlchemy."""


@dataclass
class Shop:
    """An app with its database and its outbox."""

    app: Flask
    db: Any
    outbox: Outbox
    signal: NamedSignal

    @property
    def engine(self) -> Engine:
        with self.app.app_context():
            return self.db.engine  # type: ignore[no-any-return]

    def post(self, path: str) -> int:
        return self.app.test_client().post(path).status_code

    def bodies(self) -> list[bytes]:
        with self.engine.connect() as connection:
            return [bytes(body) for body in connection.scalars(sa.select(tables.message.c.body).order_by(tables.message.c.id))]

    def sources(self) -> list[str]:
        with self.engine.connect() as connection:
            return list(connection.scalars(sa.select(tables.message.c.source).order_by(tables.message.c.id)))


def with_flask_sqlalchemy(app: Flask, url: str) -> Any:
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    return flask_sqlalchemy.SQLAlchemy(model_class=Model)


def with_lite(app: Flask, url: str) -> Any:
    app.config["SQLALCHEMY_ENGINES"] = {"default": url}
    return flask_sqlalchemy_lite.SQLAlchemy()


def open_shop(
    make: Make, url: str, *, name: str = "shop", db_first: bool = True, outbox: Outbox | None = None, signal: Any = None
) -> Shop:
    app = Flask(name)
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.logger.disabled = True
    shop = Shop(app, make(app, url), outbox or Outbox(), signal or Namespace().signal("sold"))
    for extension in (shop.db, shop.outbox) if db_first else (shop.outbox, shop.db):
        extension.init_app(app)
    shop.outbox.capture(shop.signal, topic="item.sold", key="item:{item_id}")

    def view(ending: Callable[[], object]) -> Callable[[], str]:
        def run() -> str:
            shop.db.session.execute(sa.text("SELECT 1"))
            shop.signal.send(current_app._get_current_object(), item_id=1)  # type: ignore[attr-defined]
            ending()
            return "done"

        return run

    def fail() -> None:
        raise RuntimeError("the view is broken")

    endings = {"commit": lambda: shop.db.session.commit(), "rollback": lambda: shop.db.session.rollback()}
    for path, ending in {**endings, "forget": lambda: None, "fail": fail}.items():
        app.post(f"/{path}", endpoint=path)(view(ending))
    migrations.upgrade(shop.engine)
    return shop


@pytest.fixture(params=[with_flask_sqlalchemy, with_lite], ids=["flask-sqlalchemy", "lite"])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


@pytest.fixture
def shop(make: Make, sqlite_url: str) -> Iterator[Shop]:
    opened = open_shop(make, sqlite_url)
    yield opened
    opened.engine.dispose()


def test_a_view_sends_and_commits_as_in_2017(make: Make, postgres_url: str) -> None:
    shop = open_shop(make, postgres_url)
    assert shop.post("/commit") == 200
    assert (shop.bodies(), shop.sources()) == ([b'{"item_id":1}'], ["/shop"])
    assert shop.app.extensions["outbox"].topics == ("item.sold",)
    assert shop.app.extensions["outbox"].engine() is shop.engine
    shop.engine.dispose()


def test_a_view_that_rolls_back_or_fails_says_nothing(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    assert (shop.post("/rollback"), shop.post("/fail")) == (200, 500)
    assert shop.bodies() == []
    assert caplog.records == []


@pytest.mark.parametrize("db_first", [True, False], ids=["db first", "outbox first"])
def test_a_forgotten_commit_is_one_warning_and_is_counted(
    make: Make, sqlite_url: str, db_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    shop = open_shop(make, sqlite_url, db_first=db_first)
    before = counted("outbox_uncommitted_total", "item.sold")
    assert shop.post("/forget") == 200
    assert shop.bodies() == []
    (warning,) = caplog.records
    assert (warning.levelno, warning.getMessage()) == (
        logging.WARNING,
        "sent, but neither committed nor rolled back, so nobody will hear of it: signal 'sold' as 'item.sold' (1); "
        "call session.commit() after send()",
    )
    assert counted("outbox_uncommitted_total", "item.sold") == before + 1


def test_a_sqlite_engine_of_the_app_is_prepared(shop: Shop) -> None:
    assert database.is_prepared(shop.engine)


def test_a_session_of_its_own_needs_no_flask_sqlalchemy(world: Any) -> None:
    app, outbox, signal = Flask("plain"), Outbox(), Namespace().signal("sold")
    outbox.init_app(app, session=world.sessions)
    outbox.capture(signal, topic="plain.topic")
    with app.app_context():
        world.begin()
        signal.send(app, event_id=1)
        world.session.commit()
    assert [row.topic for row in world.rows()] == ["plain.topic"]
    assert app.extensions["outbox"].engine() is world.engine


# --- two apps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False], ids=["one outbox", "an outbox each"])
def test_two_apps_in_one_process_do_not_mix(make: Make, tmp_path: Path, shared: bool) -> None:
    signal, outbox = Namespace().signal("sold"), Outbox()
    shops = [
        open_shop(make, f"sqlite:///{tmp_path}/{name}.db", name=name, outbox=outbox if shared else None, signal=signal)
        for name in ("one", "two")
    ]
    for shop in (*shops, shops[1]):
        assert shop.post("/commit") == 200
    assert [shop.sources() for shop in shops] == [["/one"], ["/two", "/two"]]
    with shops[0].app.app_context():
        shops[0].db.session.execute(sa.text("SELECT 1"))
        with pytest.raises(CaptureError, match=r"for app 'two' in the context of app 'one'; send it inside `with app\.app_c"):
            signal.send(shops[1].app, item_id=1)
    with pytest.raises(CaptureError, match="for app 'one' outside an application context"):
        signal.send(shops[0].app, item_id=1)


def test_the_outbox_of_another_app_does_not_send_here(shop: Shop) -> None:
    other = Outbox()
    other.init_app(Flask("other"))
    with shop.app.app_context():
        shop.db.session.execute(sa.text("SELECT 1"))
        with pytest.raises(CaptureError, match="the current app has another outbox; send with that one"):
            other.send("a.b", 1)


def test_an_engine_given_for_the_app_is_where_messages_go(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("default", "outbox")]
    app, outbox = Flask("shop"), Outbox()
    app.config["SQLALCHEMY_BINDS"] = {"messages": urls[1]}
    db = with_flask_sqlalchemy(app, urls[0])
    db.init_app(app)
    with app.app_context():
        engine = db.engines["messages"]
        migrations.upgrade(engine)
        outbox.init_app(app, engine=engine)
        db.session.begin()
        outbox.send("a.b", 1)
        db.session.commit()
        assert app.extensions["outbox"].engine() is engine
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == 1


def test_the_extension_may_be_given_as_it_is_to_others(make: Make, sqlite_url: str) -> None:
    app, outbox = Flask("shop"), Outbox()
    db = make(app, sqlite_url)
    outbox.init_app(app, db)
    db.init_app(app)
    with app.app_context():
        migrations.upgrade(db.engine)
        db.session.begin()
        outbox.send("a.b", 1)
        db.session.commit()
        assert db.session.scalar(sa.select(sa.func.count()).select_from(tables.pending)) == 1
    with pytest.raises(
        ConfigurationError, match=r"init_app got SQLAlchemy, no Flask app; make the outbox with Outbox\(\), then"
    ):
        Outbox(db)


def test_an_app_has_one_outbox() -> None:
    app, outbox = Flask("shop"), Outbox()
    outbox.init_app(app)
    for again in (outbox, Outbox()):
        with pytest.raises(ConfigurationError, match="app 'shop' has an outbox already"):
            again.init_app(app)


def test_an_app_without_outbox_or_session_is_told_what_to_do() -> None:
    signal, outbox = Namespace().signal("sold"), Outbox()
    outbox.capture(signal, topic="item.sold")
    with pytest.raises(CaptureError, match=r"signal 'sold': app 'bare' has no outbox; call outbox\.init_app\(app\)"):
        signal.send(Flask("bare"))
    app = Flask("half")
    outbox.init_app(app)
    with (
        app.app_context(),
        pytest.raises(CaptureError, match=r"app 'half' has no Flask-SQLAlchemy; .*init_app\(app, session=…\)"),
    ):
        signal.send(app)


# --- several sessions in one request ------------------------------------------------------------------------------------


@pytest.fixture
def store(make: Make, postgres_url: str) -> Iterator[Shop]:
    """A shop on PostgreSQL, where several sessions may be at work at once, with a table."""
    opened = open_shop(make, postgres_url)
    with opened.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE ticket (n integer)"))
    yield opened
    opened.engine.dispose()


_SELL = sa.text("INSERT INTO ticket VALUES (1)")
_LOOK = sa.text("SELECT count(*) FROM ticket")


def tickets(shop: Shop) -> int:
    with shop.engine.connect() as connection:
        return connection.scalar(_LOOK) or 0


def send(shop: Shop, way: str) -> None:
    if way == "signal":
        shop.signal.send(shop.app, item_id=1)
    else:
        shop.outbox.send("item.sold", {"item_id": 1}, key="item:1")


WAYS = pytest.mark.parametrize("way", ["signal", "outbox.send"])


@WAYS
@pytest.mark.parametrize("usual_reads", [True, False])
@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_session_of_the_views_own_has_the_message_where_only_it_wrote(
    store: Shop, way: str, usual_reads: bool, end: str
) -> None:
    with store.app.app_context(), Session(store.db.engine) as own:
        if usual_reads:  # a user is loaded
            store.db.session.execute(_LOOK)
        own.execute(_SELL)
        send(store, way)
        getattr(own, end)()
        store.db.session.commit()
    assert (tickets(store), len(store.bodies())) == ((1, 1) if end == "commit" else (0, 0))


@WAYS
def test_the_session_of_the_app_has_the_message_where_another_one_only_read(store: Shop, way: str) -> None:
    with store.app.app_context(), Session(store.db.engine) as own:
        own.execute(_LOOK)
        store.db.session.execute(_SELL)
        send(store, way)
        store.db.session.commit()
    assert (tickets(store), len(store.bodies())) == (1, 1)


@WAYS
@pytest.mark.parametrize("statement", [_SELL, _LOOK], ids=["both wrote", "both read"])
def test_of_two_sessions_that_could_be_meant_none_is_taken(store: Shop, way: str, statement: sa.TextClause) -> None:
    with store.app.app_context(), Session(store.db.engine) as own:
        for session in (store.db.session, own):
            session.execute(statement)
        with pytest.raises(
            CaptureError, match=r"2 sessions are open here .*: Session on postgres.*; say which one: signal\.send\(s"
        ):
            send(store, way)
        for session in (store.db.session, own):
            with pytest.raises(CaptureError, match="can only be rolled back"):
                session.commit()
            session.rollback()
        store.db.session.execute(_LOOK)
        own.execute(_SELL)
        store.signal.send(own, item_id=1)
        own.commit()
    assert (tickets(store), len(store.bodies())) == (1, 1)


def test_a_session_that_was_passed_over_because_it_had_only_read_does_not_write_after_all(store: Shop) -> None:
    with store.app.app_context(), Session(store.db.engine) as own:
        store.db.session.execute(_LOOK)
        own.execute(_SELL)
        send(store, "signal")
        with pytest.raises(
            CaptureError, match=r"had written nothing when signal 'sold' sent a message, so .*; .* say which one"
        ):
            store.db.session.execute(_SELL)
        own.commit()
        store.db.session.execute(_SELL)
        store.db.session.commit()
    assert (tickets(store), len(store.bodies())) == (2, 1)


def test_a_session_of_an_outer_context_is_no_other_session(store: Shop) -> None:
    """A test that has its own context open around the client's."""
    with store.app.app_context():
        store.db.session.execute(_SELL)
        with store.app.app_context():
            store.db.session.execute(_SELL)
            send(store, "signal")
            store.db.session.commit()
        store.db.session.rollback()
    assert (tickets(store), len(store.bodies())) == (1, 1)


def test_a_session_on_another_database_is_no_other_session(store: Shop, sqlite_url: str) -> None:
    other = database.create_engine(sqlite_url)
    with store.app.app_context(), Session(other) as statistics:
        statistics.execute(sa.text("CREATE TABLE view (n integer)"))
        store.db.session.execute(_SELL)
        send(store, "signal")
        store.db.session.commit()
        statistics.commit()
    assert (tickets(store), len(store.bodies())) == (1, 1)
    other.dispose()


# --- asynchronous -------------------------------------------------------------------------------------------------------


@WAYS
def test_lite_may_have_sessions_of_both_kinds(postgres_url: str, way: str) -> None:
    """A synchronous one looks something up before the request, and the view works with the asynchronous one."""

    def both(app: Flask, url: str) -> Any:
        app.config["SQLALCHEMY_ASYNC_ENGINES"] = {"default": url}
        return with_lite(app, url)

    shop = open_shop(both, postgres_url)
    db, app = shop.db, shop.app
    with shop.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE ticket (n integer)"))

    @app.before_request
    def look() -> None:
        db.session.execute(_LOOK)

    @app.post("/async/<end>")
    async def sell(end: str) -> str:
        await db.async_session.execute(_SELL)
        send(shop, way)
        await getattr(db.async_session, end)()
        await db.async_session.close()
        await db.async_engine.dispose()
        db.session.commit()
        return "done"

    assert shop.post("/async/commit") == 200
    assert (tickets(shop), len(shop.bodies())) == (1, 1)
    assert shop.post("/async/rollback") == 200
    assert (tickets(shop), len(shop.bodies())) == (1, 1)
    shop.engine.dispose()


def test_lite_may_have_asynchronous_sessions_only(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/async.db"
    migrations.upgrade(engine := database.create_engine(url))
    app, db, outbox, signal = Flask("shop"), flask_sqlalchemy_lite.SQLAlchemy(), Outbox(), Namespace().signal("sold")
    app.config["SQLALCHEMY_ASYNC_ENGINES"] = {"default": url.replace("sqlite:", "sqlite+aiosqlite:")}
    app.config["OUTBOX_SOURCE"] = "/async"
    db.init_app(app)
    outbox.init_app(app)
    outbox.capture(signal, topic="item.sold")

    async def sell() -> None:
        await db.async_session.execute(sa.text("SELECT 1"))
        signal.send(app, item_id=1)
        await db.async_session.commit()
        await db.async_session.close()
        await db.async_engine.dispose()

    with app.app_context():
        asyncio.run(sell())
    with engine.connect() as connection:
        assert connection.scalars(sa.select(tables.message.c.source)).all() == ["/async"]
    with pytest.raises(ConfigurationError, match="app 'shop' uses aiosqlite, which commands can't; set DATABASE_URL"):
        app.extensions["outbox"].engine()
    engine.dispose()
