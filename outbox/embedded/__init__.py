"""The embedded broker: durable queues in one SQLite file, for one machine, with nothing to install.

`embedded:///instance/broker.db` is a file relative to the working directory, `embedded:////var/lib/app/broker.db` an
absolute one, as in SQLAlchemy's SQLite URLs. The relay publishes through `outbox.relay.embedded`, services consume through
kombu (`connection`), and `outbox.embedded.queues.Queues` looks after queues and bindings.

Failpoints: E1 messages inserted, before COMMIT; E2 messages acknowledged and others handed out, before COMMIT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox.embedded.limits import describe
from outbox.embedded.urls import path_of

if TYPE_CHECKING:
    from kombu.connection import Connection

__all__ = ["connection", "describe", "path_of"]


def connection(url: str) -> Connection:
    """Return a kombu connection to the embedded broker at *url*; like all of kombu's it connects when first used."""
    from kombu.connection import Connection

    from outbox.embedded.transport import Transport

    options = {"path": str(path_of(url))}
    return Connection("embedded://", transport=Transport, transport_options=options)  # type: ignore[no-untyped-call]
