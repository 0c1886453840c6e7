"""Order and once: whoever is killed, and between whichever two steps, while writers race for twenty keys."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest

from tests.faults.verdicts import RELAY_ENV, nothing_wrong
from tests.kit.waiting import eventually
from tests.kit.world import end

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable

    from tests.kit.processes import Process
    from tests.kit.world import World

pytestmark = pytest.mark.faults

#: Failpoint → after how many times at most it kills. R1 is passed twenty times a second, K6 only by what is to be parked.
RELAY = {"R1": 20, "R2": 5, "R3": 30, "R4": 3, "R5": 4, "R6": 4, "R7": 1}
SERVICE = {"K1": 60, "K2": 5, "K3": 5, "K4": 5, "K5": 5, "K6": 1}
WRITER = {"C1": 30, "C2": 5, "C3": 5, "C4": 5}
#: The embedded broker answers within the call, so there is no half of a window; E1 and E2 are before its own commits.
EMBEDDED_RELAY = {"R2": 3, "R3": 30, "R5": 3, "E1": 5}
EMBEDDED_SERVICE = {"K3": 3, "K4": 3, "K6": 1, "E2": 5}


class Killed:
    """A process that is started again each time one of its failpoints has killed it, in the end without any."""

    def __init__(self, start: Callable[[str], Process], points: dict[str, int], chance: random.Random) -> None:
        self._start = start
        order = chance.sample([*points], k=len(points))
        self._plans = deque(f"{point}=kill@{chance.randint(1, points[point])}" for point in order)
        self.dead: list[Process] = []
        self._next()

    def _next(self) -> None:
        self._plan = self._plans.popleft() if self._plans else ""
        self.process = self._start(self._plan)
        self._told_to_stop = False

    def finished(self) -> bool:
        """Look after it; say whether every failpoint has killed."""
        # This one is passed only by a relay that ends in order.
        if self._plan.startswith("R7") and not self._told_to_stop and "works on all" in self.process.output:
            self._told_to_stop = True
            self.process.terminate()
        code = self.process.exit_code
        if code is not None:
            if code != -9 or not self._plan:
                raise RuntimeError(f"{self.process!r} was to be killed by {self._plan or 'nothing'}:\n{self.process.output}")
            self.dead.append(self.process)
            self._next()
        return not self._plan


def _until_all_have_died(victims: Iterable[Killed], timeout: float) -> None:
    # All are looked after each time, not only the first that is not finished.
    eventually(
        lambda: not [victim for victim in victims if not victim.finished()], timeout, "every failpoint to kill", interval=0.01
    )


@pytest.mark.timeout(240)
def test_relay_service_and_writers_killed_at_each_step_lose_nothing_and_keep_the_order(
    shared_world: World, chance: random.Random
) -> None:
    world = shared_world
    relays = Killed(lambda plan: world.relay(failpoints=plan, **RELAY_ENV), RELAY, chance)
    services = Killed(lambda plan: world.service(failpoints=plan), SERVICE, chance)
    writers = [Killed(lambda plan: world.writer(chance.random(), plan), points, chance) for points in (WRITER, {}, {})]

    _until_all_have_died([relays, services, *writers], timeout=180)

    end(*(each.process for each in (*writers, relays, services)))
    world.drain()
    nothing_wrong(world, faults=len(relays.dead), relays=[*relays.dead, relays.process])


@pytest.mark.timeout(120)
def test_the_embedded_mode_survives_the_same(small_world: World, chance: random.Random) -> None:
    world = small_world
    relays = Killed(lambda plan: world.relay(failpoints=plan, **RELAY_ENV), EMBEDDED_RELAY, chance)
    services = Killed(lambda plan: world.service(failpoints=plan), EMBEDDED_SERVICE, chance)
    writers = [Killed(lambda plan: world.writer(chance.random(), plan), points, chance) for points in ({"C3": 5}, {})]

    _until_all_have_died([relays, services, *writers], timeout=100)

    end(*(each.process for each in (*writers, relays, services)))
    world.drain()
    nothing_wrong(world, faults=len(relays.dead), relays=[*relays.dead, relays.process])
