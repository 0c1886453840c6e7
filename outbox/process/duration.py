"""Durations as people write them: `500ms`, `30s`, `5m`, `2h`, `7d`. Inside the code every duration is a float of seconds."""

from __future__ import annotations

import re

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SHAPE = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse(text: str) -> float:
    """Return the seconds that *text* means; raise ValueError, saying the shape, for anything else (a bare number too)."""
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise ValueError("a duration is a number and a unit: 500ms, 30s, 5m, 2h or 7d")
    return float(match[1]) * _SECONDS[match[2]]


def format(seconds: float) -> str:
    """Return *seconds* in the largest unit that keeps it exact: 90.0 is `90s`, 120.0 is `2m`."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / _SECONDS[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    number, unit = (seconds * 1000, "ms") if seconds < 1 else (seconds, "s")
    return f"{number:.3f}".rstrip("0").rstrip(".") + unit
