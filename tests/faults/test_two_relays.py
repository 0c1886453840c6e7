"""Two relays on one outbox: one works, the other waits; a frozen one is replaced, and does no harm when it thaws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.verdicts import RELAY_ENV, nothing_wrong
from tests.kit.waiting import eventually
from tests.kit.world import end

if TYPE_CHECKING:
    import random

    from tests.kit.world import World

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

#: Where the owner freezes, one after the other: rows read, window written, window half confirmed, rows deleted but not yet
#: committed, settled; and after how many times at most.
STEPS = {"R1": 40, "R2": 5, "R4": 3, "R5": 4, "R6": 4}


def test_a_frozen_relay_is_replaced_and_when_it_thaws_it_sends_nothing_more(shared_world: World, chance: random.Random) -> None:
    world = shared_world
    plans = [f"{step}=stop@{chance.randint(1, most)}" for step, most in STEPS.items()]
    writers = [world.writer(chance.random()) for _ in range(2)]
    service = world.service()
    relays = [world.relay(failpoints=plans[0], **RELAY_ENV)]
    relays[0].wait_for_line("works on all")
    for plan in [*plans[1:], ""]:
        owner = relays[-1]
        standby = world.relay(failpoints=plan, **RELAY_ENV)
        relays.append(standby)
        eventually(lambda owner=owner: owner.stopped, 60, "the owner to freeze")  # type: ignore[misc]
        standby.wait_for_line("works on all")
        owner.cont()
        owner.wait_for_line("the shards are not this relay's any more")
        owner.terminate()
        assert owner.wait() == 0, owner.output
    end(*writers)
    world.settled()
    end(relays[-1], service)
    # A window that the successor sends again, and one that the frozen one had given to its connection already.
    nothing_wrong(world, faults=2 * len(plans), relays=relays)


def test_the_second_relay_idles_says_why_and_takes_over_at_once_when_the_first_one_ends(small_world: World) -> None:
    world = small_world
    first = world.relay()
    first.wait_for_line("works on all")
    second = world.relay()
    said = second.wait_for_line(r"relay (\S+) has the shards; this one takes over when it ends or its lease runs out")
    assert f":{first.pid}:" in said[1]

    def roles() -> dict[int, tuple[str, int]]:
        return {relay["pid"]: (relay["state"], relay["shards"]) for relay in world.status()["relays"]}

    both = {first.pid: ("running", 64), second.pid: ("idle", 0)}
    eventually(lambda: roles() == both, what="status to show both")
    end(first)
    second.wait_for_line("works on all")
    eventually(lambda: roles() == {second.pid: ("running", 64)}, what="status to show the second alone")
