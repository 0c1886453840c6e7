"""Where the exports of real conferences are: `OPEN_EVENT_DATA`, else `../shared/data` beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

from tests.kit.processes import ROOT

DATA = Path(os.environ.get("OPEN_EVENT_DATA", ROOT.parent / "shared" / "data"))


def real(name: str) -> Path:
    """The folder of a real conference; without it tests on real input prove nothing, so they fail."""
    folder = DATA / name
    assert folder.is_dir(), f"no export of {name} in {DATA}; set OPEN_EVENT_DATA to the folder that holds the conferences"
    return folder
