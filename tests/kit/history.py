"""The history checker: what was committed, what arrived, what was applied, and every way these can disagree.

The *ledger* is written by ordinary SQL in the transaction that sent the message, so it is the truth about what committed.
The *tap* is a queue bound to everything and read without our runtime. *Effects* are rows in a service's database.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Entry:
    """A committed message, or one that the tap saw."""

    id: str
    key: str | None
    sequence: int | None
    digest: str = ""


@dataclass(slots=True)
class Verdict:
    """All that went wrong, by kind; each list holds message ids or sentences."""

    lost: list[str] = field(default_factory=list)
    phantom: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    effect_missing: list[str] = field(default_factory=list)
    effect_twice: list[str] = field(default_factory=list)
    #: Second and later deliveries: allowed, but only within the bound of the faults injected.
    duplicates: int = 0

    def problems(self) -> dict[str, list[str]]:
        """Return the kinds that are not empty; duplicates are for the caller to bound."""
        kinds = ("lost", "phantom", "reordered", "damaged", "gaps", "effect_missing", "effect_twice")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind)}


def digest(body: bytes) -> str:
    """Return a short fingerprint of a body."""
    return hashlib.sha256(body).hexdigest()[:16]


def fingerprint(data: Any) -> str:
    """Return the digest of data as it was sent and as it arrives, however JSON spells it; bytes as they are."""
    if data is None or isinstance(data, bytes):
        return digest(data or b"")
    return digest(json.dumps(data, sort_keys=True).encode())


def judge(ledger: Sequence[Entry], tap: Sequence[Entry], effects: Iterable[str] | None = None) -> Verdict:
    """Compare what committed with what arrived, in order of arrival, and with the ids whose effects are in a database."""
    verdict = Verdict()
    committed = {entry.id: entry for entry in ledger}
    first = _first_deliveries(tap)
    verdict.duplicates = len(tap) - len(first)
    arrived = {entry.id for entry in first}
    verdict.lost = [entry.id for entry in ledger if entry.id not in arrived]
    verdict.phantom = [entry.id for entry in first if entry.id not in committed]
    verdict.damaged = [e.id for e in tap if e.id in committed and committed[e.id].digest != e.digest]
    verdict.reordered = _out_of_sequence(first)
    verdict.gaps = _gaps(ledger, {entry.id: entry.sequence for entry in first})
    if effects is not None:
        applied = Counter(effects)
        verdict.effect_missing = [entry.id for entry in ledger if not applied[entry.id]]
        verdict.effect_twice = [id_ for id_, count in applied.items() if count > 1]
    return verdict


def _first_deliveries(tap: Sequence[Entry]) -> list[Entry]:
    seen: dict[str, Entry] = {}
    for entry in tap:
        seen.setdefault(entry.id, entry)
    return list(seen.values())


def _out_of_sequence(first: Sequence[Entry]) -> list[str]:
    highest: dict[str, int] = {}
    found = []
    for entry in first:
        if entry.key is None or entry.sequence is None:
            continue
        before = highest.get(entry.key, 0)
        if entry.sequence < before:
            found.append(f"{entry.key}: {entry.sequence} after {before}")
        highest[entry.key] = max(before, entry.sequence)
    return found


def _gaps(ledger: Sequence[Entry], sequences: dict[str, int | None]) -> list[str]:
    """The sequences given to the committed messages of a key must be 1, 2, 3, … without a hole."""
    per_key: dict[str, list[int]] = defaultdict(list)
    for entry in ledger:
        number = sequences.get(entry.id)
        if entry.key is not None and number is not None:
            per_key[entry.key].append(number)
    return [f"{key}: {sorted(n)[:5]}…" for key, n in per_key.items() if sorted(n) != list(range(1, len(n) + 1))]
