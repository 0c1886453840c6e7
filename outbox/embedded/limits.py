"""What a pair of URLs can and cannot do, in words: printed when a process starts."""

from __future__ import annotations

from urllib.parse import urlsplit

from outbox.embedded.urls import SCHEME, path_of


def describe(database_url: str, broker_url: str) -> str:
    """Return a few lines for people about the outbox in *database_url* and the broker at *broker_url*; they hold no secret."""
    on_file = database_url.startswith("sqlite")
    embedded = broker_url.startswith(f"{SCHEME}:")
    lines = [f"outbox in {'SQLite' if on_file else 'a database server'}, {_broker(broker_url, embedded=embedded)}"]
    if embedded:
        lines.append("broker: processes on this machine only, on a local disk; one transaction at a time writes, others wait")
        lines.append("broker: one process at a time works a queue; a second one takes over when the first is gone")
    if on_file:
        lines.append("outbox: one transaction at a time writes, others wait; the relay looks for messages by the clock")
    if embedded or on_file:
        lines.append("for several machines: DATABASE_URL=postgresql+psycopg://… and BROKER_URL=amqp://…; no code changes")
    return "\n".join(lines)


def _broker(broker_url: str, *, embedded: bool) -> str:
    return f"embedded broker in {path_of(broker_url)}" if embedded else f"RabbitMQ at {urlsplit(broker_url).hostname}"
