"""The name on the package index: `outbox` is another project there, so no text may send anybody to it."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING

import pytest

from outbox.errors import DISTRIBUTION
from tests.kit.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
_FOLDERS = ("outbox", "publisher", "consumers", "tests", "benchmarks", "docs", ".ci", ".github")
_TEXTS = (".py", ".md", ".toml", ".yml", ".yaml", ".html", ".sh", "")
#: Whatever installs, then the bare name; and the bare name with extras, whatever stands before it.
_ANOTHER_PROJECT = re.compile(
    r"\b(?:pip3?|pipx|uv|uv pip|poetry|pdm) (?:install|add) [^\n`]*?(?<![\w./-])outbox(?=$|[\s'\"`\[=<>~!,;)])"
    rf"|(?<![\w./-])outbox\[(?:{'|'.join(PROJECT['optional-dependencies'])})\b",
    re.MULTILINE,
)


def _texts() -> Iterator[Path]:
    yield from (path for path in ROOT.iterdir() if path.is_file() and path.suffix in _TEXTS)
    for folder in _FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in _TEXTS and "__pycache__" not in path.parts:
                yield path


def test_errors_advise_the_distribution_that_is_built() -> None:
    assert PROJECT["name"] == DISTRIBUTION


@pytest.mark.parametrize(
    ("text", "is_another"),
    [
        ("pip install {}", True),
        ("pip install --upgrade '{}[rabbitmq]' flask", True),
        ("uv add {}>=0.1", True),
        ("use {}[metrics]", True),
        ("pip install flask-{}", False),
        ("pip install 'flask-{}[rabbitmq]'", False),
        ("pip install dist/flask_{}-0.1.0-py3-none-any.whl", False),
        ("COPY {} {}", False),
        ("{}[message_id]", False),
    ],
)
def test_advice_to_install_another_project_is_recognised(text: str, is_another: bool) -> None:
    assert bool(_ANOTHER_PROJECT.search(text.replace("{}", "outbox"))) is is_another


def test_no_text_advises_to_install_another_project() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in _texts()
        for match in _ANOTHER_PROJECT.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
