"""A transactional outbox: a Blinker signal sent is a message delivered, if and only if the transaction commits.

`Outbox` is the one to begin with; a service begins with `outbox.consumer.Service`. Beside it here: `Message` (what
`Outbox.record()` gives a test), `include_object` and `outbox.migrations` (for your own Alembic), and the errors.

The public names are loaded when asked for: importing `outbox` in a web process loads no broker client, and importing
`outbox.consumer` loads no Flask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outbox.capture.outbox import Outbox
    from outbox.errors import CaptureError, ConfigurationError, InvalidMessage, OutboxError, SchemaError
    from outbox.message import Message
    from outbox.tables import include_object

__version__ = "0.1.0"
__all__ = [
    "CaptureError",
    "ConfigurationError",
    "InvalidMessage",
    "Message",
    "Outbox",
    "OutboxError",
    "SchemaError",
    "include_object",
]

_HOMES = {
    "CaptureError": "outbox.errors",
    "ConfigurationError": "outbox.errors",
    "InvalidMessage": "outbox.errors",
    "Message": "outbox.message",
    "Outbox": "outbox.capture.outbox",
    "OutboxError": "outbox.errors",
    "SchemaError": "outbox.errors",
    "include_object": "outbox.tables",
}


def __getattr__(name: str) -> object:
    if name == "migrations":
        return import_module("outbox.migrations")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'outbox' has no attribute {name!r}")
