"""SQLAlchemy installs greenlet for users of its asyncio module only; everybody else must not need it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kit.processes import run

if TYPE_CHECKING:
    from pathlib import Path

_SCRIPT = """
import sys
sys.modules["greenlet"] = None  # importing it fails
from outbox.database import create_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from outbox import Outbox
from outbox.migrations import upgrade

engine = create_engine("sqlite:///" + sys.argv[1])
upgrade(engine)
outbox = Outbox(session=scoped_session(sessionmaker(engine)), OUTBOX_SOURCE="/tests")
with Session(engine) as session, session.begin():
    outbox.send("topic", {"n": 1}, session=session)
with engine.connect() as connection:
    print(connection.exec_driver_sql("SELECT topic FROM outbox_message").scalar_one())
"""


def test_messages_are_captured_where_greenlet_is_not_installed(tmp_path: Path) -> None:
    done = run("python", "-c", _SCRIPT, f"{tmp_path}/outbox.db")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "topic\n"
