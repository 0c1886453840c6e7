"""The project's commands with a mistake planted: `python -m tests.faults.mistaken_commands MISTAKE relay …`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from outbox.cli import main
from outbox.store import settling

if TYPE_CHECKING:
    from outbox.relay.order.item import Item


def settle_before_confirm() -> None:
    """Rows are deleted when their messages are about to be sent."""
    from outbox.relay.forwarder import Forwarder

    take = Forwarder._take

    def take_and_settle(self: Forwarder) -> list[Item]:
        items = take(self)
        messages = [(item.row, item.outgoing.message) for item in items if item.outgoing is not None]
        with self._engine.begin() as connection:
            done = [settling.Confirmed(row.id, row.message_row, message.id, 0.0, 0.0) for row, message in messages]
            settling.settle(connection, self._relay_id, done, [])
        return items

    Forwarder._take = take_and_settle  # type: ignore[method-assign]


def acknowledge_before_commit() -> None:
    """Deliveries are acknowledged as they come."""
    from outbox.consumer.runtime import Runtime

    arrived = Runtime._arrived

    def arrived_and_done(self: Runtime, arrival: Any) -> None:
        arrival.receipt.settled()
        if self._link is not None:  # and told at once: whether the kill comes before or after must not be left to chance
            self._link.acknowledge()
            self._link.flush()
        arrived(self, arrival)

    Runtime._arrived = arrived_and_done  # type: ignore[method-assign]


def never_ask_the_inbox() -> None:
    """Every delivery is new."""
    from outbox.consumer import inbox

    inbox.take = lambda _connection, _service, identities, *_: set(identities)


if __name__ == "__main__":
    mistakes = (settle_before_confirm, acknowledge_before_commit, never_ask_the_inbox)
    {mistake.__name__: mistake for mistake in mistakes}[sys.argv.pop(1)]()
    main()
