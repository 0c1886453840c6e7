"""From a Blinker signal to a held message.

A captured signal stays an ordinary signal: same object, same receivers, same `send`. Its capture is listed among the
receivers, and it runs before all others, also while the signal is muted: Blinker promises no order, a receiver that raises
keeps the rest from running, and `muted()` in one thread mutes the signal in all.
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from blinker import NamedSignal, Signal

from outbox.errors import CaptureError, ConfigurationError, InvalidMessage
from outbox.message import check_name
from outbox.store.capturing import check_unheard

#: What can name a key. Floats can't: 0.1 + 0.2 would be another key than 0.3.
_KEY_TYPES = (str, int, UUID, date, Decimal)


@dataclass(frozen=True, slots=True)
class KeyTemplate:
    """A key with fields of the signal in it: `event:{event_id}`."""

    text: str
    fields: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> KeyTemplate:
        """Return the template; raise ConfigurationError, saying why, for one that could not work for every signal."""
        try:
            parts = list(string.Formatter().parse(text))
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"key={text!r}: {error}; write it like 'event:{{event_id}}'") from error
        fields = []
        for _, field, format_spec, conversion in parts:
            if field is None:
                continue
            if not field.isidentifier() or format_spec or conversion:
                raise ConfigurationError(
                    f"key={text!r}: {{{field}}} must be the plain name of a field of the signal, like 'event:{{event_id}}'"
                )
            fields.append(field)
        if not fields:
            raise ConfigurationError(
                f"key={text!r} names no field, so all messages would wait for one another; write 'event:{{event_id}}', "
                "or leave the key out if order does not matter"
            )
        return cls(text, tuple(fields))

    def fill(self, data: Mapping[str, object]) -> str:
        """Return the key for *data*; raise InvalidMessage for a field that is missing, None, empty or can't name a key."""
        return self.text.format_map({field: self._value(field, data) for field in self.fields})

    def _value(self, field: str, data: Mapping[str, object]) -> str:
        if field not in data:
            raise InvalidMessage(f"key {self.text!r}: the signal was sent without {field}; add {field}=… to send()")
        value = data[field]
        if isinstance(value, Enum):
            value = value.value
        if value is None:
            raise InvalidMessage(f"key {self.text!r}: {field} is None; flush before you send, so that new rows have their ids")
        if not isinstance(value, _KEY_TYPES) or isinstance(value, bool):
            raise InvalidMessage(f"key {self.text!r}: {field} is a {type(value).__name__}; send a text, a number or a UUID")
        if value == "":
            raise InvalidMessage(f"key {self.text!r}: {field} is empty; without it the key would name no one thing")
        return str(value)


class Capture:
    """The receiver that turns a signal into a held message; one for each outbox, signal and topic."""

    def __init__(
        self,
        signal: Signal,
        topic: str,
        key: str | None,
        unheard: str,
        *,
        outbox: object,
        hold: Callable[[Capture, object, tuple[object, ...], dict[str, object]], UUID | None],
    ) -> None:
        if not isinstance(signal, Signal):
            raise ConfigurationError(f"{signal!r} is no Blinker signal; give one, such as Namespace().signal('sold')")
        self.signal_name = signal.name if isinstance(signal, NamedSignal) else repr(signal)
        try:
            check_name("topic", topic, forbidden="*#", blanks=False)
            check_unheard(unheard)
        except InvalidMessage as error:
            raise ConfigurationError(f"signal {self.signal_name!r}: {error}") from error
        self.topic = topic
        self.key = None if key is None else KeyTemplate.parse(key)
        self.unheard = unheard
        self.outbox = outbox
        self._hold = hold

    def __call__(self, sender: object, /, *unnamed: object, **data: object) -> UUID | None:
        """Hold one message for this sending of the signal and return its id: `send()` gives it among its receivers' results.

        None where the sender belongs to another outbox. Raises CaptureError or InvalidMessage, naming the signal.
        """
        try:
            return self._hold(self, sender, unnamed, data)
        except CaptureError as error:
            raise CaptureError(f"signal {self.signal_name!r}: {error}") from error
        except InvalidMessage as error:
            raise InvalidMessage(f"signal {self.signal_name!r}: {error}") from error

    def check(self, sender: object, unnamed: tuple[object, ...], data: Mapping[str, object]) -> None:
        """Raise InvalidMessage if data was sent in a way that would lose it: without a name, or in the sender's place."""
        advice = "the sender comes first, and each part of the data has a name: send(sender, event_id=7)"
        if unnamed:
            raise InvalidMessage(f"{len(unnamed)} arguments of send() beside the sender have no name; {advice}")
        is_record = dataclasses.is_dataclass(sender) and not isinstance(sender, type) and not data
        if isinstance(sender, (Mapping, list, tuple, set)) or is_record:
            raise InvalidMessage(f"the sender is a {type(sender).__name__}, which looks like the data; {advice}")

    def __repr__(self) -> str:
        return f"<capture of signal {self.signal_name!r} as {self.topic!r}>"


class _CapturedSignal(Signal):
    """What a signal becomes when it is captured: captures first, whatever else is connected or muted.

    `receivers_for` leaves captures out: they have run by then, and who calls receivers by hand is not sending.
    """

    def send(self, sender: Any | None = None, /, *unnamed: Any, **kwargs: Any) -> list[tuple[Callable[..., Any], Any]]:
        return [*self._capture(sender, unnamed, kwargs), *super().send(sender, *unnamed, **kwargs)]

    async def send_async(
        self, sender: Any | None = None, /, *unnamed: Any, **kwargs: Any
    ) -> list[tuple[Callable[..., Any], Any]]:
        return [*self._capture(sender, unnamed, kwargs), *await super().send_async(sender, *unnamed, **kwargs)]

    def receivers_for(self, sender: Any) -> Any:
        return (receiver for receiver in super().receivers_for(sender) if not isinstance(receiver, Capture))

    def _capture(
        self, sender: object, unnamed: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Callable[..., Any], Any]]:
        data = {name: value for name, value in kwargs.items() if name not in ("_async_wrapper", "_sync_wrapper")}
        return [(capture, capture(sender, *unnamed, **data)) for capture in captures(self)]


def captures(signal: Signal) -> list[Capture]:
    """Return the captures of *signal*, in the order in which they were registered."""
    return [receiver for receiver in list(signal.receivers.values()) if isinstance(receiver, Capture)]


def connect(signal: Signal, capture: Capture) -> None:
    """Connect *capture*, strongly and for every sender, and let it run first from now on."""
    # The object itself changes its class: others hold references to it, so it can't be replaced by another.
    if not isinstance(signal, _CapturedSignal):
        signal.__class__ = _captured(type(signal))
    # Blinker holds receivers weakly unless told: this one would be collected, and messages silently stop.
    signal.connect(capture, weak=False)


_classes: dict[type[Signal], type[Signal]] = {}


def _captured(cls: type[Signal]) -> type[Signal]:
    if cls not in _classes:
        _classes[cls] = type(cls.__name__, (_CapturedSignal, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})
    return _classes[cls]
