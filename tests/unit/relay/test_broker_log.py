"""Each change of state is logged once, however often it is found again."""

from __future__ import annotations

import logging

import pytest

from outbox.relay.broker_log import News


@pytest.fixture(autouse=True)
def _listen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="outbox")


def test_troubles_that_alternate_are_told_once_each_until_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    news = News()
    for _ in range(3):
        news.trouble("blocked", "memory alarm")
        news.trouble("lost", "no confirm")
    news.well("connected")
    news.trouble("lost", "no confirm")
    assert caplog.messages == ["memory alarm", "no confirm", "connected", "no confirm"]


def test_after_a_connection_that_confirmed_nothing_only_a_confirm_is_good_news(caplog: pytest.LogCaptureFixture) -> None:
    news = News()
    news.connected("connected")
    news.trouble("refused", "403", logging.ERROR)
    news.doubt(True)
    news.connected("connected")
    news.trouble("refused", "403", logging.ERROR)
    news.doubt(True)
    news.connected("connected")
    news.confirmed("takes messages again")
    news.confirmed("takes messages again")
    assert caplog.messages == ["connected", "403", "takes messages again"]
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR", "INFO"]
