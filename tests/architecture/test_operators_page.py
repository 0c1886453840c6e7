"""docs/operating.md names all that an operator can meet: every state, every event of the log, every metric that it watches."""

from __future__ import annotations

import ast
import re
from itertools import product
from typing import TYPE_CHECKING

import pytest
import yaml

from outbox import tables
from outbox.consumer import tables as consumer_tables
from outbox.relay.order.topic_probes import Trouble
from tests.architecture.source import modules
from tests.kit.guides import files, page

if TYPE_CHECKING:
    from collections.abc import Iterator
    from enum import StrEnum

_EVENT = re.compile(r"[a-z]+\.[a-z_]+")
_METRICS = ("counter", "gauge", "histogram")
_METRIC = re.compile(r"\b(?:outbox|consumer)_[a-z_]+")
#: Calls whose event is put together, and how it is: `Announcer.state("database", "lost", …)` is the event `database.lost`.
_IN_PARTS = {"state": ("{0}.{1}", 2), "trouble": ("broker.{0}", 1)}


def texts_of(argument: ast.expr) -> list[str]:
    """Return the texts that *argument* may be: itself, or either side of `… if … else …`."""
    if isinstance(argument, ast.IfExp):
        return [*texts_of(argument.body), *texts_of(argument.orelse)]
    return [argument.value] if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else []


def events_of(call: ast.Call) -> Iterator[str]:
    """Yield the events that *call* may log."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("say", "_say"):
        yield from (text for argument in call.args for text in texts_of(argument) if _EVENT.fullmatch(text))
    elif name in _IN_PARTS and len(call.args) > 1:
        form, needed = _IN_PARTS[name]
        yield from (form.format(*parts) for parts in product(*map(texts_of, call.args[:needed])))


def events() -> set[str]:
    """Return the name of every event that the library logs."""
    calls = (node for module in modules("outbox") for node in ast.walk(module.tree) if isinstance(node, ast.Call))
    return {event for call in calls for event in events_of(call)} | {f"topic.{trouble}" for trouble in Trouble}


def metrics() -> set[str]:
    """Return the name of every metric of the library, with the suffixes of histograms."""
    made: set[str] = set()
    for module in modules("outbox"):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _METRICS:
                for name in texts_of(node.args[0]):
                    made |= {name, *(f"{name}_{end}" for end in ("bucket", "count", "sum"))}
    return made


def explained() -> set[str]:
    """Return what has a row of its own in a table of the page."""
    return set(re.findall(r"^\| `([^`]+)`", page("operating.md"), re.MULTILINE))


def test_every_event_of_the_log_is_explained_to_the_operator_and_no_other() -> None:
    known = events()
    assert {"relay.started", "consumer.parked", "database.lost", "topic.silent", "broker.connected"} <= known
    rows = set(re.findall(r"^\| `([a-z]+\.[a-z_]+)`", page("operating.md"), re.MULTILINE))
    assert known - rows == set(), "docs/operating.md lacks a row in its table of log events: what it means, and what to do"
    assert rows - known == set(), "docs/operating.md explains events that nothing logs any more"


@pytest.mark.parametrize("states", [tables.State, consumer_tables.State, consumer_tables.Reason])
def test_every_state_is_explained_to_the_operator(states: type[StrEnum]) -> None:
    assert {state.value for state in states} - explained() == set()


def test_what_the_alerts_watch_is_measured() -> None:
    (group,) = yaml.safe_load(files("operating.md", "yaml")["alerts.yaml"])["groups"]
    named = {name for rule in group["rules"] for name in _METRIC.findall(rule["expr"])}
    assert len(named) > 5
    assert named - metrics() == set()
