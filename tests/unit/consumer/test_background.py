"""Background work: called until nothing is left, woken by commits, tried again when it fails, finished at the end."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from outbox.consumer import background
from outbox.consumer.background import Worker
from outbox.process.backoff import Backoff
from tests.kit.waiting import eventually

ENGINE: Any = object()


def test_it_is_called_at_start_and_again_until_nothing_is_left() -> None:
    left = [1, 2, 3]

    def work(_engine: Any) -> bool:
        if left:
            left.pop()
        return bool(left)

    worker = Worker("exports", work, ENGINE)
    worker.start()
    eventually(lambda: worker.idle, what="all work done")
    assert left == []
    assert worker.stop(5.0)


def test_a_wake_up_brings_another_call_and_it_is_not_idle_meanwhile() -> None:
    calls: list[int] = []
    goes_on = threading.Event()

    def work(_engine: Any) -> bool:
        calls.append(1)
        if len(calls) == 2:
            goes_on.wait(10)
        return False

    worker = Worker("exports", work, ENGINE)
    worker.start()
    eventually(lambda: worker.idle, what="the first call")
    worker.wake()
    eventually(lambda: len(calls) == 2, what="the second call")
    assert not worker.idle
    goes_on.set()
    assert worker.stop(5.0)


def test_work_that_fails_is_tried_again_and_said_with_its_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(background, "_AFTER_FAILURE", Backoff(0.001, 0.001))
    done = threading.Event()
    failures: list[BaseException] = [OSError("disk full"), SystemExit(1)]

    def work(_engine: Any) -> bool:
        if failures:
            raise failures.pop()
        done.set()
        return False

    worker = Worker("exports", work, ENGINE)
    worker.start()
    assert done.wait(10)
    assert worker.stop(5.0)
    assert "OSError at " in caplog.text
    assert "test_background.py:" in caplog.text
    assert "disk full" not in caplog.text


def test_a_stop_lets_it_finish_what_is_there() -> None:
    begun, goes_on = threading.Event(), threading.Event()
    left = [1, 2, 3]

    def work(_engine: Any) -> bool:
        begun.set()
        goes_on.wait(10)
        left.pop()
        return bool(left)

    worker = Worker("exports", work, ENGINE)
    worker.start()
    assert begun.wait(10)
    assert not worker.stop(0.01)
    goes_on.set()
    assert worker.stop(5.0)
    assert left == []
