"""Several processes at once on one broker file."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from outbox.embedded import connection
from outbox.message import received
from tests.integration.embedded.writer import QUEUE

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Spawn

WRITERS, MESSAGES = 4, 300


def test_writers_that_start_together_on_a_file_that_is_not_there_lose_nothing_and_keep_each_ones_order(
    spawn: Spawn, tmp_path: Path
) -> None:
    url = f"embedded:///{tmp_path / 'instance' / 'broker.db'}"
    names = [f"writer:{number}" for number in range(WRITERS)]
    writers = [spawn("python", "-m", "tests.integration.embedded.writer", url, name, str(MESSAGES)) for name in names]
    assert [writer.wait() for writer in writers] == [0] * WRITERS
    sequences: dict[str, list[int]] = defaultdict(list)
    interleaved: list[str] = []

    def take(delivery: Any) -> None:
        event = received(delivery.body)
        assert event.key is not None
        assert event.sequence is not None
        sequences[event.key].append(event.sequence)
        interleaved.append(event.key)
        if len(interleaved) % 100 == 0:
            delivery.ack(multiple=True)

    client: Any = connection(url)
    with client, client.channel() as channel:
        channel.basic_qos(0, 100, False)
        channel.basic_consume(QUEUE, consumer_tag="tests", callback=take)
        for _ in range(WRITERS * MESSAGES):
            client.drain_events(timeout=10)
    assert sequences == {name: list(range(1, MESSAGES + 1)) for name in names}
    assert len({*interleaved[: len(interleaved) // 2]}) > 1, "they took turns: nothing was proven"
