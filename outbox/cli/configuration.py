"""`outbox config`: every setting as it is in effect, and where it comes from."""

from __future__ import annotations

import click

from outbox.cli import context, text
from outbox.errors import ConfigurationError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def config(as_json: bool) -> None:
    """Show the effective settings with their origin, secrets masked.

    Argument → app.config → environment → [tool.outbox] in ./pyproject.toml → default.
    """
    here = context.current()
    rows = here.settings.rows()
    if as_json:
        text.say_json([{"name": row.name, "value": row.shown, "origin": row.origin, "meaning": row.text} for row in rows])
        return
    cells = [(row.name, row.shown or "—", row.origin, row.text) for row in rows]
    text.say(text.table(("NAME", "VALUE", "ORIGIN", "MEANING"), cells))
    try:
        path = here.place.path
    except ConfigurationError:
        return  # no database is set, as the table says
    if path is not None:
        there = "" if path.exists() else " (not there; `outbox migrate` makes it)"
        text.say(f"\nThe SQLite file is {path}{there}")
