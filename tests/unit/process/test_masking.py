"""No text that is derived from a setting holds the secret in it, however the URL is written."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from consumers.notifications.mail import MailServer
from outbox import amqp_url
from outbox.errors import ConfigurationError
from outbox.process import masking
from outbox.settings import load

SECRET = "hunterQ7"
#: What a password may have beside it that means something in a URL. (No digits: `user:9/…` is a host with a port.)
_JUNK = st.text(alphabet=st.sampled_from("aZ:/@?#[]%&=;, \t\n\\'\"+~é\u2100\x00"), max_size=4)
_SCHEMES = ("amqp", "amqps", "postgresql+psycopg", "sqlite", "embedded", "http", "https", "smtp", "smtps", "redis", "")
_FORMS = (
    "{scheme}://user:{password}@host:5672/name",
    "{scheme}://user:{password}@host",
    "{scheme}://:{password}@host/name",
    "{scheme}://us/er:{password}@host/name",
    "{scheme}://us er:{password}@host/name",
    "{scheme}://user:{password}",
    "{scheme}:///user:{password}@host/name",
    "{scheme}:user:{password}@host/name",
    "{scheme}:/user:{password}@host/name",
    "user:{password}@host:5672/name",
    "user:{password}@host",
    "{scheme}://user:x@host/;{scheme}://user:{password}@host/",
    "{scheme}://user:{password}@one,user:{password}@two/name",
    "{scheme}://user:{password}@one:5672,two:5672/name",
    "{scheme}://host/name?user=me&password={password}",
    "{scheme}://user:x@host/name?sslpassword={password}&x=1",
    "{scheme}://user:{password}@[::1]/name",
    "{scheme}://user:{password}@[host]/name",
    "{scheme}://user:{password}@host:port/name",
    "{scheme}://user:{password}@host:99999/name",
    "{scheme}://user:{password}@host/name?unknown=1",
    "{scheme}://user:{password}@host/name?cacertfile=/not/there",
    " {scheme}://user:{password}@host/name\n",
    "%zz{scheme}://user:{password}@host/%zz",
)
_NAMES = ("DATABASE_URL", "BROKER_URL", "BROKER_MANAGEMENT_URL", "CONSUMER_DATABASE_URL")


def _url(form: str, scheme: str, before: str, after: str) -> str:
    password = f"{before}{SECRET}{after}"
    # What follows an @ is a host, where the form has no other.
    return form.format(scheme=scheme, password=password if "@" in form else password.replace("@", ""))


_URLS = st.builds(_url, st.sampled_from(_FORMS), st.sampled_from(_SCHEMES), _JUNK, _JUNK)


def _said_of(url: str) -> list[str]:
    """Everything that the settings say of *url*, taken or refused."""
    said = [masking.shown(url)]
    for name in _NAMES:
        try:
            settings = load({name: url})
        except ConfigurationError as error:
            said.append(str(error))
        else:
            said += [repr(settings), *(row.shown for row in settings.rows())]
    for read in (amqp_url.parse, lambda value: MailServer.of({"NOTIFICATIONS_SMTP_URL": value})):
        try:
            parsed = read(url)
        except ConfigurationError as error:
            said.append(str(error))
        else:
            said += [str(parsed), repr(parsed)]
    return said


@given(url=_URLS)
@example(url=f"smtp://user:?{SECRET}")
def test_no_text_derived_from_a_url_holds_its_password(url: str) -> None:
    assert [text for text in _said_of(url) if SECRET in text] == []


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("scheme", _SCHEMES)
def test_each_form_of_url_hides_a_plain_password(form: str, scheme: str) -> None:
    assert [text for text in _said_of(form.format(scheme=scheme, password=SECRET)) if SECRET in text] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("amqp://user:secret@host:5672/events", "amqp://user:***@host:5672/events"),
        (
            "postgresql+psycopg://host/db?password=secret&sslmode=require",
            "postgresql+psycopg://host/db?password=***&sslmode=require",
        ),
        ("postgresql+psycopg://host/db?options=-csecret&host=h", "postgresql+psycopg://host/db?…&host=h"),
        ("amqp://user:?secret", "amqp://…"),
        ("amqp://user:/secret", "amqp://…"),
        ("sqlite:////srv/my files/x.db", "sqlite:////srv/my files/x.db"),
        ("mail.example.org:25", "mail.example.org:25"),
        ("amqp://user:se cret@host", "amqp://…"),
        ("amqp://user:se/cret@host", "amqp://…"),
        ("amqp://u:p@one/;amqp://u:secret@two/", "amqp://…"),
        ("user:secret@host", "…"),
        ("secret", "…"),
    ],
)
def test_what_is_written_as_it_should_be_is_shown_without_its_password_and_of_anything_else_the_scheme(
    value: str, text: str
) -> None:
    assert masking.shown(value) == text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("can't reach user:secret@host", "can't reach user:***@host"),
        ("amqp://us/er:secret@host is away", "amqp://***@host is away"),
        ("host=x password='se cret' user=u", "host=x password=*** user=u"),
        ("SQLite file sqlite:////tmp/a@b/x.db", "SQLite file sqlite:////tmp/a@b/x.db"),
        ("at 12:00:01 ada@example.org said", "at 12:00:01 ada@example.org said"),
    ],
)
def test_a_sentence_keeps_its_words_and_loses_passwords(text: str, masked: str) -> None:
    assert masking.mask(text) == masked
