"""How commands look."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta, timezone
from types import SimpleNamespace

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.cli import text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "0.0 s"),
        (0.04, "0.0 s"),
        (0.31, "0.3 s"),
        (9.94, "9.9 s"),
        (42.9, "42 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (3601, "1 h"),
        (90000, "1 d 1 h"),
    ],
)
def test_an_age_is_said_in_two_units_at_most(seconds: float, words: str) -> None:
    assert text.age(seconds) == words


def test_moments_are_utc_iso_8601_with_milliseconds() -> None:
    local = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    assert text.moment(local) == "2026-03-01T10:00:00.123Z"
    assert text.moment(None) == ""


def test_amounts_carry_their_noun() -> None:
    assert [text.amount(number, "message") for number in (0, 1, 12345)] == ["0 messages", "1 message", "12,345 messages"]


def test_columns_are_aligned_also_under_wide_and_coloured_cells() -> None:
    shown = click.unstyle(
        text.table(("KEY", "STATE", "N", "NOTE"), [("漢字", "dead", "7", "x"), ("k", "published", "12", "y")], right=("N",))
    )
    assert shown.splitlines() == [
        "KEY   STATE       N  NOTE",
        "漢字  dead        7  x",
        "k     published  12  y",
    ]


def test_only_states_have_colours() -> None:
    line = text.table(("TOPIC", "STATE"), [("dead", "dead")]).splitlines()[1]
    assert line == f"dead   {click.style('dead', fg='red')}"


@given(st.text())
def test_what_others_wrote_can_not_drive_the_terminal(written: str) -> None:
    assert text.one_line(written).isprintable() or not written
    assert all(line.isprintable() or not line for line in text.printable(written).split("\n"))
    assert len(text.one_line(written)) == len(written)


def test_text_is_cut_to_the_room_with_a_sign() -> None:
    assert text.cut("x" * 30, 25) == "x" * 24 + "…"
    assert text.cut("x" * 25, 25) == "x" * 25
    assert text.cut("x" * 30, 1) == "x" * 19 + "…"


@pytest.mark.parametrize("columns", [0, 1, 2, 3, 19, 80])
def test_a_terminal_may_have_any_number_of_columns_also_none(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr("os.get_terminal_size", lambda *_: os.terminal_size((columns, 0)))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1))
    sentence = "no relay is running and 7 messages wait; start one: outbox relay"
    assert text.wrapped(sentence, indent="  ").split() == sentence.split()
    assert len(text.wrapped(sentence, indent="  ").splitlines()) == {0: 1, 80: 1}.get(columns, 4)
    assert "outbox" in text.table(("ID", "NAME"), [("1", "outbox")])


def test_a_table_needs_no_standard_output_to_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)  # as in `outbox config >&-`
    assert text.table(("NAME", "MEANING"), [("x", "y" * 200)]).endswith("y" * 200)


def test_json_has_readable_text_and_moments(capsys: pytest.CaptureFixture[str]) -> None:
    text.say_json({"title": "Grüße", "at": datetime(2026, 1, 1, tzinfo=UTC)}, line=True)
    line = capsys.readouterr().out
    assert line == '{"title": "Grüße", "at": "2026-01-01T00:00:00.000Z"}\n'
    assert json.loads(line)["title"] == "Grüße"


def test_no_color_means_no_color(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text.say(click.style("calm", fg="red"))
    assert capsys.readouterr().out == "calm\n"
