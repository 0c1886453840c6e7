"""Rows → broker: a process of its own, which nothing imports but the command that starts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox.errors import ConfigurationError, missing

if TYPE_CHECKING:
    from outbox.relay.broker import Broker
    from outbox.settings import Settings


def open_broker(settings: Settings) -> Broker:
    """Return the broker that `BROKER_URL` names, not started yet. Raises ConfigurationError for a URL that can't be used."""
    settings.require("BROKER_URL")
    url = settings.broker_url or ""
    if url.startswith("embedded:"):
        from outbox.relay.embedded import EmbeddedBroker

        return EmbeddedBroker(url, exchange=settings.exchange)
    try:
        from outbox.relay.rabbitmq import RabbitBroker
    except ImportError as error:
        if (fix := missing(error)) is None:
            raise
        raise ConfigurationError(f"BROKER_URL names RabbitMQ, and {fix}") from error
    return RabbitBroker(url, exchange=settings.exchange, confirm_timeout_seconds=settings.confirm_timeout_seconds)
