"""Every command that a text tells the reader to type exists, with its options."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import click

from outbox.cli import group
from tests.architecture.source import modules
from tests.kit.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

#: In documents: between backticks, or a line of a block of shell commands. In the code: in any text, after a sign that
#: something is to be typed.
_QUOTED = re.compile(r"`(?:flask |\S*/)?outbox ((?!=)[a-z][^`\n]*)`")
_LINE = re.compile(r"^\s*(?:\$ )?(?:\S*/|flask (?:--app \S+ )?)?outbox ([a-z][^#|>\n]*)", re.MULTILINE)
_BLOCK = re.compile(r"^```(?:sh|shell|console|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_TOLD = re.compile(r"(?:[:;`(] |run |, then |, or |` or |→ )(?:flask )?outbox ([a-z][^`;\n]*)")


def _texts() -> Iterator[tuple[str, str]]:
    """(where, what is typed after `outbox`)"""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        document = path.read_text(encoding="utf-8")
        for match in _QUOTED.finditer(document):
            yield path.name, match[1]
        for block in _BLOCK.finditer(document):
            for match in _LINE.finditer(block[1]):
                yield path.name, match[1]
    for module in modules("outbox", "publisher", "consumers"):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for pattern in (_QUOTED, _TOLD):
                    for match in pattern.finditer(node.value):
                        yield module.name, match[1]


def _problem(typed: str) -> str | None:
    """Say what is wrong with the words after `outbox`."""
    words = typed.replace("[", " ").replace("]", " ").replace("|", " | ").split()
    command: click.Command = group
    for word in words:
        if isinstance(command, click.Group):
            found = command.commands.get(word.rstrip(".,:)"))
            if found is not None:
                command = found
                continue
            if command is group:
                return f"outbox has no command {word!r}"
        if word.startswith("--") and re.fullmatch(r"--[a-z-]+[.,:)]?", word):
            known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
            if word.rstrip(".,:)") not in known:
                return f"outbox {command.name} has no option {word}"
    return None


def test_every_command_that_a_text_tells_to_type_exists() -> None:
    texts = list(_texts())
    assert len(texts) > 40
    problems = [f"{where}: `outbox {typed}`: {problem}" for where, typed in texts if (problem := _problem(typed))]
    assert problems == []


def test_the_reader_of_texts_knows_what_is_wrong() -> None:
    assert _problem("consumer parked requeue exports ID --yes") is None
    assert _problem("nope") == "outbox has no command 'nope'"
    assert _problem("consumer run exports --nope") == "outbox run has no option --nope"
    assert _problem("status --json, and so on") is None
