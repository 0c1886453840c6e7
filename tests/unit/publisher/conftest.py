from __future__ import annotations

import json
import re
from typing import Any

import pytest

from publisher import CHECKOUT


@pytest.fixture(scope="session")
def documented() -> dict[str, dict[str, Any]]:
    """Topic → the example of its payload in docs/messages.md."""
    text = (CHECKOUT / "docs" / "messages.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (\S+)$(.*?)(?=^### |\Z)", text, re.MULTILINE | re.DOTALL)
    found: dict[str, dict[str, Any]] = {}
    for topic, section in sections:
        example = re.search(r"```json\n(.*?)```", section, re.DOTALL)
        assert example, f"docs/messages.md shows no example of {topic}"
        found[topic] = json.loads(example[1])
    return found
