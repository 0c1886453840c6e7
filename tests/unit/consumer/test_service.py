"""What a service accepts, and what it says when it does not."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from blinker import Namespace
from sqlalchemy.orm import DeclarativeBase

from outbox.consumer import HandlerMistake, Outcome, Reject, Retry, Service
from outbox.consumer.outcomes import Incomplete
from outbox.database import create_engine
from outbox.errors import ConfigurationError
from outbox.message import cloud_event, received
from tests.kit.consuming import TOPIC, Recorder, data, message, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine


@pytest.fixture
def engine(sqlite_url: str) -> Engine:
    return create_engine(sqlite_url)


# --- registration ------------------------------------------------------------------------------------------------------


def no_extra(message: Any, db_session: Any, /, *, event_id: int) -> None: ...
def named_first_two(message: Any, db_session: Any, *, event_id: int, **extra: Any) -> None: ...
def one_argument(message: Any, /, **extra: Any) -> None: ...
def three_by_position(message: Any, db_session: Any, event_id: int, /, **extra: Any) -> None: ...
async def asynchronous(message: Any, db_session: Any, /, **extra: Any) -> None: ...
def generator(message: Any, db_session: Any, /, **extra: Any) -> Any:
    yield 1


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (no_extra, "has no **extra"),
        (named_first_two, "before a `/`"),
        (one_argument, "before a `/`"),
        (three_by_position, "more than two arguments by position"),
        (asynchronous, "is async or a generator"),
        (generator, "is async or a generator"),
    ],
)
def test_a_handler_that_can_not_work_is_refused_with_its_name_and_place(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Service("exports").on(TOPIC)(function)
    assert problem in str(refusal.value)
    assert function.__name__ in str(refusal.value)
    assert "test_service.py:" in str(refusal.value)


def test_the_line_to_write_is_python_for_a_handler_without_fields_too() -> None:
    def no_slash(message: Any, db_session: Any, **extra: Any) -> None: ...

    with pytest.raises(ConfigurationError) as refusal:
        Service("exports").on(TOPIC)(no_slash)
    line = str(refusal.value).rpartition("write: ")[2]
    assert line == "def no_slash(message, db_session, /, **extra)"
    compile(f"{line}: ...", "the advice", "exec")


def test_the_refusal_holds_the_line_to_write() -> None:
    with pytest.raises(ConfigurationError, match=r"write: def no_extra\(message, db_session, /, \*, event_id, \*\*extra\)"):
        Service("exports").on(TOPIC)(no_extra)


def test_a_handler_for_several_topics_is_registered_for_each() -> None:
    service = Service("exports")

    @service.on("speaker.modified", "session.modified")
    def rebuild(message: Any, db_session: Any, /, **extra: Any) -> None: ...

    assert service.topics == ["session.modified", "speaker.modified"]


def test_a_second_handler_for_a_topic_is_refused() -> None:
    recorder = Recorder()
    with pytest.raises(ConfigurationError, match=r"has a handler in service 'exports': .*_record"):
        recorder.service.emit(Namespace().signal("sessions-modified"), topic=TOPIC)


@pytest.mark.parametrize("topic", ["session.*", "#", "", "a b", "x" * 256])
def test_a_topic_that_no_message_can_have_is_refused(topic: str) -> None:
    with pytest.raises(ConfigurationError, match="topic"):
        Service("exports").on(topic)(lambda _message, _session, /, **_extra: None)


def test_a_decorator_without_a_topic_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="name the topics"):
        Service("exports").on()
    with pytest.raises(ConfigurationError, match="name the topics"):
        Service("exports").on(no_extra)  # type: ignore[arg-type]


def test_all_problems_of_a_service_are_reported_together() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Service("Exports!", batch=0, order="sometimes", tables=DeclarativeBase)  # type: ignore[arg-type]
    text = str(refusal.value)
    assert "'Exports!'" in text
    assert "batch=0" in text
    assert "order='sometimes'" in text
    assert "no MetaData; of a declarative base give Base.metadata" in text


def test_a_service_without_handlers_does_not_run() -> None:
    with pytest.raises(ConfigurationError, match="has no handlers"):
        Service("exports").check()


def test_importing_the_consumer_loads_no_flask_and_no_broker_client() -> None:
    code = (
        "import sys, outbox.consumer; "
        "print([name for name in ('flask', 'kombu', 'amqp', 'pika') if name in sys.modules], end='')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]"


def test_without_kombu_running_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['amqp'] = sys.modules['kombu'] = None\n"
        "import outbox.errors\n"
        "try:\n    import outbox.consumer.runtime\n"
        "except outbox.errors.ConfigurationError as error:\n    print(error, end='')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("pip install 'flask-outbox[rabbitmq]'")


# --- calling -----------------------------------------------------------------------------------------------------------


def test_known_fields_come_by_keyword_and_all_others_in_extra(engine: Engine) -> None:
    service, got = Service("exports"), []

    @service.on(TOPIC)
    def rebuild(message: Any, db_session: Any, /, *, event_id: int, change: str = "none", **extra: Any) -> None:
        got.append((event_id, change, extra, message.data))

    body = data(event_id=1, message="a field of that name", db_session=2, new=[3])
    assert service.deliver(message(body=body), engine) is Outcome.APPLIED
    extra = {"message": "a field of that name", "db_session": 2, "new": [3]}
    assert got == [(1, "none", extra, {"event_id": 1, **extra})]


def test_a_missing_field_is_the_messages_fault_and_named(engine: Engine) -> None:
    service = Service("exports")

    @service.on(TOPIC)
    def rebuild(message: Any, db_session: Any, /, *, event_id: int, change: str, **extra: Any) -> None: ...

    with pytest.raises(Incomplete, match=r"rebuild needs change, event_id; it has other"):
        service.deliver(message(body=data(other=1)), engine)


@pytest.mark.parametrize("body", [b"[1,2]", b'"text"', b"null", b"7"])
def test_data_that_is_no_object_brings_no_keywords_but_is_in_the_message(engine: Engine, body: bytes) -> None:
    service, got = Service("exports"), []

    @service.on(TOPIC)
    def rebuild(message: Any, db_session: Any, /, **extra: Any) -> None:
        got.append((message.data, extra))

    service.deliver(message(body=body), engine)
    assert got == [({b"[1,2]": [1, 2], b'"text"': "text", b"null": None, b"7": 7}[body], {})]


def test_a_handler_that_needs_fields_finds_no_object_incomplete(engine: Engine) -> None:
    with pytest.raises(Incomplete, match="its data is no JSON object"):
        Recorder().service.deliver(message(body=b"[1]"), engine)


def test_what_the_handler_raises_is_raised_by_deliver_and_nothing_is_left(engine: Engine) -> None:
    def fail(_message: Any, session: Any) -> None:
        session.execute(recorder.effects.insert().values(message_id="x", number=1, late=False))
        raise LookupError("no such event")

    recorder = Recorder(before=fail)
    sent = message()
    with pytest.raises(LookupError, match="no such event"):
        recorder.service.deliver(sent, engine)
    assert recorder.seen(engine) == []
    recorder.before = None
    assert recorder.service.deliver(sent, engine) is Outcome.APPLIED  # its inbox row was rolled back too


def test_deliver_takes_what_was_sent_what_is_received_and_bytes(engine: Engine) -> None:
    recorder = Recorder()
    one, two, three = message(1), message(2), message(3)
    recorder.service.deliver(one, engine)
    recorder.service.deliver(cloud_event(two), engine)
    recorder.service.deliver(received(cloud_event(three)), engine)
    assert recorder.numbers(engine) == [1, 2, 3]
    assert recorder.service.deliver(cloud_event(one), engine) is Outcome.DUPLICATE


def test_deliver_keeps_what_a_test_has_put_into_its_database(engine: Engine) -> None:
    recorder = Recorder()
    memory = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    recorder.tables.create_all(memory)
    with memory.begin() as connection:
        connection.execute(recorder.effects.insert().values(message_id="before", number=7, late=False))
    assert recorder.service.deliver(message(8), memory) is Outcome.APPLIED
    assert recorder.numbers(memory) == [7, 8]


# --- a handler and its session -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["commit", "rollback", "close", "reset", "invalidate"])
def test_a_handler_can_not_end_the_transaction_that_others_share(engine: Engine, call: str) -> None:
    recorder = Recorder(before=lambda _message, session: getattr(session, call)())
    with pytest.raises(HandlerMistake, match=rf"db_session\.{call}\(\)"):
        recorder.service.deliver(message(), engine)
    assert recorder.seen(engine) == []


def test_a_savepoint_of_its_own_may_be_rolled_back(engine: Engine) -> None:
    def undo(_message: Any, session: Any) -> None:
        with session.begin_nested() as savepoint:
            session.execute(recorder.effects.insert().values(message_id="undone", number=0, late=False))
            savepoint.rollback()

    recorder = Recorder(before=undo)
    recorder.service.deliver(message(5), engine)
    assert recorder.numbers(engine) == [5]


def test_a_savepoint_left_open_is_named(engine: Engine) -> None:
    recorder = Recorder(before=lambda _message, session: session.begin_nested())
    with pytest.raises(HandlerMistake, match="left a savepoint open"):
        recorder.service.deliver(message(), engine)


def test_sys_exit_in_a_handler_fails_the_message_not_the_process(engine: Engine) -> None:
    recorder = Recorder(before=lambda _message, _session: sys.exit(3))
    with pytest.raises(HandlerMistake, match=r"called sys.exit\(\)"):
        recorder.service.deliver(message(), engine)


def test_a_cancelled_task_in_a_handler_fails_the_message_not_the_process(engine: Engine) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    recorder = Recorder(before=lambda _message, _session: asyncio.run(cancelled()))
    with pytest.raises(HandlerMistake, match="was cancelled by what it called"):
        recorder.service.deliver(message(), engine)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **fields: Any) -> Any:
        return function(*arguments, **fields)

    return call


class AsyncObject:
    async def __call__(self, message: Any, db_session: Any, /, **extra: Any) -> None: ...


@pytest.mark.parametrize(
    "handler", [wrapped(asynchronous), wrapped(generator), AsyncObject()], ids=["async", "generator", "object"]
)
def test_a_handler_that_hides_that_it_is_async_fails_the_message_instead_of_losing_its_effect(
    engine: Engine, handler: Callable[..., Any]
) -> None:
    service = Service("exports")
    service.on(TOPIC)(handler)
    with pytest.raises(HandlerMistake, match="which nothing would run; write a plain function"):
        service.deliver(message(), engine)


# --- signals -----------------------------------------------------------------------------------------------------------


def test_a_message_arrives_as_the_signal_it_was_sent_as(engine: Engine) -> None:
    service, signal, got = Service("exports"), Namespace().signal("sessions-modified"), []
    service.emit(signal, topic=TOPIC)

    @signal.connect
    def rebuild(sender: Any, event_id: int, **kwargs: Any) -> None:
        got.append((sender, event_id, kwargs, service.message.topic, service.db_session.in_transaction()))

    service.check()
    service.deliver(message(body=data(event_id=1, change="accepted")), engine)
    assert got == [(service, 1, {"change": "accepted"}, TOPIC, True)]
    with pytest.raises(LookupError):
        _ = service.message


def test_receivers_write_in_the_messages_transaction(engine: Engine) -> None:
    recorder, signal = Recorder(name="mirror"), Namespace().signal("sessions-modified")
    recorder.service.emit(signal, topic="other")

    @signal.connect
    def write(sender: Service, number: int, **_: Any) -> None:
        values = {"message_id": sender.message.id, "number": number, "late": False}
        sender.db_session.execute(recorder.effects.insert().values(values))
        if number < 0:
            raise ValueError(number)

    recorder.service.deliver(message(4, topic="other"), engine)
    with pytest.raises(ValueError, match="-1"):
        recorder.service.deliver(message(-1, topic="other"), engine)
    assert recorder.numbers(engine) == [4]


def test_a_signal_that_is_muted_elsewhere_still_reaches_its_receivers(engine: Engine) -> None:
    service, signal, got = Service("exports"), Namespace().signal("sessions-modified"), []
    service.emit(signal, topic=TOPIC)

    @signal.connect
    def rebuild(_sender: Any, **kwargs: Any) -> None:
        got.append(kwargs)

    with signal.muted():
        service.deliver(message(1), engine)
    assert got == [{"number": 1}]


def test_a_signal_without_receivers_is_refused_before_the_service_runs() -> None:
    service, signal = Service("exports"), Namespace().signal("sessions-modified")
    service.emit(signal, topic=TOPIC)
    with pytest.raises(ConfigurationError, match="'sessions-modified' has no receivers"):
        service.check()


def test_receivers_of_another_sender_are_none() -> None:
    service, signal, app = Service("exports"), Namespace().signal("sessions-modified"), object()
    service.emit(signal, topic=TOPIC)
    signal.connect(lambda _sender, **_: None, sender=app, weak=False)
    with pytest.raises(ConfigurationError, match="to any sender"):
        service.check()


def test_an_async_receiver_is_refused_before_the_service_runs() -> None:
    service, signal = Service("exports"), Namespace().signal("sessions-modified")
    service.emit(signal, topic=TOPIC)

    async def rebuild(_sender: Any, **_: Any) -> None: ...

    signal.connect(rebuild)
    with pytest.raises(ConfigurationError, match=r"rebuild.* is async"):
        service.check()


def test_a_receiver_that_hides_that_it_is_async_fails_the_message_instead_of_losing_its_effect(engine: Engine) -> None:
    service, signal = Service("exports"), Namespace().signal("sessions-modified")
    service.emit(signal, topic=TOPIC)

    async def rebuild(_sender: Any, **_: Any) -> None: ...

    receiver = wrapped(rebuild)
    signal.connect(receiver)
    with pytest.raises(HandlerMistake, match=r"rebuild.* returned a coroutine"):
        service.deliver(message(), engine)


def test_a_signal_whose_receivers_were_collected_fails_the_message_instead_of_losing_its_effect(engine: Engine) -> None:
    service, signal = Service("exports"), Namespace().signal("sessions-modified")
    service.emit(signal, topic=TOPIC)
    with pytest.raises(HandlerMistake, match="has no receivers any more"):
        service.deliver(message(), engine)


# --- what a handler may raise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [-1, float("nan"), float("inf"), 400 * 86_400])
def test_retry_refuses_a_time_that_is_none(after: float) -> None:
    with pytest.raises(ValueError, match="0 seconds to 366 days"):
        Retry(after=after)


def test_reject_carries_its_reason() -> None:
    assert str(Reject("no such room")) == "no such room"


def test_tables_of_the_consumer_are_made_by_deliver(engine: Engine) -> None:
    recorder = Recorder()
    recorder.service.deliver(message(3), engine)
    assert [row.number for row in rows(engine, recorder.effects)] == [3]


def test_what_a_service_finds_wrong_with_its_own_settings_is_said_with_everything_else_at_its_start() -> None:
    service = Service("letters")
    looked = []

    @service.at_start
    def mail() -> None:
        raise ConfigurationError("MAIL_URL=x: it must be smtp://host:port")

    @service.at_start
    def folder() -> None:
        looked.append("folder")

    with pytest.raises(ConfigurationError) as refused:
        service.check()
    assert looked == ["folder"]
    assert str(refused.value).splitlines() == [
        "MAIL_URL=x: it must be smtp://host:port",
        "service 'letters' has no handlers; register one: @service.on('session.modified')",
    ]
