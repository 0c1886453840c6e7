"""The outbox's database comes back from a backup, the service's stays: known keys count again from where they were."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from tests.kit.history import judge
from tests.kit.recorder import REFUSED
from tests.kit.writers import Writer

if TYPE_CHECKING:
    from tests.kit.history import Entry
    from tests.kit.world import World

pytestmark = pytest.mark.faults


def _write(world: World, chance: random.Random, transactions: int) -> None:
    with world.engine() as engine:
        writer = Writer(str(engine.url), chance)
        for _ in range(transactions):
            writer.transaction()


def _copy(source: Path, target: Path) -> None:
    """Copy a database as a backup program does: where SQLite keeps a write-ahead log, the file alone is not all of it."""
    with closing(sqlite3.connect(source)) as reading, closing(sqlite3.connect(target)) as writing:
        reading.backup(writing)


def _applied_ids(world: World) -> list[Entry]:
    return world.ledger(f"topic <> '{REFUSED}'")


def test_nothing_is_dropped_and_new_messages_of_known_keys_arrive_as_late(small_world: World, chance: random.Random) -> None:
    world = small_world
    path = Path(str(sa.make_url(world.env["DATABASE_URL"]).database))
    backup = path.with_name("backup.db")
    _write(world, chance, 30)
    world.drain()
    _write(world, chance, 10)  # waiting when the backup is made, published by the time it is needed
    waiting = world.status()["pending"]
    _copy(path, backup)
    world.drain()
    _write(world, chance, 40)
    world.drain()
    before, effects_before = _applied_ids(world), world.effects()
    status_before = world.service_status()
    highest: dict[str, int] = {}
    for effect in effects_before:
        if effect.key is not None and effect.sequence is not None:
            highest[effect.key] = max(highest.get(effect.key, 0), effect.sequence)

    _copy(backup, path)
    _write(world, chance, 30)
    world.drain()

    known = {entry.id for entry in before}
    new = [entry for entry in _applied_ids(world) if entry.id not in known]
    effects = world.effects()
    verdict = judge([*before, *new], effects, effects=[effect.id for effect in effects])
    assert (verdict.lost, verdict.phantom, verdict.damaged) == ([], [], [])
    assert (verdict.effect_missing, verdict.effect_twice) == ([], [])
    # Among themselves the new ones are in order, whatever the service had seen of their keys.
    fresh = effects[len(effects_before) :]
    assert {effect.id for effect in fresh} == {entry.id for entry in new}
    assert judge(new, fresh).reordered == []
    status = world.service_status()
    assert status["duplicates_total"] - status_before["duplicates_total"] == waiting
    expected = _late(fresh, highest)
    assert expected > 0
    assert status["late_total"] == expected == len(world.rows("SELECT id FROM effects WHERE late", "CONSUMER_DATABASE_URL"))


def _late(arrivals: list[Entry], highest: dict[str, int]) -> int:
    """How many of *arrivals* come at or below the highest sequence of their key, which they raise."""
    late = 0
    for entry in arrivals:
        if entry.key is not None and entry.sequence is not None:
            late += entry.sequence <= highest.get(entry.key, 0)
            highest[entry.key] = max(highest.get(entry.key, 0), entry.sequence)
    return late
