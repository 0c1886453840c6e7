"""The errors of py-amqp, which both brokers raise; here also the one text for whoever has not installed it."""

from __future__ import annotations

from outbox.errors import ConfigurationError, install

try:
    from amqp.exceptions import AccessRefused, AMQPError, ConsumerCancelled, NotAllowed, NotFound, PreconditionFailed
except ImportError as error:
    raise ConfigurationError(
        f"running services needs kombu, for the embedded broker too; install it: {install('rabbitmq')}"
    ) from error

__all__ = ["AMQPError", "AccessRefused", "ConsumerCancelled", "NotAllowed", "NotFound", "PreconditionFailed"]
