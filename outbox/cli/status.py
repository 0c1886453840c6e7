"""`outbox status`: is anything stuck, how old is the oldest message, who works on it."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any

import click

from outbox.cli import context, text
from outbox.cli.failures import THRESHOLD
from outbox.errors import Unavailable

if TYPE_CHECKING:
    from outbox.cli.context import Context
    from outbox.store.status import Overview, Relay, Stuck

#: Holders of keys that the page shows; `--json` has more, `outbox list` all.
_NAMED = 5
_CLEAR = "\x1b[2J\x1b[H"


def seconds(value: str) -> float:
    """Return the seconds that `500ms`, `30s` or `5m` mean; a wrong text is wrong usage."""
    from outbox.process import duration

    try:
        return duration.parse(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines; with --watch one object a line.")
@click.option("--watch", is_flag=True, help="Again and again, until Ctrl-C.")
@click.option("--interval", type=seconds, default="2s", show_default=True, help="How often --watch looks.")
@click.option("--fail-lag", type=seconds, metavar="AGE", help="Exit 3 when the oldest due message is older (60s).")
@click.pass_context
def status(ctx: click.Context, as_json: bool, watch: bool, interval: float, fail_lag: float | None) -> None:
    """Show what waits, for how long, what is stuck and what to do."""
    if watch and fail_lag is not None:
        raise click.UsageError("--fail-lag asks once; it goes without --watch")
    here = context.current()
    if watch:
        _watch(here, as_json, interval)
        return
    found = _read(here)
    if as_json:
        text.say_json(as_dict(found))
    else:
        text.say(as_text(found, str(here.place)))
    if fail_lag is not None and found.lag_seconds > fail_lag:
        ctx.exit(THRESHOLD)


def _watch(here: Context, as_json: bool, interval: float) -> None:
    pause = threading.Event()
    terminal = sys.stdout.isatty()
    trouble = ""
    try:
        while True:
            try:
                found = _read(here)
            except Unavailable as error:  # whoever watches wants to see it come back
                if str(error) != trouble:
                    text.say(str(error), error=True)
                trouble = str(error)
            else:
                trouble = ""
                page = as_text(found, str(here.place))
                if as_json:
                    text.say_json(as_dict(found), line=True)
                else:
                    text.say(_CLEAR + page if terminal else page + "\n")
            pause.wait(interval)
    except KeyboardInterrupt:
        return  # the way out of a command that has no end


def _read(here: Context) -> Overview:
    from outbox.store.status import overview

    with here.reading() as connection:
        return overview(connection)


# --- for machines -------------------------------------------------------------------------------------------------------


def as_dict(found: Overview) -> dict[str, Any]:
    """Return *found* under the names that `--json` promises."""
    from outbox.cli.advice import advice, spokesman

    speaker = spokesman(found)
    return {
        "at": found.at,
        "pending": found.pending,
        "counted_all": found.counted_all,
        "retrying": found.retrying,
        "scheduled": found.scheduled,
        "lag_seconds": round(found.lag_seconds, 3),
        "unroutable": found.unroutable,
        "dead": found.dead,
        "discarded": found.discarded,
        "held_keys": found.held_keys,
        "held_by": [_stuck_dict(item) for item in found.stuck if item.key is not None],
        "published_total": found.published_total,
        "published_per_second": round(found.published_per_second, 3),
        "last_published_at": found.last_published_at,
        "relays": [_relay_dict(item) for item in found.relays],
        "broker": _broker_dict(speaker) if speaker else None,
        "stuck": advice(found),
    }


def _stuck_dict(item: Stuck) -> dict[str, Any]:
    return {
        "id": str(item.id),
        "topic": item.topic,
        "key": item.key,
        "sequence": item.sequence,
        "state": item.state,
        "attempts": item.attempts,
        "last_error": item.last_error,
        "created_at": item.created_at,
        "behind": item.behind,
    }


def _relay_dict(item: Relay) -> dict[str, Any]:
    return {
        "id": item.id,
        "state": _state(item),
        "shards": item.shards,
        "seen_age_seconds": round(item.seen_age_seconds, 3),
        "trouble": item.trouble,
        "started_at": item.started_at,
        "host": item.host,
        "pid": item.pid,
        "version": item.version,
    }


def _broker_dict(speaker: Relay) -> dict[str, Any]:
    return {"connected": speaker.broker_connected, "blocked": speaker.broker_blocked, "detail": speaker.broker_detail}


def _state(item: Relay) -> str:
    from outbox.cli.advice import is_live

    return item.state if is_live(item) else "silent"


# --- for people ---------------------------------------------------------------------------------------------------------


def as_text(found: Overview, where: str) -> str:
    """Return *found* as an aligned page; *where* names the database."""
    from outbox.cli.advice import advice

    at_least = "" if found.counted_all else "+"
    lines = [f"{click.style(where, bold=True)}  {text.dim(text.moment(found.at))}", ""]
    lines += [
        _number("pending", found.pending, _oldest(found), suffix=at_least),
        _number("scheduled", found.scheduled),
        _number("unroutable", found.unroutable, alarm="yellow"),
        _number("dead", found.dead, alarm="red"),
        *_held(found),
        _number("published", found.published_total, _rate(found)),
        "",
        *_relay_lines(found),
        *_broker_line(found),
    ]
    sentence = advice(found)
    if sentence:
        lines += ["", click.style("! ", fg="yellow", bold=True) + text.wrapped(sentence, indent="  ")]
    return "\n".join(lines)


def _number(name: str, count: int, note: str = "", *, alarm: str = "", suffix: str = "") -> str:
    shown = f"{f'{count:,}{suffix}':>12}"
    line = f"  {name:<11}{click.style(shown, fg=alarm) if alarm and count else shown}"
    return f"{line}   {text.dim(note)}" if note else line


def _oldest(found: Overview) -> str:
    if not found.pending:
        return ""
    notes = [f"the oldest for {text.age(found.lag_seconds)}"]
    if found.retrying:
        notes.append(f"{found.retrying:,} retrying")
    return ", ".join(notes)


def _held(found: Overview) -> list[str]:
    """Each held key with what holds it, the first few only."""
    named = [item for item in found.stuck if item.key is not None][:_NAMED]
    notes = [
        f"{text.one_line(str(item.key))}  by {item.id}  {item.state}" + (f", {item.behind:,} behind it" if item.behind else "")
        for item in named
    ]
    if found.held_keys > len(named):
        notes.append("…")
    first, *others = notes or [""]
    below = " " * 28
    return [_number("held keys", found.held_keys, first, alarm="yellow"), *(below + text.dim(note) for note in others)]


def _rate(found: Overview) -> str:
    if found.last_published_at is None:
        return ""
    if found.published_per_second:
        return f"{found.published_per_second:,.1f} a second over the last minute"
    return f"the last one {text.age((found.at - found.last_published_at).total_seconds())} ago"


def _relay_lines(found: Overview) -> list[str]:
    """The live relays, and the latest of those that ended without a word."""
    if not found.relays:
        return [f"  {'relay':<11}none is running, and none fell silent within a day"]
    silent = [item for item in found.relays if _state(item) == "silent"]
    shown = [item for item in found.relays if item not in silent] + silent[:1]
    lines = [
        f"  {'relay':<11}{item.id}  {text.coloured(_state(item))}  {text.amount(item.shards, 'shard')}  "
        f"{text.dim(f'seen {text.age(item.seen_age_seconds)} ago')}"
        for item in shown
    ]
    if len(silent) > 1:
        lines.append(f"  {'':<11}{text.dim(f'and {len(silent) - 1:,} more silent within a day')}")
    return lines


def _broker_line(found: Overview) -> list[str]:
    from outbox.cli.advice import spokesman

    speaker = spokesman(found)
    if speaker is None:
        return [f"  {'broker':<11}unknown: only a running relay can tell"]
    word, colour = ("connected", "green") if speaker.broker_connected else ("not connected", "red")
    if speaker.broker_connected and speaker.broker_blocked:
        word, colour = "blocked", "yellow"
    detail = f"  {speaker.broker_detail}" if speaker.broker_detail else ""
    return [f"  {'broker':<11}{click.style(word, fg=colour)}{text.dim(detail) if detail else ''}"]
