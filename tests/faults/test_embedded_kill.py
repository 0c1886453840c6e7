"""Whatever is killed, and wherever: the embedded broker loses nothing, keeps each key's order, and makes no copies."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, groupby
from typing import TYPE_CHECKING

import pytest

from outbox.embedded.queues import Depth, Queues
from tests.faults.embedded_children import EXCHANGE, QUEUE, Log, message
from tests.kit.history import Entry, digest, judge
from tests.kit.processes import Process
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.faults

CHAOS_SECONDS = 10.0
NEVER = 1_000_000_000


@dataclass(frozen=True)
class Scene:
    """A broker file, the log of its children, and the way to start these."""

    url: str
    queues: Queues
    log: Log
    start: Callable[..., Process]

    def numbers(self, word: str) -> list[int]:
        return [int(number) for line in self.log.lines() if line[1] == word for number in line[2:]]

    def ranges(self, word: str) -> Iterator[range]:
        for line in self.log.lines():
            if line[1] == word:
                yield range(int(line[2]), int(line[3]) + 1)

    def has_said(self, process: Process, word: str) -> bool:
        return any(line[:2] == [str(process.pid), word] for line in self.log.lines())


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    path, log = tmp_path / "broker.db", tmp_path / "log"
    numbers = count(1)
    with ExitStack() as stack:
        queues = stack.enter_context(Queues(path))
        queues.declare_queue(QUEUE)
        queues.bind(QUEUE, "session.*", exchange=EXCHANGE)

        def start(role: str, last: int = 0, failpoints: str = "") -> Process:
            command = ("python", "-m", "tests.faults.embedded_children", role, url, log, str(last))
            output = tmp_path / f"child-{next(numbers)}.log"
            return stack.enter_context(Process(*command, log=output, env={"OUTBOX_FAILPOINTS": failpoints}))

        url = f"embedded:///{path}"
        yield Scene(url=url, queues=queues, log=Log(str(log)), start=start)


def test_a_publisher_killed_before_its_commit_has_published_nothing_and_the_next_one_publishes_all(scene: Scene) -> None:
    assert scene.start("publish", last=40, failpoints="E1=kill").wait() == -9
    assert [*scene.ranges("sent")] != []
    assert scene.queues.depth(QUEUE).ready == 0
    assert scene.start("publish", last=40).wait() == 0
    assert scene.queues.depth(QUEUE).ready == 40


def test_a_consumer_killed_before_its_acknowledgement_commits_leaves_all_to_the_next_one_in_order(scene: Scene) -> None:
    assert scene.start("publish", last=40).wait() == 0
    assert scene.start("consume", failpoints="E2=kill@2").wait() == -9  # once when it takes, then when it acknowledges
    first = scene.numbers("got")[::2]
    assert scene.queues.depth(QUEUE).ready == 40
    assert scene.start("consume", last=40).wait() == 0
    deliveries = [line[2:] for line in scene.log.lines() if line[1] == "got"][len(first) :]
    # Twenty were in the first one's hands.
    assert deliveries == [[str(number), "1" if number <= 20 else "0"] for number in range(1, 41)]


def test_a_waiting_consumer_takes_over_at_once_when_the_owner_is_killed(scene: Scene) -> None:
    owner = scene.start("consume")
    eventually(lambda: scene.has_said(owner, "ready") and scene.queues.depth(QUEUE).consumed, what="the owner")
    waiting = scene.start("consume")
    eventually(lambda: scene.has_said(waiting, "ready"), what="the one who waits")
    assert scene.start("publish", last=40).wait() == 0
    eventually(lambda: len(scene.numbers("acked")) == 40, what="the owner to take all")
    assert not scene.has_said(waiting, "got")
    owner.kill()
    assert scene.start("publish", last=80).wait() == 0
    eventually(lambda: len(scene.numbers("acked")) == 80, what="the other one to take all")
    assert scene.has_said(waiting, "got")


@pytest.mark.timeout(90)
def test_random_kills_lose_nothing_keep_the_order_and_make_no_copies(scene: Scene, chance: random.Random) -> None:
    publishers = _Killed(scene, "publish", "E1", chance)
    consumers = [_Killed(scene, "consume", "E2", chance) for _ in range(2)]
    deadline = time.monotonic() + CHAOS_SECONDS

    def time_is_up() -> bool:
        for each in (publishers, *consumers):
            each.look()
        return time.monotonic() > deadline and bool(scene.ranges("sent"))

    eventually(time_is_up, timeout=2 * CHAOS_SECONDS + 30, what="the end of the kills", interval=0.005)
    for each in (publishers, *consumers):
        each.end()
    last = max(numbers[-1] for numbers in scene.ranges("sent"))
    scene.start("consume")
    assert scene.start("publish", last=last).wait() == 0
    empty = Depth(ready=0, leased=0, consumed=True)
    eventually(lambda: scene.queues.depth(QUEUE) == empty, timeout=30, what="the last consumer to take all")

    kills = publishers.kills + sum(each.kills for each in consumers)
    print(f"{kills} kills, {last} messages")
    assert kills >= 8
    _check(scene, last)


def _check(scene: Scene, last: int) -> None:
    got = [(int(line[2]), int(line[3])) for line in scene.log.lines() if line[1] == "got"]
    verdict = judge([_entry(number) for number in range(1, last + 1)], [_entry(number) for number, _ in got])
    assert verdict.problems() == {}

    sent = Counter(number for numbers in scene.ranges("sent") for number in numbers)
    fresh = Counter(number for number, returns in got if returns == 0)
    assert {number: times for number, times in fresh.items() if times > sent[number]} == {}, "copies"
    acknowledged = Counter(scene.numbers("acked"))
    assert {number: times for number, times in acknowledged.items() if times > sent[number]} == {}, "came back after its ack"

    turns = [pid for pid, _ in groupby(line[0] for line in scene.log.lines() if line[1] == "got")]
    assert len(turns) == len(set(turns)), "two consumers worked at once"


def _entry(number: int) -> Entry:
    each = message(number)
    return Entry(id=str(number), key=each.key, sequence=each.sequence, digest=digest(each.body))


class _Killed:
    """A child that is killed again and again: by a failpoint within a transaction, or from outside at any moment."""

    def __init__(self, scene: Scene, role: str, failpoint: str, chance: random.Random) -> None:
        self._scene, self._role, self._failpoint, self._chance = scene, role, failpoint, chance
        self.kills = 0
        self._start()

    def _start(self) -> None:
        within = self._chance.random() < 0.5
        failpoints = f"{self._failpoint}=kill@{self._chance.randint(1, 60)}" if within else ""
        self._process = self._scene.start(self._role, last=NEVER if self._role == "publish" else 0, failpoints=failpoints)
        self._end_at = time.monotonic() + self._chance.uniform(0.5, 2.5)

    def look(self) -> None:
        """Kill it if its time has come, and start another when it is dead."""
        if time.monotonic() > self._end_at:
            self._process.kill()
        code = self._process.exit_code
        if code is not None:
            assert code == -9, self._process.output
            self.kills += 1
            self._start()

    def end(self) -> None:
        """Kill it for good."""
        self._process.kill()
