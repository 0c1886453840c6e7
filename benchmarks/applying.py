"""How long a commit takes to reach a handler, and how fast a service applies what waits in its queue."""

from __future__ import annotations

import subprocess
import threading
import time

import sqlalchemy as sa
from sqlalchemy.orm import Session

from benchmarks.service import arrival
from benchmarks.stage import BODY, Stage, new_outbox

NAME = "benchmarks.service:service"


def latency(stage: Stage, per_second: int, seconds: int) -> list[float]:
    """Return seconds from the end of each commit to its handler, relay and service being processes of their own."""
    outbox, engine = new_outbox(), stage.engine()
    _migrate(stage)
    service, relay = stage.outbox("consumer", "run", NAME), stage.outbox("relay")
    committed: dict[str, float] = {}
    try:
        _send(outbox, engine, committed)  # the first goes through when everything is up
        _wait_for(stage, 1)
        committed.clear()
        pause = threading.Event()
        begin = time.monotonic()
        for number in range(per_second * seconds):
            pause.wait(max(0.0, begin + number / per_second - time.monotonic()))
            _send(outbox, engine, committed)
        arrived = _wait_for(stage, per_second * seconds + 1)
    finally:
        _end(relay, service)
    engine.dispose()
    return [arrived[id_] - at for id_, at in committed.items()]


def applied(stage: Stage, messages: int) -> float:
    """Return messages per second that a service applies from a queue that holds *messages*, by its own rows."""
    outbox, engine = new_outbox(), stage.engine()
    _migrate(stage)
    first = stage.outbox("consumer", "run", NAME, "--drain")  # declares exchange and queue
    first.wait(60)
    for start in range(0, messages, 1000):
        with Session(engine) as session, session.begin():
            for number in range(start, start + 1000):
                outbox.send("bench.said", BODY, key=f"key:{number % 500}", session=session)
    if stage.outbox("relay", "--drain").wait(300):
        raise RuntimeError("the relay did not drain")
    stage.outbox("consumer", "run", NAME, "--drain").wait(300)
    times = sorted(_wait_for(stage, messages).values())
    engine.dispose()
    return (messages - 1) / (times[-1] - times[0])


def _migrate(stage: Stage) -> None:
    if stage.outbox("consumer", "migrate", NAME).wait(60):
        raise RuntimeError("the service's tables could not be made")


def _send(outbox: object, engine: sa.Engine, committed: dict[str, float]) -> None:
    with Session(engine) as session:
        session.begin()
        message_id = outbox.send("bench.said", BODY, key=f"key:{len(committed) % 50}", session=session)  # type: ignore[attr-defined]
        session.commit()
    committed[str(message_id)] = time.time()


def _wait_for(stage: Stage, count: int) -> dict[str, float]:
    engine = sa.create_engine(stage.service_url)
    deadline = time.monotonic() + 120
    pause = threading.Event()
    try:
        while time.monotonic() < deadline:
            with engine.connect() as connection:
                rows = connection.execute(sa.select(arrival)).all()
            if len(rows) >= count:
                return {row.message_id: row.at for row in rows}
            pause.wait(0.2)
    finally:
        engine.dispose()
    raise RuntimeError(f"{count} messages were not applied in time")


def _end(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(60)
