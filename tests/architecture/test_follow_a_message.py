"""docs/follow-a-message.md is held to the code: it leaves out no file of the way, and names nothing that is not there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.source import modules
from tests.kit.guides import page
from tests.kit.processes import ROOT

_ROW = re.compile(r"^\| `([a-z_/]+\.py)` \| (.*?) \| ", re.MULTILINE)
#: Every module of these is on the way, or beside it.
_ROOMS = ("outbox/capture", "outbox/relay", "outbox/consumer", "outbox/store")


def rows() -> list[tuple[str, list[str]]]:
    """Return each file that the page names in a table, with the names in it."""
    return [(path, re.findall(r"`([\w.]+)`", names)) for path, names in _ROW.findall(page("follow-a-message.md"))]


def defined(path: str) -> set[str]:
    """Return what a file below outbox/ defines, or imports for others to use: `function`, `Class.method`."""
    found: set[str] = set()
    for node in ast.parse((ROOT / "outbox" / path).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                found |= {name} | {f"{name}.{each.name}" for each in body if isinstance(each, ast.FunctionDef)}
            case ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
            case ast.Try(body=body):
                found |= {alias.name for each in body if isinstance(each, ast.ImportFrom) for alias in each.names}
    return found


@pytest.mark.parametrize(("path", "names"), rows())
def test_what_the_page_names_exists(path: str, names: list[str]) -> None:
    assert names, f"docs/follow-a-message.md names nothing in {path}"
    assert (ROOT / "outbox" / path).is_file(), f"docs/follow-a-message.md names outbox/{path}: it has moved"
    assert set(names) - defined(path) == set(), f"docs/follow-a-message.md names what outbox/{path} does not have"


def test_no_file_is_left_out() -> None:
    named = {path for path, _ in rows()}
    there = {str(each.path.relative_to(ROOT / "outbox")) for each in modules(*_ROOMS) if not each.is_package}
    assert there - named == set(), "docs/follow-a-message.md lacks a row: on the way, or beside it"


def test_the_legend_has_every_failpoint_and_no_other() -> None:
    calls = re.compile(r'failpoints\.reached\("(\w+)"\)')
    reached = {code for each in modules("outbox") for code in calls.findall(each.path.read_text(encoding="utf-8"))}
    legend = set(re.findall(r"^\| `([A-Z]\d)` \|", page("follow-a-message.md"), re.MULTILINE))
    assert legend == reached
