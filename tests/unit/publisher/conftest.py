from __future__ import annotations

from typing import Any

import pytest

from tests.kit.documented import payloads


@pytest.fixture
def documented() -> dict[str, dict[str, Any]]:
    """Topic → the example of its payload in docs/messages.md."""
    return payloads()
