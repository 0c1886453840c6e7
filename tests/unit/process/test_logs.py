"""How processes speak: one line an event, for people or for machines."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from outbox.process import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("outbox.test_logs")


@pytest.fixture(autouse=True)
def _root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_console_line_has_time_level_event_sentence_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console")
    logs.say(log, logging.INFO, "broker.connected", "connected to the broker", exchange="openevent", seconds=0.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO    broker.connected: connected to the broker exchange=openevent seconds=0.5")


def test_a_json_line_has_the_same_as_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    logs.say(log, logging.WARNING, "broker.lost", "the broker is gone – später", attempt=2)
    (line,) = capsys.readouterr().err.splitlines()
    found = json.loads(line)
    assert found.pop("time").endswith("Z")
    assert found == {
        "level": "warning",
        "event": "broker.lost",
        "message": "the broker is gone – später",
        "logger": "outbox.test_logs",
        "attempt": 2,
    }


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_line_break_in_what_others_said_makes_no_second_line(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(log_format)
    logs.say(log, logging.INFO, "broker.lost", "first\nsecond", detail="third\r\n\x1b[31mfourth")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_record_of_another_library_becomes_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json")
    logging.getLogger("elsewhere").warning("%d percent", 99)
    found = json.loads(capsys.readouterr().err)
    assert (found["event"], found["message"], found["logger"]) == ("log", "99 percent", "elsewhere")


def test_an_exception_is_kept_in_both_formats(capsys: pytest.CaptureFixture[str]) -> None:
    for log_format in ("console", "json"):
        logs.configure(log_format)
        try:
            raise ValueError("the cause")
        except ValueError:
            log.exception("it failed")
        assert "ValueError: the cause" in capsys.readouterr().err


def test_libraries_that_log_payloads_are_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console")
    logging.getLogger("pika.channel").warning("returned: the first 255 bytes of a body")
    assert capsys.readouterr().err == ""


def test_lines_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("console", level=logging.WARNING)
    logs.say(log, logging.INFO, "relay.started", "started")
    assert capsys.readouterr().err == ""
