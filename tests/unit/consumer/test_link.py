"""One connection to a broker, as the service sees it."""

from __future__ import annotations

import ssl
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pika import spec

from outbox.consumer import topology
from outbox.consumer.link import Link, shown
from outbox.errors import BrokerError, Unavailable
from tests.kit.consuming import Desk, Recorder, message
from tests.kit.scripted_amqp import ScriptedAmqp
from tests.kit.waiting import eventually

TLS = Path(__file__).parents[2] / "kit" / "tls"


def tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "broker.pem")
    return context


def test_a_certificate_for_the_name_in_the_url_is_accepted() -> None:
    with ScriptedAmqp(tls=tls()) as server:
        link = Link(f"{server.url}?cacertfile={TLS}/authority.pem&server_name_indication=broker.test")
        link.new_channel()
        link.drop()


@pytest.mark.parametrize(
    ("query", "says"), [("", "unable to get local issuer"), (f"?cacertfile={TLS}/authority.pem", "IP address mismatch")]
)
def test_a_certificate_of_an_unknown_authority_or_for_another_name_is_refused(query: str, says: str) -> None:
    with ScriptedAmqp(tls=tls()) as server, pytest.raises(BrokerError, match=says) as refusal:
        Link(server.url + query)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize(("method", "code"), [(spec.Connection.StartOk, 403), (spec.Connection.Open, 530)])
def test_a_broker_that_refuses_user_or_virtual_host_is_named_without_the_password(method: Any, code: int) -> None:
    with ScriptedAmqp() as server:
        server.refusals[method] = (code, "NOT_ALLOWED - no")
        with pytest.raises(BrokerError, match="the broker refuses us") as refusal:
            Link(server.url)
    assert "secret" not in str(refusal.value)


def test_a_broker_without_room_for_a_connection_is_one_to_wait_for() -> None:
    with ScriptedAmqp() as server:
        server.refusals[spec.Connection.Open] = (
            530,
            "NOT_ALLOWED - access to vhost '/' refused: connection limit (1) is reached",
        )
        with pytest.raises(Unavailable, match="takes no more connections"):
            Link(server.url)


def test_urls_are_shown_without_their_password() -> None:
    assert shown("amqp://user:secret@broker:5673/tenant") == "amqp://user:***@broker:5673/tenant"
    assert shown("embedded:///instance/broker.db") == "embedded:///instance/broker.db"


def test_a_connection_that_was_lost_is_never_opened_again_behind_our_back() -> None:
    with ScriptedAmqp() as server:
        link = Link(server.url)
        server.session(1).reset()
        with pytest.raises(OSError):
            eventually(lambda: link.receive(0.1), what="the loss to be noticed")
        for use in (lambda: link.receive(0.1), link.new_channel):
            with pytest.raises(Exception):  # noqa: B017 - which one does not matter: it does not work
                use()
        link.drop()
        with pytest.raises(AssertionError, match="connection 2"):
            server.session(2, timeout=0.2)


def test_a_wake_ends_the_wait_from_any_thread_and_is_harmless_after_the_end() -> None:
    with ScriptedAmqp() as server:
        link = Link(server.url)
        threading.Timer(0.05, link.wake).start()
        begun = time.monotonic()
        link.receive(20.0)
        assert time.monotonic() - begun < 10
        link.drop()
        link.wake()
        link.drop()


def test_messages_of_the_embedded_broker_are_raw_bytes_acknowledged_together(tmp_path: Path) -> None:
    url = f"embedded:///{tmp_path}/broker.db"
    recorder = Recorder()
    got: list[Any] = []
    wanted = topology.of(recorder.service, "openevent")
    link = Link(url)
    link.consume(wanted, 10, got.append)
    Desk(url).publish(message(1), message(2), b"\x00raw", properties={"headers": {"compression": "bzip2"}})

    def received(count: int) -> bool:
        link.receive(0.05)
        return len(got) >= count

    eventually(lambda: received(3), what="three messages")
    assert got[2].body == b"\x00raw"
    got[1].receipt.settled()
    assert link.acknowledge() == 0  # the first is not settled
    got[0].receipt.settled()
    assert link.acknowledge() == 2
    assert [each.body for each in link.in_hand()] == [b"\x00raw"]
    link.flush()
    link.drop()
    assert Desk(url).left("openevent.exports") == 1


def test_the_end_acknowledges_also_what_is_settled_behind_an_open_message(tmp_path: Path) -> None:
    url = f"embedded:///{tmp_path}/broker.db"
    got: list[Any] = []
    link = Link(url)
    link.consume(topology.of(Recorder().service, "openevent"), 10, got.append)
    Desk(url).publish(*(message(number) for number in range(5)))

    def received(count: int) -> bool:
        link.receive(0.05)
        return len(got) >= count

    eventually(lambda: received(5), what="the messages")
    for each in got[1:4]:
        each.receipt.settled()
    link.flush()
    link.drop()
    assert Desk(url).left("openevent.exports") == 2
