"""Engines as this project needs them."""

from __future__ import annotations

import sqlite3
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError

from outbox import database
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_sqlite_engine_makes_the_folder_of_its_file(tmp_path: Path) -> None:
    database.create_engine(f"sqlite:///{tmp_path}/a/b/x.db").connect().close()
    assert (tmp_path / "a" / "b" / "x.db").exists()


def test_a_folder_that_can_not_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigurationError, match=rf"the folder {tmp_path}/file of the SQLite file can't be made: File exists; correct"
    ):
        database.create_engine(f"sqlite:///{tmp_path}/file/x.db")


def test_what_sqlite_acknowledges_survives_a_power_cut(sqlite_url: str) -> None:
    with database.create_engine(sqlite_url).connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        if sqlite3.sqlite_version_info < (3, 51, 3):  # before, two processes that checkpoint a WAL at once can lose a commit
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() in ("delete", "truncate")


def test_a_savepoint_on_sqlite_is_inside_its_transaction(sqlite_url: str) -> None:
    engine = database.create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
    with engine.connect() as connection:
        outer = connection.begin()
        with connection.begin_nested():
            connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        outer.rollback()
        assert connection.exec_driver_sql("SELECT count(*) FROM t").scalar() == 0


def test_two_sqlite_transactions_that_read_and_then_write_wait_for_each_other(sqlite_url: str) -> None:
    engine = database.create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO t VALUES (0)")
    together = threading.Barrier(2)

    def add() -> None:
        together.wait(10)
        for _ in range(20):
            with engine.begin() as connection:
                number = connection.exec_driver_sql("SELECT n FROM t").scalar_one()
                connection.exec_driver_sql("UPDATE t SET n = ?", (number + 1,))

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT n FROM t").scalar() == 40


def test_readers_do_not_wait_for_a_writer(sqlite_url: str) -> None:
    engine = database.create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
    with engine.begin() as writer:
        writer.exec_driver_sql("INSERT INTO t VALUES (1)")
        with database.reading(engine).connect() as reader:
            assert reader.exec_driver_sql("SELECT count(*) FROM t").scalar() == 0


def test_an_engine_made_elsewhere_is_prepared_once(sqlite_url: str) -> None:
    engine = sa.create_engine(sqlite_url)
    engine.connect().close()  # a connection made before is not configured
    assert not database.is_prepared(engine)
    assert database.prepare(database.prepare(engine)) is engine
    assert database.is_prepared(engine)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000


def test_an_engine_made_elsewhere_keeps_what_its_application_chose(sqlite_url: str) -> None:
    engine = sa.create_engine(sqlite_url, connect_args={"timeout": 7})

    @event.listens_for(engine, "connect")
    def choose(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql("CREATE TABLE child (parent INTEGER REFERENCES parent)")
    database.prepare(engine)
    with engine.connect() as one, engine.connect() as another:  # of two, none can change the journal
        for connection in (one, another):
            names = ("journal_mode", "synchronous", "busy_timeout", "foreign_keys")
            chosen = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]
            assert chosen == ["wal", 1, 7_000, 0]
            connection.rollback()
        one.exec_driver_sql("INSERT INTO child VALUES (99)")  # of no parent: the application never asked for constraints
        one.commit()


def test_an_engine_of_ours_leaves_a_wal_to_who_has_it_open(sqlite_url: str) -> None:
    with sa.create_engine(sqlite_url).connect() as theirs:
        theirs.exec_driver_sql("PRAGMA journal_mode=WAL")
        theirs.exec_driver_sql("CREATE TABLE t (n INTEGER)")
        with database.create_engine(sqlite_url).begin() as ours:
            assert ours.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            ours.exec_driver_sql("INSERT INTO t VALUES (1)")
        assert theirs.exec_driver_sql("SELECT n FROM t").scalar() == 1


@pytest.mark.parametrize("at_connect", [True, False], ids=["of the engine", "of one connection"])
def test_a_sqlite_connection_in_autocommit_still_commits_by_itself(sqlite_url: str, at_connect: bool) -> None:
    told: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}
    engine = database.prepare(sa.create_engine(sqlite_url, **told if at_connect else {}))
    with engine.connect().execution_options(**{} if at_connect else told) as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        connection.exec_driver_sql("VACUUM")  # which no transaction takes
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT n FROM t").scalar() == 1


def test_parameters_are_in_no_error(sqlite_url: str) -> None:
    engine = database.create_engine(sqlite_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n TEXT PRIMARY KEY)")
        connection.exec_driver_sql("INSERT INTO t VALUES (?)", ("a secret payload",))
    with pytest.raises(IntegrityError) as raised, engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO t VALUES (:n)"), {"n": "a secret payload"})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "fix"),
    [
        ("mysql+mysqldb://u:hunter2@host/db", "pip install 'flask-outbox[mysql]'"),
        ("postgresql+psycopg://u:hunter2@host/db", "pip install 'flask-outbox[postgres]'"),
    ],
)
def test_a_driver_that_is_not_installed_is_named_with_what_to_install(
    url: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for driver in ("MySQLdb", "psycopg"):
        monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ConfigurationError) as refused:
        database.create_engine(url)
    assert str(refused.value).startswith(url.partition("://")[0] + "://…: its driver is not installed")
    assert str(refused.value).endswith(fix)
    assert "hunter2" not in str(refused.value)


def test_an_asynchronous_driver_is_refused_with_one_that_works() -> None:
    with pytest.raises(ConfigurationError, match=r"^sqlite\+aiosqlite://…: its driver is asynchronous, .*; use postgresql"):
        database.create_engine("sqlite+aiosqlite:///x.db")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "postgresql+pg8000",
            "the driver pg8000 is not supported (supported: psycopg, psycopg2): what it stores would be a guess",
        ),
        ("postgresql+nosuch", "the driver nosuch is not supported"),
        ("sqlite+nosuch", "the driver nosuch is not supported (supported: pysqlite, pysqlcipher)"),
        ("oracle", "oracle is not supported; use postgresql+psycopg:// or sqlite:///"),
    ],
)
def test_a_driver_that_nobody_tried_is_refused_with_one_that_works(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        database.create_engine(f"{name}://u:hunter2@host/db")
    assert text in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_an_application_s_own_engine_with_a_driver_that_nobody_tried_is_refused() -> None:
    engine = sa.create_engine("postgresql+psycopg://")
    engine.dialect.driver = "homemade"
    with pytest.raises(ConfigurationError, match=r"^the driver homemade is not supported"):
        database.prepare(engine)


# --- what a connection to PostgreSQL is told ------------------------------------------------------------------------------


def arguments(url: str, **options: Any) -> dict[str, Any]:
    """What the driver would be given for *url*."""
    given: list[dict[str, Any]] = []
    engine = database.create_engine(url, **options)

    @event.listens_for(engine, "do_connect")
    def refuse(_dialect: object, _record: object, _args: object, parameters: dict[str, Any]) -> None:
        given.append(parameters)
        raise ConnectionRefusedError

    with pytest.raises(ConnectionRefusedError):
        engine.connect()
    return given[0]


DRIVERS = ["psycopg", "psycopg2"]


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("role", database.Role)
def test_whoever_connects_notices_within_seconds_that_the_other_end_is_gone(driver: str, role: database.Role) -> None:
    told = arguments(f"postgresql+{driver}://u@host/db", role=role)
    assert (told["connect_timeout"], told["tcp_user_timeout"]) == (10, 15_000)
    assert (told["keepalives"], told["keepalives_idle"], told["keepalives_interval"], told["keepalives_count"]) == (1, 5, 5, 3)


@pytest.mark.parametrize("driver", DRIVERS)
def test_what_the_url_says_of_a_connection_wins(driver: str) -> None:
    told = arguments(f"postgresql+{driver}://u@host/db?keepalives_idle=60&connect_timeout=2&application_name=shop")
    assert (told["keepalives_idle"], told["connect_timeout"], told["application_name"]) == ("60", "2", "shop")
    assert told["keepalives_count"] == 3


def test_what_the_caller_says_of_a_connection_wins() -> None:
    told = arguments("postgresql+psycopg://u@host/db", connect_args={"connect_timeout": 1, "prepare_threshold": 7})
    assert (told["connect_timeout"], told["prepare_threshold"]) == (1, 7)


@pytest.mark.parametrize(
    ("query", "threshold"),
    [("", None), ("?prepare_threshold=none", None), ("?prepare_threshold=0", 0), ("?prepare_threshold=9", 9)],
)
def test_no_statement_is_prepared_unless_the_url_asks_for_it(query: str, threshold: int | None) -> None:
    assert arguments(f"postgresql+psycopg://u@host/db{query}")["prepare_threshold"] == threshold
    assert "prepare_threshold" not in arguments(f"postgresql+psycopg2://u@host/db{query}")  # which never prepares


def test_a_threshold_that_is_no_number_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"^prepare_threshold=often: it must be a number of executions, or none"):
        database.create_engine("postgresql+psycopg://u@host/db?prepare_threshold=often")
