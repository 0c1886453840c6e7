"""How fast the relay moves rows to a quorum queue, against a plain pika publisher that waits for each confirm."""

from __future__ import annotations

import json
import time

import pika
import sqlalchemy as sa
from sqlalchemy.orm import Session

from benchmarks.stage import BODY, Stage, new_outbox
from outbox import tables

EXCHANGE, QUEUE, TOPIC = "bench", "bench.all", "bench.said"


def relay(stage: Stage, messages: int, keys: int) -> float:
    """Return messages per second of a relay that finds *messages* waiting: first publish to last receipt."""
    _declare(stage)
    outbox, engine = new_outbox(), stage.engine()
    for start in range(0, messages, 1000):
        with Session(engine) as session, session.begin():
            for number in range(start, start + 1000):
                outbox.send(TOPIC, BODY, key=f"key:{number % keys}" if keys else None, session=session)
    process = stage.outbox("relay", "--drain")
    if process.wait(300):
        raise RuntimeError("the relay did not drain")
    receipt = tables.receipt.c
    with engine.connect() as connection:
        settled = connection.execute(
            sa.select(receipt.settled_at, receipt.duration_seconds, receipt.messages).order_by(receipt.id)
        ).all()
    engine.dispose()
    if sum(row.messages for row in settled) != messages:
        raise RuntimeError("not every message has a receipt")
    took = (settled[-1].settled_at - settled[0].settled_at).total_seconds() + settled[0].duration_seconds
    return float(messages / took)


def plain_publisher(stage: Stage, messages: int) -> float:
    """Return messages per second of `basic_publish` with confirms: the loop that a careful author writes."""
    _declare(stage)
    connection = pika.BlockingConnection(pika.URLParameters(stage.broker_url))
    channel = connection.channel()
    channel.confirm_delivery()
    body, properties = json.dumps(BODY).encode(), pika.BasicProperties(delivery_mode=2)
    began = time.perf_counter()
    for _ in range(messages):
        channel.basic_publish(EXCHANGE, TOPIC, body, properties, mandatory=True)
    took = time.perf_counter() - began
    connection.close()
    return messages / took


def _declare(stage: Stage) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(stage.broker_url))
    channel = connection.channel()
    channel.exchange_declare(EXCHANGE, "topic", durable=True)
    channel.queue_declare(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    channel.queue_bind(QUEUE, EXCHANGE, "#")
    connection.close()
