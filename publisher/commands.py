"""What an operator types: `flask --app publisher migrate`, `flask --app publisher import FOLDER`."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import click
from flask import current_app
from flask.cli import with_appcontext
from sqlalchemy.exc import DBAPIError, IntegrityError

from outbox import OutboxError
from publisher import database, importer, migrations, openevent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from publisher.importer import Report

#: Of what happened to many rows, so many are named.
_NAMED = 8


@click.command()
@with_appcontext
def migrate() -> None:
    """Create or upgrade the tables of the publisher and of its outbox."""
    engine = database.of(current_app).engine
    with told():
        steps = migrations.upgrade(engine)
    click.echo(f"{engine.url.render_as_string(hide_password=True)}: " + (f"{steps} step(s) done" if steps else "up to date"))


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--as", "identifier", metavar="IDENTIFIER", help="Take this for the identifier of the export.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@with_appcontext
def import_(folder: Path, identifier: str | None, as_json: bool) -> None:
    """Load an Open Event export: FOLDER holds event.json, sessions.json, speakers.json, microlocations.json, tracks.json.

    The files may be called so or without .json. Names are taken in either spelling (start_time, starts-at). A second run
    changes what differs and nothing else. All or nothing: a run that fails leaves no trace.
    """
    with told():
        conference = openevent.read(folder, identifier)
        migrations.check(database.of(current_app).engine)
        bar = click.progressbar(length=importer.rows(conference), label="Importing", file=sys.stderr)
        with bar, database.changing() as db:
            report = importer.run(db, conference, lambda: bar.update(1))
    click.echo(json.dumps(report.data(), ensure_ascii=False) if as_json else _summary(report))


def _summary(report: Report) -> str:
    lines = [f"{report.name} is event {report.event_id}", f"{'':16}{'created':>9}{'updated':>9}{'unchanged':>11}{'skipped':>9}"]
    for name, count in report.counts.items():
        lines.append(f"  {name:14}{count.created:>9}{count.updated:>9}{count.unchanged:>11}{count.skipped:>9}")
    if report.notes:
        lines.append("Not taken as it was:")
    order = sorted(report.notes, key=lambda note: (note.file, note.detail))
    for (file, detail), group in groupby(order, key=lambda note: (note.file, note.detail)):
        notes = list(group)
        ids = [note.id + (f" ({note.value})" if note.value else "") for note in notes if note.id]
        named = ", ".join(ids[:_NAMED]) + (f", … ({len(ids)} in all)" if len(ids) > _NAMED else "")
        lines.append(f"  {file}: {detail}" + (f": {named}" if named else f" ({len(notes)} times)" if len(notes) > 1 else ""))
    return "\n".join(lines)


@contextmanager
def told() -> Iterator[None]:
    """Turn what can be expected to go wrong into one clear text, which ends the command."""
    try:
        yield
    except (OutboxError, openevent.ExportError) as error:
        raise click.ClickException(str(error)) from error
    except IntegrityError as error:
        raise click.ClickException("the same conference was imported by two processes at once; run it again") from error
    except DBAPIError as error:
        said = str(error.orig).strip().partition("\n")[0]
        raise click.ClickException(f"the database can't be used: {said}; nothing was changed") from error
    except OSError as error:
        raise click.ClickException(f"{error.filename}: {error.strerror}") from error
