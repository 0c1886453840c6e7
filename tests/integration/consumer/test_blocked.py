"""A service whose transactions wait for another's locks says for whose."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import database
from outbox.consumer.blocked import Blocked
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

_LOCK = sa.text("SELECT pg_advisory_xact_lock(7)")


def take_the_lock(engine: Engine) -> threading.Thread:
    def take() -> None:
        with engine.begin() as connection:
            connection.execute(_LOCK)

    thread = threading.Thread(target=take)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("outbox exports elsewhere:17", "waits for 'outbox exports elsewhere:17' at 127.0.0.1 (server process"),
        (None, "waits for another transaction of its own (server process"),
    ],
    ids=["another process", "this process"],
)
def test_a_service_says_for_whom_it_waits_and_when_it_goes_on(
    postgres_url: str, name: str | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    engine = database.create_engine(postgres_url, role=database.Role.SERVICE, name="exports")
    arguments = {"application_name": name} if name else {}
    other = database.create_engine(postgres_url, role=database.Role.SERVICE, name="exports", connect_args=arguments)
    blocked = Blocked("exports", patience_seconds=0.1)

    def look() -> list[str]:
        with database.autocommitting(engine).connect() as connection:
            blocked.look(connection)
        return [record.getMessage() for record in caplog.records if getattr(record, "outbox_event", "") == "consumer.blocked"]

    with other.begin() as holder:
        holder.execute(_LOCK)
        assert look() == []
        waiting = take_the_lock(engine)
        (sentence,) = eventually(look, what="the service to say for whom it waits")
        assert words in sentence
        assert look() == [sentence]  # once
    waiting.join(10)
    look()
    assert "service 'exports' goes on" in caplog.text
    for each in (engine, other):
        each.dispose()
