"""The consumer runtime: a service registers handlers, `outbox consumer run NAME` applies each message once.

    from outbox.consumer import Retry, Service

    service = Service("exports")

    @service.on("session.modified")
    def rebuild(message, db_session, /, *, event_id, **extra): ...

Importing this loads no Flask and no broker client.
"""

from outbox.consumer.outcomes import HandlerMistake, Outcome, Reject, Retry
from outbox.consumer.service import Service

__all__ = ["HandlerMistake", "Outcome", "Reject", "Retry", "Service"]
