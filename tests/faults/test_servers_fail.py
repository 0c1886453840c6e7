"""Broker and database crash, hang up, run out of memory and lose their exchange; relay and service resume by themselves."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.faults.verdicts import RELAY_ENV, nothing_wrong
from tests.kit.history import judge
from tests.kit.waiting import eventually
from tests.kit.world import EXCHANGE, TAP, World, end, rabbit_world
from tests.kit.writers import Writer

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from tests.conftest import Spawn
    from tests.kit.servers import ExternalPostgres, PostgresServer, RabbitServer

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]


@pytest.fixture
def rabbit(private_rabbit: Callable[[], RabbitServer]) -> RabbitServer:
    return private_rabbit()


@pytest.fixture
def world(spawn: Spawn, postgres_server: PostgresServer | ExternalPostgres, rabbit: RabbitServer) -> Iterator[World]:
    """On a RabbitMQ that the test may do anything to."""
    with postgres_server.database() as url, postgres_server.database() as service_url:
        yield rabbit_world(spawn, url, rabbit.url, service_url).prepare()


@contextmanager
def _writing(world: World, chance: random.Random, count: int = 2) -> Iterator[None]:
    """Writers at work during the block; at its end they have ended."""
    writers = [world.writer(chance.random()) for _ in range(count)]
    for writer in writers:
        writer.wait_for_line("writing")
    yield
    end(*writers)


def _more_is_published(world: World, by: int = 50, timeout: float = 60.0) -> None:
    """Wait until that many more messages were confirmed than are now."""
    before = world.status()["published_total"]
    eventually(lambda: world.status()["published_total"] >= before + by, timeout, f"{by} more messages to be published", 0.1)


def _more_is_applied(world: World, by: int = 50, timeout: float = 60.0) -> None:
    before = world.service_status()["applied_total"]
    eventually(lambda: world.service_status()["applied_total"] >= before + by, timeout, f"{by} more to be applied", 0.1)


# --- the broker -----------------------------------------------------------------------------------------------------------


def test_a_broker_that_is_down_at_the_start_and_killed_with_an_open_window_is_found_again(
    world: World, rabbit: RabbitServer, chance: random.Random
) -> None:
    rabbit.kill()
    relay, service = world.relay(**RELAY_ENV), world.service()
    with _writing(world, chance):
        relay.wait_for_line("broker.unreachable")
        service.wait_for_line("consumer.disconnected")
        eventually(lambda: world.status()["pending"] > 50, what="messages to wait")
        assert world.status()["broker"]["connected"] is False
        rabbit.start()
        _more_is_applied(world)

        rabbit.kill()
        relay.wait_for_line("broker.lost")
        rabbit.start()
        _more_is_applied(world)
    world.settled()
    end(relay, service)
    nothing_wrong(world, faults=2, relays=[relay])


def test_connections_that_are_closed_every_two_seconds_cost_duplicates_and_nothing_else(
    world: World, rabbit: RabbitServer, chance: random.Random
) -> None:
    relay, service = world.relay(**RELAY_ENV), world.service()
    closed = 4
    with _writing(world, chance):
        for _ in range(closed):
            _more_is_published(world, by=20)
            rabbit.close_all_connections()  # takes a second or two
    world.settled()
    end(relay, service)
    assert relay.output.count("broker.lost") >= 1
    nothing_wrong(world, faults=closed, relays=[relay])


def test_a_broker_without_memory_takes_nothing_keeps_serving_consumers_and_is_left_after_the_deadline(
    world: World, rabbit: RabbitServer, chance: random.Random
) -> None:
    relay, service = world.relay(**RELAY_ENV), world.service()
    with _writing(world, chance):
        _more_is_applied(world)
        service.stop()
        eventually(lambda: world.backlog() > 20, 30, "messages to wait in the queue", 0.1)
        rabbit.set_memory_alarm()
        relay.wait_for_line("broker.blocked")
        relay.wait_for_line(r"it takes no messages for 1\.5 s|no confirm came for 1\.5 s")
        before = world.status()
        assert before["pending"] > 0
        service.cont()
        eventually(lambda: world.backlog() == 0, 30, "the consumer to go on", 0.1)
        eventually(lambda: world.status()["pending"] > before["pending"], what="writers to go on")
        assert world.status()["published_total"] == before["published_total"]
        rabbit.clear_memory_alarm()
        _more_is_published(world)
    world.settled()
    end(relay, service)
    nothing_wrong(world, faults=1, relays=[relay])


def test_an_exchange_that_is_deleted_while_publishing_loses_nothing(
    world: World, rabbit: RabbitServer, chance: random.Random
) -> None:
    relay, service = world.relay(**RELAY_ENV), world.service()
    with _writing(world, chance):
        _more_is_published(world)
        with world.channel() as channel:
            channel.exchange_delete(EXCHANGE)
        relay.wait_for_line("outbox topology apply")
        # What is published between two bindings is for the first queue only, as always: not what this test is about.
        relay.stop()
        world.ask.fine("topology", "apply")
        world.bind_again()
        relay.cont()
        _more_is_applied(world)
    world.settled()
    end(relay, service)
    nothing_wrong(world, faults=1, relays=[relay])


def test_messages_nobody_listens_to_wait_and_leave_in_sequence_when_the_binding_is_back(
    world: World, chance: random.Random
) -> None:
    # One queue alone takes these topics: each message is its, or nobody's.
    world.make_tap("quiet.#")
    with world.channel() as channel:
        channel.queue_unbind(TAP, EXCHANGE, "#")
    relay, service = world.relay(**RELAY_ENV), world.service()
    with world.engine() as engine:
        writer = Writer(str(engine.url.render_as_string(hide_password=False)), chance, ("quiet.done", "quiet.noted"))

        def write(transactions: int) -> None:
            for _ in range(transactions):
                writer.transaction()

        write(30)
        _bind(world, "queue_unbind")
        write(30)
        eventually(lambda: world.status()["unroutable"] > 0, 30, "messages to be returned", 0.1)
        relay.kill()  # a hold that lived in memory would be forgotten now
        relay_again = world.relay(**RELAY_ENV)
        write(30)
        relay_again.wait_for_line("works on all")
        _bind(world, "queue_bind")
        eventually(lambda: world.status()["pending"] + world.status()["unroutable"] == 0, 60, "all to leave", 0.1)
    end(relay_again, service)
    verdict = judge(world.ledger("topic LIKE 'quiet.%'"), world.tap())
    assert verdict.problems() == {}


def _bind(world: World, act: str) -> None:
    with world.channel() as channel:
        getattr(channel, act)(TAP, EXCHANGE, "quiet.#")


# --- the database ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def postgres(private_postgres: Callable[..., PostgresServer]) -> PostgresServer:
    return private_postgres()


def test_a_database_that_crashes_between_any_two_steps_of_the_relay_costs_nothing(
    spawn: Spawn, postgres: PostgresServer, broker_url: str, chance: random.Random
) -> None:
    with postgres.database() as url, postgres.database() as service_url:
        world = rabbit_world(spawn, url, broker_url, service_url).prepare()
        steps = {"R3": 20, "R4": 2, "R5": 3, "R6": 3}
        plan = ",".join(f"{step}=stop@{chance.randint(1, most)}" for step, most in steps.items())
        relay, service = world.relay(failpoints=plan, **RELAY_ENV), world.service()
        with _writing(world, chance):
            for _ in steps:
                eventually(lambda: relay.stopped, 60, "the relay to stop at a failpoint")
                postgres.kill()
                postgres.start()
                relay.cont()
            _more_is_applied(world)
            for _ in range(3):
                assert postgres.terminate_backends() > 0
                _more_is_published(world, by=20)
        world.settled()
        assert world.status()["relays"][0]["shards"] == 64
        end(relay, service)
        nothing_wrong(world, faults=len(steps) + 3, relays=[relay])
