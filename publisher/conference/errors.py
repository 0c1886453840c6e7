"""What the domain refuses, as data: whoever asked (HTTP, the importer) finds the words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from publisher.conference.states import TalkState


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with what was asked."""

    #: Where: a JSON pointer such as `/starts_at`, empty for the whole.
    pointer: str
    detail: str


class Invalid(Exception):
    """What was asked can't be; holds every fault that was found. Nothing was changed."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        self.faults = tuple(faults)


class IllegalMove(Exception):
    """A session can't go from its state to the one asked for."""

    def __init__(self, state: TalkState, wanted: TalkState, allowed: Sequence[TalkState]) -> None:
        super().__init__(f"a session that is {state} can't become {wanted}")
        self.state = state
        self.wanted = wanted
        self.allowed = tuple(allowed)
