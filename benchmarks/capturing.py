"""What one keyed message costs a transaction, against the same transaction without."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import sqlalchemy as sa
from sqlalchemy.orm import Session

from benchmarks.stage import Stage, new_outbox

business = sa.Table(
    "bench_row", sa.MetaData(), sa.Column("id", sa.BigInteger, primary_key=True), sa.Column("text", sa.Text, nullable=False)
)
#: Small, as the payload of a change is; the size of bodies is the relay's measurement.
DATA = {"event_id": 1, "session_id": 7, "change": "accepted", "session": {"title": "x" * 200}}


def transactions(stage: Stage, threads: int, rounds: int, seconds: float) -> tuple[float, float]:
    """Return transactions per second without and with a message, each the median of *rounds* rounds taken in turn."""
    engine = stage.engine(pool_size=threads)
    business.create(engine, checkfirst=True)
    outbox = new_outbox()

    def without(session: Session, _dice: random.Random) -> None:
        session.execute(sa.insert(business).values(text="x" * 100))

    def with_message(session: Session, dice: random.Random) -> None:
        session.execute(sa.insert(business).values(text="x" * 100))
        outbox.send("bench.said", DATA, key=f"event:{dice.randrange(1000)}", session=session)

    for work in (without, with_message):
        _rate(engine, work, threads, 0.5)
    pairs = [(_rate(engine, without, threads, seconds), _rate(engine, with_message, threads, seconds)) for _ in range(rounds)]
    engine.dispose()
    plain, kept = (sorted(values)[rounds // 2] for values in zip(*pairs, strict=True))
    return plain, kept


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
