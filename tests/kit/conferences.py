"""Conferences to import: those that were invented for the tests, and exports of real ones where this machine has them.

Real exports are nobody's to give away, so the tree holds none. `OPEN_EVENT_DATA`, else `../shared/data` beside the checkout,
may hold some; the tests that can use them say so loudly where they are missing, and nothing fails for want of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.kit.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLES = ROOT / "tests" / "data"
REAL_EXPORTS = Path(os.environ.get("OPEN_EVENT_DATA") or ROOT.parent / "shared" / "data")


@dataclass(frozen=True, slots=True)
class Export:
    """The folder of one conference, and how many things of each kind the first import of it makes."""

    folder: Path
    created: Mapping[str, int]
    #: The identifier to import it under, where its own is another conference's.
    own_identifier: str | None = None

    @property
    def arguments(self) -> list[str]:
        """What follows `flask import` on the command line."""
        return [str(self.folder), "--json", *(["--as", self.own_identifier] if self.own_identifier else [])]

    @property
    def messages(self) -> int:
        """How many messages the first import sends: an event with its tracks is one, everything else one each."""
        return sum(count for kind, count in self.created.items() if kind != "tracks")


def _counts(tracks: int, microlocations: int, speakers: int, sessions: int) -> dict[str, int]:
    parts = {"tracks": tracks, "microlocations": microlocations, "speakers": speakers, "sessions": sessions}
    return {"event": 1} | {kind: count for kind, count in parts.items() if count}


#: What is odd about each is told in tests/data/README.md.
LIGHTHOUSE = Export(SAMPLES / "lighthouse_days", _counts(2, 2, 4, 6))
HARBOUR = Export(SAMPLES / "harbour_con", _counts(2, 2, 5, 4))
FERRY = Export(SAMPLES / "ferry_week", _counts(1, 0, 1, 3), own_identifier="ferry-week-2017")
INVENTED = (LIGHTHOUSE, HARBOUR, FERRY)

FOSSASIA = Export(REAL_EXPORTS / "FOSSASIASummit2018", _counts(14, 17, 341, 371))
OPEN_TECH = Export(REAL_EXPORTS / "OpenTechSummit2018", _counts(1, 1, 14, 12))
#: One session is listed twice; three ids are shared by two speakers each, who are all kept.
PYCON = Export(REAL_EXPORTS / "PyCon17", _counts(5, 18, 143, 146))
REAL = (FOSSASIA, OPEN_TECH, PYCON)


def one(export: Export) -> Any:
    """Return *export* as a parameter of a test."""
    return pytest.param(export, id=export.folder.name, marks=_there(export))


def together(name: str, *exports: Export) -> Any:
    """Return *exports* as one parameter of a test."""
    return pytest.param(exports, id=name, marks=_there(*exports))


def _there(*exports: Export) -> pytest.MarkDecorator:
    """Skip where a real export is missing, with the way to have it; an invented one that is missing fails."""
    missing = [export.folder.name for export in exports if export.folder.parent == REAL_EXPORTS and not export.folder.is_dir()]
    advice = "set OPEN_EVENT_DATA to the folder that holds the conferences"
    return pytest.mark.skipif(bool(missing), reason=f"no export of {', '.join(missing)} in {REAL_EXPORTS}: {advice}")
