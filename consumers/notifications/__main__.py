"""What became of letters: `python -m consumers.notifications` lists those not sent; with ids it lets them be tried again.

Reads `CONSUMER_DATABASE_URL`, as the service does. Letters are named by number: no address is printed but in the mail server's
own words.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import click
import sqlalchemy as sa

from consumers.notifications import model, service
from consumers.notifications.sender import now_utc
from outbox import settings
from outbox.consumer import operating
from outbox.database import reading
from outbox.errors import OutboxError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m consumers.notifications", description=__doc__.splitlines()[0])
    parser.add_argument("letter", nargs="*", type=int, help="a letter that was given up, to be handed in again")
    asked = parser.parse_args(arguments)
    try:
        engine = operating.open_engine(service, settings.load(environ=os.environ, folder=Path.cwd()))
        operating.check(service, engine)
        click.echo(_again(engine, asked.letter) if asked.letter else _listed(engine))
    except (OutboxError, sa.exc.SQLAlchemyError) as error:
        click.echo(f"Error: {getattr(error, 'orig', None) or error}", err=True)
        return 1
    return 0


def _again(engine: sa.Engine, ids: list[int]) -> str:
    with engine.begin() as db:
        count = model.revive(db, ids, now_utc())
    return f"{count} of {len(ids)} wait again; the service hands them in"


def _listed(engine: sa.Engine) -> str:
    with reading(engine).connect() as db:
        rows = model.unsent(db)
    lines = [f"letter {row.id}  {row.state}  {row.attempts} attempt(s)  message {row.message_id}  {row.answer}" for row in rows]
    # What a mail server says may be anything: it must not drive the terminal, nor fail on one that has few letters.
    return "\n".join(ascii(line)[1:-1] for line in lines) or "no letter was put off or given up"


if __name__ == "__main__":
    raise SystemExit(main())
