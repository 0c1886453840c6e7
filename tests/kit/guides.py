"""The blocks of the guides in docs/: what a page shows is what a test runs.

A block of a page that is a file says so in its first line: `# shop.py`. Blocks of one name (`# shop.py, continued`) are parts
of one file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"(?:#|--) (\S+)(?:, continued)?")


def page(name: str) -> str:
    """Return the text of docs/*name*."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(name: str, *languages: str) -> Iterator[tuple[str, str]]:
    """Yield file name and text of each block of docs/*name* in one of *languages*; none may be without a file name."""
    for match in _BLOCK.finditer(page(name)):
        if match[1] in languages:
            first = match[2].partition("\n")[0]
            named = _NAME.fullmatch(first)
            assert named, f"docs/{name}: the first line of a block must name its file, as `# shop.py`; it is {first!r}"
            yield named[1], match[2]


def files(name: str, *languages: str) -> dict[str, str]:
    """Return the files that docs/*name* shows in *languages*, whole."""
    whole: dict[str, str] = {}
    for file, text in blocks(name, *languages):
        whole[file] = f"{whole[file]}\n\n{text}" if file in whole else text
    return whole


def write(name: str, folder: Path, *languages: str) -> None:
    """Write the files that docs/*name* shows into *folder*."""
    for file, text in files(name, *languages).items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
