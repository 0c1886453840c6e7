"""A process that dies between any two steps of a commit leaves message and row, or neither."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from outbox import tables
from tests.integration.capture.conftest import Talk
from tests.kit.processes import run

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from tests.integration.capture.conftest import World

_SCRIPT = """
import os, sys
from outbox import Outbox
from outbox.process import failpoints
from outbox.database import create_engine
from sqlalchemy.orm import Session
from blinker import Signal
from tests.integration.capture.conftest import Talk

failpoints.arm(os.environ)
signal, outbox = Signal(), Outbox(source="/tests")
outbox.capture(signal, topic="talk.modified", key="talk:{id}")
with Session(create_engine(sys.argv[1])) as session:
    talk = Talk(title="one")
    session.add(talk)
    session.flush()
    signal.send(session, id=talk.id)
    session.commit()
"""


def left(engine: Engine) -> tuple[int, int, int]:
    """Return how many talks, messages and counted keys there are."""
    with engine.connect() as connection:
        talks, messages, keys = (
            connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
            for table in (Talk, tables.pending, tables.key)
        )
    return talks, messages, keys


@pytest.mark.parametrize(("point", "survivors"), [("C1", 0), ("C2", 0), ("C3", 0), ("C4", 1)])
def test_a_process_killed_on_the_way_leaves_both_or_neither(engine: Engine, point: str, survivors: int) -> None:
    url = engine.url.render_as_string(hide_password=False)
    done = run(sys.executable, "-c", _SCRIPT, url, env={"OUTBOX_FAILPOINTS": f"{point}=kill"})
    assert done.returncode == -9, done.stderr
    assert left(engine) == (survivors, survivors, survivors)


def test_a_message_is_of_the_very_transaction_of_its_row(world: World) -> None:
    if world.engine.dialect.name == "sqlite":  # it has no numbers of transactions
        return
    session = world.begin()
    session.add(Talk(title="one"))
    world.send(n=1)
    session.commit()
    numbers = sa.text(
        "SELECT xmin::text FROM talk UNION SELECT xmin::text FROM outbox_message UNION SELECT xmin::text FROM outbox_pending"
    )
    with world.engine.connect() as connection:
        assert len(connection.scalars(numbers).all()) == 1
