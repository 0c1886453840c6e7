"""What `outbox doctor` says of a PostgreSQL whose settings stand in our way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox.cli import server_settings
from outbox.database import create_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine


def said(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        found = [f"{each.verdict.value} {each.detail}" for each in server_settings.examine(connection)]
    engine.dispose()
    return found


def test_nothing_is_said_of_a_server_as_it_comes(postgres_url: str) -> None:
    assert said(create_engine(postgres_url)) == []


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("statement_timeout = '2s'", "WARN statement_timeout=2000ms"),
        ("default_transaction_read_only = on", "FAIL default_transaction_read_only=on"),
    ],
)
def test_a_setting_that_stands_in_our_way_is_named(postgres_url: str, setting: str, words: str) -> None:
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(f'ALTER DATABASE "{engine.url.database}" SET {setting}')
    engine.dispose()
    assert [each[: len(words)] for each in said(engine)] == [words]


def test_a_pooler_is_named_and_an_engine_that_prepares_statements_through_it(pooled_url: str) -> None:
    ours, theirs = said(create_engine(pooled_url)), said(sa.create_engine(pooled_url))
    assert ours == ["WARN a pooler stands between: a relay hears of no commit through it, and polls"]
    assert theirs[:1] == ours
    assert "prepares statements" in theirs[1]


def test_an_encoding_that_lacks_letters_is_named(make_encoded: Callable[[str], str]) -> None:
    assert "the database's encoding is LATIN1" in said(create_engine(make_encoded("LATIN1")))[0]
