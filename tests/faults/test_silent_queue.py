"""A queue that confirms nothing, as a quorum queue without a majority: its own topic waits, and nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kit.builders import message, write
from tests.kit.waiting import eventually
from tests.kit.world import EXCHANGE, TAP, World, end, rabbit_world

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Spawn
    from tests.kit.servers import ExternalPostgres, PostgresServer, RabbitServer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

SILENT_QUEUE, SILENT, HEALTHY = "mute", "talk.moved", "ticket.sold"


def test_a_queue_that_confirms_nothing_stops_only_its_own_topic_and_is_found_again(
    spawn: Spawn,
    postgres_server: PostgresServer | ExternalPostgres,
    private_rabbit: Callable[[], RabbitServer],
) -> None:
    rabbit = private_rabbit()
    with postgres_server.database() as url, postgres_server.database() as service_url:
        world = rabbit_world(spawn, url, rabbit.url, service_url).prepare(tap=(HEALTHY,))
        with world.channel() as channel:
            channel.queue_declare(SILENT_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(SILENT_QUEUE, EXCHANGE, SILENT)
        relay = world.relay(OUTBOX_MAX_ATTEMPTS="1")
        commit(world, HEALTHY, 10)
        commit(world, SILENT, 10)
        arrived(world, TAP, 10)
        arrived(world, SILENT_QUEUE, 10)

        rabbit.silence(SILENT_QUEUE)
        commit(world, SILENT, 300)
        total = 10
        for _ in range(10):
            commit(world, HEALTHY, 20)
            total += 20
            arrived(world, TAP, total)
        relay.wait_for_line("topic.silent")
        eventually(lambda: SILENT in (world.status()["stuck"] or ""), 10, "status to name the topic", 0.1)
        status = world.status()
        assert "not confirmed" in status["stuck"]
        assert (status["dead"], status["broker"]["connected"]) == (0, True)

        end(relay)
        assert "dropped the connection" not in relay.output
        relay = world.relay(
            OUTBOX_MAX_ATTEMPTS="1"
        )  # its channel is new to the queue, and waits for it with all that comes later
        relay.wait_for_line("shards.taken")
        commit(world, HEALTHY, 20)
        arrived(world, TAP, total + 20, seconds=20)
        assert world.status()["dead"] == 0

        rabbit.answer_again(SILENT_QUEUE)
        eventually(lambda: world.status()["pending"] + world.status()["retrying"] == 0, 40, "all to be delivered", 0.2)
        end(relay)
        arrived(world, SILENT_QUEUE, 310)


def commit(world: World, topic: str, count: int) -> None:
    """Commit *count* messages of ten keys of the topic's own."""
    with world.engine() as engine, engine.begin() as connection:
        write(connection, *(message(topic, f"{topic}-{n % 10}") for n in range(count)))


def arrived(world: World, queue: str, count: int, seconds: float = 10.0) -> None:
    """Wait until there are *count* messages in *queue*."""

    def there() -> bool:
        with world.channel() as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count) >= count

    eventually(there, seconds, f"{count} messages in {queue}", 0.05)
