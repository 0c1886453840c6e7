"""The verdict of a run in which the database may have gone back in time: then there is more than one history.

A *branch* is a ledger as it stood when its database was replaced; the last one is the ledger at the end. A message must have
arrived if the last branch has it; it is a phantom if no branch does; and each branch by itself must have arrived in order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.kit.history import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.kit.history import Entry
    from tests.lab.tap import Arrival


@dataclass(frozen=True, slots=True)
class Judgement:
    """All that went wrong, and how much there was."""

    messages: int
    deliveries: int
    #: Messages of replaced histories that had arrived: allowed, since their services heard of what was committed then.
    forgotten: int
    duplicates: Counter[str] = field(default_factory=Counter)
    problems: dict[str, list[str]] = field(default_factory=dict)


def of(
    branches: Sequence[Sequence[Entry]], arrivals: Sequence[Arrival], effects: Sequence[Entry], applied: Sequence[Entry]
) -> Judgement:
    """Judge a run.

    *branches*: ledgers, the last one in force; *arrivals*: the tap; *effects*: what the service did; *applied*: what of the
    last ledger it should have done.
    """
    last = branches[-1]
    tap = [each.entry for each in arrivals]
    known = {entry.id for branch in branches for entry in branch}
    verdict = judge(last, [entry for entry in tap if entry.id in known], None)
    problems = {kind: found for kind, found in verdict.problems().items() if kind not in ("phantom", "reordered")}
    problems["phantom"] = [entry.id for entry in tap if entry.id not in known]
    problems["reordered"] = [each for branch in branches for each in _reordered(branch, tap)]
    of_service = judge(applied, effects, [entry.id for entry in effects])
    problems["effect_missing"], problems["effect_twice"] = of_service.effect_missing, of_service.effect_twice
    problems["effects_reordered"] = [each for branch in branches for each in _reordered(branch, effects)]
    final = {entry.id for entry in last}
    return Judgement(
        messages=len(last),
        deliveries=len(tap),
        forgotten=len({entry.id for entry in tap if entry.id in known and entry.id not in final}),
        duplicates=_duplicates(arrivals),
        problems={kind: found for kind, found in problems.items() if found},
    )


def _reordered(branch: Sequence[Entry], seen: Sequence[Entry]) -> list[str]:
    ids = {entry.id for entry in branch}
    return judge(branch, [entry for entry in seen if entry.id in ids]).reordered


def _duplicates(arrivals: Sequence[Arrival]) -> Counter[str]:
    """How many deliveries of each topic were not the first of their message."""
    seen: set[str] = set()
    found: Counter[str] = Counter()
    for each in arrivals:
        if each.entry.id in seen:
            found[each.topic] += 1
        seen.add(each.entry.id)
    return found
