"""Checks and what they found: one aligned line each, with the next step below."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import text

if TYPE_CHECKING:
    from collections.abc import Iterable


class Verdict(StrEnum):
    """What a check says. Unknown is not fine: nobody looked."""

    OK = "OK"
    WARN = "WARN"
    UNKNOWN = "UNKNOWN"
    FAIL = "FAIL"


_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.UNKNOWN: "yellow", Verdict.FAIL: "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer of one check."""

    check: str
    verdict: Verdict
    detail: str
    next_step: str = ""


def as_dicts(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return *findings* under the names that `--json` promises."""
    return [
        {"check": item.check, "verdict": item.verdict.value, "detail": item.detail, "next_step": item.next_step}
        for item in findings
    ]


def line(item: Finding, wide: int) -> str:
    """Return the line of *item*; *wide* is the width of the column of checks."""
    verdict = click.style(f"{item.verdict.value:<7}", fg=_COLOURS[item.verdict])
    first, *others = item.detail.splitlines() or [""]
    lines = [f"{verdict}  {item.check:<{wide}}  {first}", *(f"{'':<{wide + 11}}{other}" for other in others)]
    if item.next_step:
        lines.append(f"{'':<{wide + 11}}{text.dim('→')} {item.next_step}")
    return "\n".join(lines)


def show(found: list[Finding], *, as_json: bool) -> None:
    """Print *found*, aligned or as JSON."""
    if as_json:
        text.say_json(as_dicts(found))
        return
    wide = max((len(item.check) for item in found), default=0)
    for item in found:
        text.say(line(item, wide))


def count(findings: Iterable[Finding], verdict: Verdict) -> int:
    """Return how many of *findings* say *verdict*."""
    return sum(item.verdict is verdict for item in findings)
