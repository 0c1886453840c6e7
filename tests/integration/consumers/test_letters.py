"""The letters of the notifications service on real databases: claimed once, whoever asks."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from consumers.notifications import model
from consumers.notifications.letters import Letter
from outbox.database import create_engine

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
both = pytest.mark.parametrize("database_url", ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)


@pytest.fixture
def engine(database_url: str) -> sa.Engine:
    engine = create_engine(database_url)
    model.Base.metadata.create_all(engine)
    return engine


def _letters(engine: sa.Engine, *addresses: str) -> None:
    letters = [Letter(n, "Ada", address, "subject", "text") for n, address in enumerate(addresses)]
    with sa.orm.Session(engine) as session, session.begin():
        model.add(session, "/x", "message", NOON, letters, NOON)


def _claim(engine: sa.Engine, now: datetime = NOON) -> model.Claim | None:
    with engine.begin() as connection:
        return model.claim(connection, now)


@both
def test_each_letter_is_claimed_by_one_of_many(engine: sa.Engine) -> None:
    _letters(engine, *(f"s{n}@example.org" for n in range(40)))
    claimed: list[int] = []

    def work() -> None:
        while (claim := _claim(engine)) is not None:
            claimed.append(claim.id)
            with engine.begin() as connection:
                model.sent(connection, claim, NOON)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(claimed) == len(set(claimed)) == 40


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_a_letter_that_another_process_is_claiming_is_passed_over(engine: sa.Engine) -> None:
    _letters(engine, "ada@example.org", "grace@example.org")
    with engine.begin() as connection:
        first = model.claim(connection, NOON)
        second = _claim(engine)
        assert _claim(engine) is None
    assert [each and each.address for each in (first, second)] == ["ada@example.org", "grace@example.org"]


@both
def test_the_next_letter_to_an_address_waits_until_the_one_before_is_settled(engine: sa.Engine) -> None:
    _letters(engine, "ada@example.org", "ada@example.org")
    first = _claim(engine)
    assert first is not None
    assert _claim(engine) is None
    with engine.begin() as connection:
        model.later(connection, first, NOON + timedelta(minutes=1), "busy")
    assert _claim(engine) is None
    again = _claim(engine, NOON + timedelta(minutes=1))
    assert again is not None
    assert again.id == first.id
    with engine.begin() as connection:
        model.given_up(connection, again, NOON, "gone")
    second = _claim(engine)
    assert second is not None
    assert second.id != first.id
