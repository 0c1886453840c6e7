"""What a reader may expect of every file of the library and of the application in the box."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

import pytest

from tests.architecture.source import Module, modules

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 500
_OURS = ("outbox", "publisher", "consumers")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(module: Module) -> Iterator[Definition]:
    """Its public functions and classes."""
    for node in module.tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def _methods(module: Module, cls: str) -> Iterator[Definition]:
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            yield from (item for item in node.body if isinstance(item, Definition) and not item.name.startswith("_"))


def test_every_module_says_what_it_is_for() -> None:
    silent = [module.name for module in modules(*_OURS) if module.tree.body and not ast.get_docstring(module.tree)]
    assert silent == []


def test_every_public_function_and_class_has_a_docstring() -> None:
    silent = [
        f"{module.name}.{node.name}" for module in modules(*_OURS) for node in _public(module) if not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("module", "cls"),
    [
        ("outbox.capture.outbox", "Outbox"),
        ("outbox.consumer.service", "Service"),
        ("outbox.settings", "Settings"),
        ("outbox.relay.broker", "Broker"),
        ("outbox.process.backoff", "Backoff"),
        ("outbox.process.probes", "Server"),
    ],
)
def test_every_public_method_of_what_users_hold_has_a_docstring(module: str, cls: str) -> None:
    (found,) = (each for each in modules("outbox") if each.name == module)
    methods = list(_methods(found, cls))
    assert methods
    assert [method.name for method in methods if not ast.get_docstring(method)] == []


def test_no_file_is_longer_than_a_person_reads_at_once() -> None:
    long = {
        module.name: lines
        for module in modules(*_OURS)
        if (lines := len(module.path.read_text(encoding="utf-8").splitlines())) > _LONGEST
    }
    assert long == {}


def test_the_library_prints_only_in_its_commands() -> None:
    printing = [
        module.name
        for module in modules("outbox")
        if not module.is_in("outbox.cli")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_no_test_sleeps() -> None:
    sleeping = [
        f"{module.name} line {node.lineno}"
        for module in modules("tests")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]
    assert sleeping == []
