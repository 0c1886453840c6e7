"""What was sent is what is stored, published and applied: whatever PostgreSQL was set to, whichever driver is used."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import CaptureError, Outbox, database, migrations
from outbox.cli.context import Context
from outbox.consumer.outcomes import Outcome
from outbox.message import Message, new_id
from outbox.relay.daemon import open_database
from outbox.settings import load
from outbox.store import relaying, status
from outbox.store.relaying import Exclusions
from outbox.tables import State
from tests.kit.builders import message, write
from tests.kit.consuming import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from uuid import UUID

    from sqlalchemy.engine import Engine


DRIVERS = ["psycopg", "psycopg2"]
#: Settings of a server, database or role that change how values are written as text, or transactions work.
PECULIAR = {
    "standard_conforming_strings": "off",
    "escape_string_warning": "on",
    "datestyle": "'SQL, DMY'",
    "intervalstyle": "'sql_standard'",
    "bytea_output": "'escape'",
    "timezone": "'Asia/Kathmandu'",
    "default_transaction_isolation": "'serializable'",
    "extra_float_digits": "-5",
    "quote_all_identifiers": "on",
    "client_min_messages": "'debug1'",
}
NASTY = "it's \\x41 \\\\ \" {a,b} \u20ac \U0001f600 ' \\' E'x' %s :name $1 \n"

KEY = "it's \\x41 {a,b} \u20ac"


def with_driver(url: str, driver: str) -> str:
    return url.replace("+psycopg:", f"+{driver}:")


def configure(url: str, settings: Mapping[str, str]) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for name, value in settings.items():
            connection.exec_driver_sql(f'ALTER DATABASE "{engine.url.database}" SET {name} = {value}')
    engine.dispose()


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["usual", "peculiar"])
def any_url(request: pytest.FixtureRequest, postgres_url: str, driver: str) -> str:
    """The URL of a database, also of one whose settings are peculiar."""
    if request.param == "peculiar":
        configure(postgres_url, PECULIAR)
    return with_driver(postgres_url, driver)


@contextmanager
def disposing(engine: Engine) -> Iterator[Engine]:
    yield engine
    engine.dispose()


def stored(engine: Engine) -> list[Message]:
    """What a relay would publish, read as it reads."""
    with database.reading(engine).connect() as connection:
        rows = relaying.read(connection, after=0, limit=100, exclude=Exclusions()).rows
        content = relaying.messages(connection, [row.message_row for row in rows], max_bytes=10_000_000)
    return [content.found[row.message_row] for row in rows]  # type: ignore[misc]


@pytest.mark.parametrize("ours", [True, False], ids=["an engine of ours", "an engine made elsewhere"])
def test_what_was_sent_is_what_is_stored(any_url: str, ours: bool) -> None:
    data, outbox = {"text": NASTY}, Outbox(source="/shop's")
    sent: list[UUID] = []
    with disposing(database.create_engine(any_url)) as reader:
        migrations.upgrade(reader)
        with disposing(database.create_engine(any_url) if ours else database.prepare(sa.create_engine(any_url))) as writer:
            for count in (1, 3):  # which are written by different statements
                with Session(writer) as session, session.begin():
                    sent += [outbox.send("t", data | {"n": n}, session=session, key=KEY) for n in range(count)]
        found = stored(reader)
    assert [each.id for each in found] == sent
    assert [json.loads(each.body) for each in found] == [data | {"n": n} for n in (0, 0, 1, 2)]
    assert [(each.source, each.key, each.sequence) for each in found] == [("/shop's", KEY, n) for n in (1, 2, 3, 4)]
    assert all(abs((each.created_at - datetime.now(UTC)).total_seconds()) < 600 for each in found)


def test_what_a_relay_reads_and_settles_is_what_an_operator_sees(any_url: str) -> None:
    with disposing(open_database(any_url)) as engine:
        migrations.upgrade(engine)
        with engine.begin() as connection:
            write(connection, *(message("t", KEY) for _ in range(3)), state=State.RETRYING)
        with database.reading(engine).connect() as connection:
            assert relaying.census(connection).by_state == {State.RETRYING: 3}
            assert status.overview(connection).pending == 3


def test_a_command_reads_on_the_app_s_own_engine_whatever_its_sessions_are_set_to(any_url: str, tmp_path: Path) -> None:
    with disposing(sa.create_engine(any_url)) as engine:
        migrations.upgrade(engine)
        with engine.begin() as connection:
            write(connection, message("t", KEY))
        here = Context(load({"DATABASE_URL": any_url}, environ={}, folder=tmp_path), topics=None, app_engine=engine)
        with here.reading() as connection:
            assert relaying.census(connection).lag_seconds < 600
            assert status.overview(connection).pending == 1


def test_what_a_service_applies_parks_and_counts_is_right(any_url: str) -> None:
    with disposing(database.create_engine(any_url, role=database.Role.SERVICE)) as engine:
        stage = Stage(engine)
        one = Message(
            id=new_id(),
            source="/x's",
            topic="session.modified",
            key=KEY,
            sequence=1,
            body=b'{"number": 1}',
            created_at=datetime.now(UTC),
        )
        unreadable = NASTY.encode()
        assert stage.settle(one, one, unreadable) == [Outcome.APPLIED, Outcome.DUPLICATE, Outcome.PARKED]
        assert [bytes(row.body) for row in stage.parked] == [unreadable]
        assert (stage.status.applied_total, stage.status.duplicates_total, stage.status.parked) == (1, 1, 1)


# --- encodings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "key"), [("SQL_ASCII", "\u20ac"), ("LATIN1", "\xfc")])
def test_what_a_database_of_another_encoding_can_hold_is_what_was_sent(
    driver: str, encoding: str, key: str, make_encoded: Callable[[str], str]
) -> None:
    url = with_driver(make_encoded(encoding), driver)
    with disposing(database.create_engine(url)) as engine:
        migrations.upgrade(engine)
        for count in (1, 2):
            with Session(engine) as session, session.begin():
                for _ in range(count):
                    Outbox(source="/x").send("t", {"text": NASTY}, session=session, key=key, headers={"who": "\u20ac"})
        found = stored(engine)
    assert [(each.key, json.loads(each.body), each.headers) for each in found] == [
        (key, {"text": NASTY}, {"who": "\u20ac"})
    ] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_a_key_that_a_database_has_no_letters_for_is_refused_by_a_text(
    driver: str, count: int, make_encoded: Callable[[str], str]
) -> None:
    url = with_driver(make_encoded("LATIN1"), driver)
    with disposing(database.create_engine(url)) as ours, disposing(sa.create_engine(url)) as theirs:
        migrations.upgrade(ours)
        for engine, what in ((ours, "the encoding of this database has no character"), (theirs, "client_encoding")):
            with Session(engine) as session:
                session.begin()
                for _ in range(count):
                    Outbox(source="/x").send("t", {"secret": 1}, session=session, key="\u20ac")
                with pytest.raises(CaptureError, match=what) as refused:
                    session.commit()
            assert "secret" not in str(refused.value)
