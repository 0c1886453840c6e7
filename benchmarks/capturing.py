"""What one keyed message costs a transaction, against the same transaction without, and with another row instead."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from benchmarks.stage import Stage, new_outbox

business = sa.Table(
    "bench_row", sa.MetaData(), sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("text", sa.Text, nullable=False)
)
#: Small, as the payload of a change is; the size of bodies is the relay's measurement.
DATA = {"event_id": 1, "session_id": 7, "change": "accepted", "session": {"title": "x" * 200}}


class Rates(NamedTuple):
    """Transactions per second."""

    plain: float
    #: With one more INSERT of a small row.
    row: float
    #: With one keyed message.
    message: float


def transactions(stage: Stage, threads: int, rounds: int, seconds: float) -> Rates:
    """Return the medians of *rounds* rounds taken in turn."""
    engine = stage.engine(pool_size=threads)
    business.create(engine, checkfirst=True)
    outbox = new_outbox()

    def without(session: Session, _dice: random.Random) -> None:
        session.execute(sa.insert(business).values(text="x" * 100))

    def with_row(session: Session, _dice: random.Random) -> None:
        session.execute(sa.insert(business).values(text="x" * 100))
        session.execute(sa.insert(business).values(text="x" * 100))

    def with_message(session: Session, dice: random.Random) -> None:
        session.execute(sa.insert(business).values(text="x" * 100))
        outbox.send("bench.said", DATA, key=f"event:{dice.randrange(1000)}", session=session)

    works = (without, with_row, with_message)
    for work in works:
        _rate(engine, work, threads, 0.5)
    taken = [[_rate(engine, work, threads, seconds) for work in works] for _ in range(rounds)]
    engine.dispose()
    return Rates(*(statistics.median(values) for values in zip(*taken, strict=True)))


def wal_bytes_per_message(stage: Stage, messages: int) -> float:
    """Return the WAL that a transaction with one message writes beyond the same transaction without."""
    engine = stage.engine()
    business.create(engine, checkfirst=True)
    outbox = new_outbox()
    written = []
    for send in (False, True):
        with engine.connect() as connection:
            connection.exec_driver_sql("CHECKPOINT")
        before = _wal(engine)
        for number in range(messages):
            with Session(engine) as session, session.begin():
                session.execute(sa.insert(business).values(text="x" * 100))
                if send:
                    outbox.send("bench.said", DATA, key=f"event:{number % 100}", session=session)
        written.append(_wal(engine) - before)
    engine.dispose()
    return (written[1] - written[0]) / messages


def _wal(engine: sa.Engine) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(sa.text("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")) or 0)


def _rate(engine: sa.Engine, work: Callable[[Session, random.Random], None], threads: int, seconds: float) -> float:
    counts = [0] * threads
    start = threading.Barrier(threads + 1)
    end = threading.Event()

    def run(number: int) -> None:
        dice = random.Random(number)
        start.wait()
        while not end.is_set():
            with Session(engine) as session, session.begin():
                work(session, dice)
            counts[number] += 1

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.perf_counter()
    end.wait(seconds)
    end.set()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - began)
