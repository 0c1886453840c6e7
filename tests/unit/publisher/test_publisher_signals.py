from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from publisher import signals, topics
from publisher.conference.states import FIRST_STATES, MOVES, TalkState


def test_signals_are_declared_in_one_module_that_holds_no_handler() -> None:
    tree = ast.parse(Path(signals.__file__).read_text(encoding="utf-8"))

    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]


def test_a_signal_has_the_name_of_its_variable() -> None:
    for signal in topics.TOPICS.values():
        assert getattr(signals, signal.name) is signal


def test_every_signal_travels_under_one_documented_topic(documented: dict[str, dict[str, Any]]) -> None:
    declared = {value for name, value in vars(signals).items() if not name.startswith("_") and hasattr(value, "send")}

    assert declared == set(topics.TOPICS.values())
    assert topics.TOPICS.keys() == documented.keys()


def test_every_state_of_a_session_has_its_moves_and_is_reached() -> None:
    reached, edge = set(FIRST_STATES), list(FIRST_STATES)
    while edge:
        new = [state for state in MOVES[edge.pop()] if state not in reached]
        reached.update(new)
        edge.extend(new)

    assert reached == set(TalkState) == MOVES.keys()
    assert all(state not in allowed for state, allowed in MOVES.items())
