"""The end of every run: what committed, what arrived and what was applied must agree, whatever happened in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kit.history import Entry, digest, judge
from tests.kit.recorder import NAME, REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from outbox.message import Message
    from tests.kit.processes import Process
    from tests.kit.world import World

#: Small enough that the bound on duplicates says something.
WINDOW = 200
RELAY_ENV = {"OUTBOX_WINDOW": str(WINDOW), "OUTBOX_BATCH_SIZE": "100"}


def nothing_wrong(world: World, *, faults: int, relays: Iterable[Process]) -> None:
    """Everything that committed arrived and was applied once, in order; what came twice is explained by *faults*.

    On a busy machine the broker may be silent for too long: a fault that nobody injected, and that the relays tell of.
    """
    ledger, tap, effects = world.ledger(), world.tap(), world.effects()
    verdict = judge(ledger, tap)
    silences = sum(relay.output.count("dropped the connection") for relay in relays)
    print(f"{len(ledger)} messages, {verdict.duplicates} duplicates after {faults} faults and {silences} silences")
    assert len(ledger) > 0
    assert verdict.problems() == {}
    assert verdict.duplicates <= (faults + silences) * WINDOW

    applied = world.ledger(f"topic <> '{REFUSED}'")
    assert judge(applied, effects, effects=[effect.id for effect in effects]).problems() == {}
    parked = world.ask.json("consumer", "parked", "list", NAME, "--limit", "1000")
    assert sorted(row["id"] for row in parked) == sorted(entry.id for entry in world.ledger(f"topic = '{REFUSED}'"))

    status, service = world.status(), world.service_status()
    assert (status["pending"], status["published_total"]) == (0, len(ledger))
    assert (service["applied_total"], service["late_total"], service["gaps_total"]) == (len(applied), 0, 0)


def entry(each: Message) -> Entry:
    """*each* as it was sent, or as it arrived."""
    return Entry(id=str(each.id), key=each.key, sequence=each.sequence, digest=digest(each.body))
