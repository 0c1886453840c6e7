"""The states of events and sessions, and where a session may go from each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class EventState(StrEnum):
    """Who sees an event: its makers, or everybody."""

    DRAFT = "draft"
    PUBLISHED = "published"


class TalkState(StrEnum):
    """How far a session has come; the words (and the spelling) of Open Event."""

    DRAFT = "draft"
    PENDING = "pending"
    ACCEPTED = "accepted"
    CONFIRMED = "confirmed"
    REJECTED = "rejected"
    CANCELED = "canceled"
    WITHDRAWN = "withdrawn"


#: A session begins in one of these; every other state is reached by a move, so that the move is announced.
FIRST_STATES = (TalkState.PENDING, TalkState.DRAFT)

#: Each state → where a session may go from it. A decision can be taken back; only the speaker withdraws and submits again.
MOVES: Mapping[TalkState, tuple[TalkState, ...]] = MappingProxyType(
    {
        TalkState.DRAFT: (TalkState.PENDING, TalkState.WITHDRAWN),
        TalkState.PENDING: (TalkState.ACCEPTED, TalkState.REJECTED, TalkState.WITHDRAWN),
        TalkState.ACCEPTED: (TalkState.CONFIRMED, TalkState.REJECTED, TalkState.CANCELED, TalkState.WITHDRAWN),
        TalkState.CONFIRMED: (TalkState.CANCELED, TalkState.WITHDRAWN),
        TalkState.REJECTED: (TalkState.ACCEPTED,),
        TalkState.CANCELED: (TalkState.ACCEPTED,),
        TalkState.WITHDRAWN: (TalkState.PENDING,),
    }
)
