"""A broker URL is read in one way, says what is wrong with it, and never shows its password."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from outbox import amqp_url
from outbox.errors import ConfigurationError

_AUTHORITY = Path(__file__).parents[1] / "kit" / "tls" / "authority.pem"


@pytest.mark.parametrize(
    ("path", "vhost"),
    [("", "/"), ("/", "/"), ("//", "/"), ("/%2F", "/"), ("/events", "events"), ("/a%2Fb", "a/b"), ("/%C3%BC", "ü")],
)
def test_the_path_is_the_virtual_host(path: str, vhost: str) -> None:
    assert amqp_url.parse(f"amqp://user:secret@broker.test{path}").vhost == vhost


def test_ports_follow_the_scheme_unless_given() -> None:
    assert amqp_url.parse("amqp://u:p@broker.test").port == 5672
    assert amqp_url.parse("amqps://u:p@broker.test").port == 5671
    assert amqp_url.parse("amqps://u:p@broker.test:7000").port == 7000


def test_user_and_password_may_hold_anything_percent_encoded() -> None:
    url = amqp_url.parse("amqp://us%40er:p%3A%2F%40ss@broker.test")
    assert (url.user, url.password) == ("us@er", "p:/@ss")


def test_what_is_shown_has_no_password() -> None:
    url = amqp_url.parse("amqps://user:secret@broker.test/events?heartbeat=20")
    assert str(url) == "amqps://user:***@broker.test:5671/events"
    assert "secret" not in repr(url)
    assert str(amqp_url.parse("amqp://user:secret@[::1]/")) == "amqp://user:***@[::1]:5672/"


def test_query_parameters_are_read() -> None:
    url = amqp_url.parse("amqps://u:p@10.0.0.1?cacertfile=/ca.pem&certfile=/c.pem&keyfile=/k.pem&server_name_indication=b.test")
    assert (url.cacertfile, url.certfile, url.keyfile, url.server_name) == ("/ca.pem", "/c.pem", "/k.pem", "b.test")
    assert url.heartbeat is None
    assert amqp_url.parse("amqp://u:p@broker.test?heartbeat=0").heartbeat == 0


def test_tls_verifies_certificate_and_host_name_always() -> None:
    context = amqp_url.parse(f"amqps://u:p@broker.test?cacertfile={_AUTHORITY}").tls_context()
    assert context is not None
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert amqp_url.parse("amqps://u:p@broker.test").server_name == "broker.test"
    assert amqp_url.parse("amqp://u:p@broker.test").tls_context() is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("amqp://broker.test/", "names no user and password"),
        ("amqp://user@broker.test/", "names no user and password"),
        ("amqp://user:@broker.test/", "names no user and password"),
        ("http://user:secret@broker.test/", "not amqp://"),
        ("amqp://user:secret@/events", "not amqp://"),
        ("amqp://user:secret@broker.test:99999/", "a port that is no number up to 65535"),
        ("amqp://user:secret@broker.test/?verify=verify_none", "verify is no parameter .known: cacertfile"),
        ("amqp://user:secret@broker.test/?cacertfile=/ca.pem", "cacertfile needs amqps://"),
        ("amqps://user:secret@broker.test/?cacertfile=", "cacertfile is empty"),
        ("amqps://user:secret@broker.test/?keyfile=/k.pem", "keyfile needs certfile"),
        ("amqp://user:secret@broker.test/?heartbeat=soon", "heartbeat must be a number of seconds"),
    ],
)
def test_what_cannot_be_used_is_refused_without_showing_the_password(url: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as refused:
        amqp_url.parse(url)
    assert "secret" not in str(refused.value)


def test_certificates_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    nonsense = tmp_path / "ca.pem"
    nonsense.write_text("no certificate")
    for path in (nonsense, tmp_path / "missing.pem"):
        with pytest.raises(ConfigurationError, match=f"can't read the certificates .{path}") as refused:
            amqp_url.parse(f"amqps://user:secret@broker.test?cacertfile={path}").tls_context()
        assert "secret" not in str(refused.value)
