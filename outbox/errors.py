"""Everything the library raises on purpose. Each text names the thing, its value and the next step."""

from __future__ import annotations

#: What `pip install` takes; the package that it brings is `outbox`. (A distribution called outbox is another project.)
DISTRIBUTION = "flask-outbox"
#: The extra that brings a module.
_EXTRAS = {
    "pika": "rabbitmq",
    "kombu": "rabbitmq",
    "amqp": "rabbitmq",
    "psycopg": "postgres",
    "pymysql": "mysql",
    "prometheus_client": "metrics",
    "opentelemetry": "otel",
}


def install(extra: str) -> str:
    """Return what to type for *extra*."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def missing(error: ImportError) -> str | None:
    """Return what to install for a module that is not there; None for one that none of our extras brings."""
    module = (error.name or "").partition(".")[0]
    return f"{module} is not installed: {install(_EXTRAS[module])}" if module in _EXTRAS else None


class OutboxError(Exception):
    """The root of all errors of this library."""


class ConfigurationError(OutboxError):
    """A setting, a registration or a schema is wrong; found before anything was written. The text holds every problem found."""


class InvalidMessage(OutboxError, ValueError):
    """A message can't be what was asked: its topic, key, headers, size or data. Nothing was truncated, nothing was held."""


class CaptureError(OutboxError):
    """A signal was sent where its message could not be tied to a transaction; the transaction can only be rolled back."""


class SchemaError(OutboxError):
    """The tables are missing, older or newer than this code."""


class BrokerError(OutboxError):
    """The broker can't be used as configured, and waiting would not help (a refused password, an unknown virtual host)."""


class Unavailable(OutboxError):
    """A server can't be reached now; the same command may succeed later (exit code 75)."""
