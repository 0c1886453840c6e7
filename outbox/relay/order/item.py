"""A message that the relay has in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import count
from typing import TYPE_CHECKING

from outbox.tables import State

if TYPE_CHECKING:
    from uuid import UUID

    from outbox.relay.broker import Outgoing
    from outbox.store.relaying import Row


class Place(Enum):
    """Where a loaded row is."""

    WAITING = auto()
    READY = auto()
    FLYING = auto()


@dataclass(slots=True, eq=False)
class Item:
    """A row with its message, in memory."""

    row: Row
    #: None where the stored message can't be one; *problem* says why.
    outgoing: Outgoing | None
    #: Bytes of the message, about.
    size: int
    #: The epoch of the row's shard when it was read.
    epoch: int
    #: Who it is, whatever number its row has; None where outbox_message has no row for it.
    message_id: UUID | None = None
    #: What the broker's answer is known by: a number of this process. A database may give a row's number to another message.
    token: int = field(default_factory=count(1).__next__)
    place: Place = Place.WAITING
    #: A query made after the row was read found no earlier message of its key.
    proven: bool = False
    #: It goes past earlier messages of its key that nobody listens to.
    passes: bool = False
    #: It flew when the relay ceased to believe what it knew: its delivery says nothing about its key now.
    stale: bool = False
    problem: str = ""

    @property
    def plain(self) -> bool:
        """Whether nothing is wrong with it so far: it was never held, can be a message, and goes past no other."""
        return self.row.state == State.PENDING and not self.problem and not self.passes

    @property
    def order(self) -> tuple[int, int]:
        """What messages of a key are sorted by."""
        return (self.row.sequence or 0, self.row.id)
