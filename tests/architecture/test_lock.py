"""The lock file: it asks the public index alone, and locks what the project asks for."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from packaging.requirements import Requirement

from tests.kit.processes import ROOT

LOCK = (ROOT / "uv.lock").read_text(encoding="utf-8")


def test_the_lock_names_the_public_index_and_nobody_elses() -> None:
    hosts = set(re.findall(r'"(\w+:/*[^/"]*)/', LOCK))
    assert hosts == {"https://pypi.org", "https://files.pythonhosted.org"}


def test_what_is_locked_is_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (ours,) = (package for package in tomllib.loads(LOCK)["package"] if package["name"] == project["project"]["name"])

    assert _locked(ours["metadata"]["requires-dist"]) == _asked(
        project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()
    )
    groups = project["dependency-groups"]
    everything = [[entry for entry in groups[name] if isinstance(entry, str)] for name in groups]
    assert _locked([entry for group in ours["metadata"]["requires-dev"].values() for entry in group]) == _asked(*everything)


def _asked(*lists: list[str]) -> set[tuple[str, str]]:
    found = [Requirement(text) for texts in lists for text in texts]
    return {(requirement.name, str(requirement.specifier)) for requirement in found}


def _locked(entries: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(entry["name"], _in_order(entry.get("specifier", ""))) for entry in entries}


def _in_order(specifier: str) -> str:
    return ",".join(sorted(specifier.split(",")))
