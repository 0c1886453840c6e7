"""How commands look: aligned columns, calm colours, times in UTC, ages in words. JSON for machines."""

from __future__ import annotations

import errno
import json
import os
import sys
import unicodedata
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from outbox.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

#: A narrower terminal is written over its edge: words of a letter a line help nobody.
_LEAST_ROOM = 20
_USUAL_COLUMNS = 80

COLOURS = {
    "published": "green",
    "running": "green",
    "ok": "green",
    "retrying": "yellow",
    "unroutable": "yellow",
    "unknown": "yellow",
    "silent": "yellow",
    "dead": "red",
    "fail": "red",
    "discarded": "bright_black",
}


def say(text: str = "", *, error: bool = False, newline: bool = True) -> None:
    """Print *text*; colours only on a terminal, and never with NO_COLOR."""
    with _written():
        click.echo(text, err=error, nl=newline, color=False if os.environ.get("NO_COLOR") else None)


def say_json(value: Any, *, line: bool = False) -> None:
    """Print *value* as JSON, indented, or on one *line*."""
    with _written():
        # Where a letter can't be written it is escaped: a machine reads the same.
        plain = not (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        click.echo(json.dumps(value, ensure_ascii=plain, indent=None if line else 2, default=_plain))


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read it has enough: click ends the command
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or Python tries once more at its end, and says so
        raise OutboxError(f"what it printed could not be written: {error.strerror}") from error


def _plain(value: Any) -> str:
    return moment(value) if isinstance(value, datetime) else str(value)


def coloured(word: str) -> str:
    """Return *word* in the colour of what it means."""
    return click.style(word, fg=COLOURS[word.lower()]) if word.lower() in COLOURS else word


def dim(text: str) -> str:
    """Return *text* as what need not be read."""
    return click.style(text, dim=True)


def moment(at: datetime | None) -> str:
    """Return *at* in UTC as ISO 8601 with milliseconds: `2026-11-23T02:21:56.123Z`."""
    if at is None:
        return ""
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def age(seconds: float) -> str:
    """Return *seconds* in words, in two units at most: `0.3 s`, `42 s`, `3 min 5 s`, `2 h 10 min`, `4 d 1 h`."""
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    whole = int(seconds)
    for name, size, smaller, step in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            rest = whole % size // step
            return f"{whole // size} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def amount(count: int, one: str, many: str = "") -> str:
    """Return the count with its noun: `1 message`, `12,345 messages`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """Return aligned columns under dim headings; those named in *right* end together, STATE has its colour.

    On a terminal the last column is cut to fit.
    """
    widths = [max([width(head[n]), *(width(row[n]) for row in rows)]) for n in range(len(head))]
    lines = [dim(_line(head, widths, head, right))]
    lines += [_line(row, widths, head, right) for row in rows]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int], head: Sequence[str], right: Collection[str]) -> str:
    padded = []
    room = _room()
    for cell, wide, name in zip(cells, widths, head, strict=True):
        last = name == head[-1]
        text = cut(one_line(cell), room) if last else one_line(cell)
        gap = "" if last and name not in right else " " * (wide - width(text))
        shown = coloured(text) if name == "STATE" else text
        padded.append(gap + shown if name in right else shown + gap)
        room -= wide + 2
    return "  ".join(padded).rstrip()


def _room() -> int:
    """The columns of the terminal; plenty where there is none."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError, AttributeError):  # AttributeError: started with stdout closed, Python has none
        return 10_000
    return columns or _USUAL_COLUMNS  # `docker exec -t`, `ssh -tt` and CI make terminals of no size


def wrapped(sentence: str, *, indent: str) -> str:
    """Return *sentence* in lines that fit the terminal, all but the first indented; one line where there is none."""
    room = max(_room() - len(indent), _LEAST_ROOM)
    return click.wrap_text(sentence, room, subsequent_indent=indent)


def one_line(text: str) -> str:
    """Return *text* without line breaks and control characters: what others wrote must not drive the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def fact(name: str, value: str) -> str:
    """Return a line of a page about one thing: a dim name, and its value on one line."""
    return f"  {dim(f'{name:<11}')}{one_line(value)}"


def printable(text: str) -> str:
    """Return *text* in its lines, but without other control characters."""
    return "\n".join(one_line(line) for line in text.split("\n"))


def cut(text: str, room: int) -> str:
    """Return *text*, ended by `…` where it is wider than *room* (but at least 20) columns."""
    room = max(room, _LEAST_ROOM)
    return text if width(text) <= room else text[: room - 1] + "…"


def width(text: str) -> int:
    """Return the columns that *text* takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) != 0 for character in text)
