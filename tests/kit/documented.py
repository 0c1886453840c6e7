"""The examples in docs/messages.md, to hold the code to them."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.kit.processes import ROOT


def payloads() -> dict[str, dict[str, Any]]:
    """Topic → the example of its payload."""
    text = (ROOT / "docs" / "messages.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (\S+)$(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)
    found: dict[str, dict[str, Any]] = {}
    for topic, section in sections:
        example = re.search(r"```json\n(.*?)```", section, re.DOTALL)
        assert example, f"docs/messages.md shows no example of {topic}"
        found[topic] = json.loads(example[1])
    return found
