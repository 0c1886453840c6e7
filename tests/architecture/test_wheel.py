"""What the wheel holds: the library alone."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from typing import TYPE_CHECKING

import pytest

from tests.architecture.source import modules
from tests.kit.processes import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {"outbox", "flask_outbox-0.1.0.dist-info"}
    shipped = {name for name in names if name.endswith(".py")}
    assert shipped == {str(module.path.relative_to(ROOT)) for module in modules("outbox")}
    assert "outbox/py.typed" in names


def test_the_wheel_installs_one_script_and_needs_four_libraries(wheel: zipfile.ZipFile) -> None:
    scripts = wheel.read("flask_outbox-0.1.0.dist-info/entry_points.txt").decode()
    assert [line for line in scripts.splitlines() if "=" in line] == ["outbox = outbox.cli:main"]
    metadata = Parser().parsestr(wheel.read("flask_outbox-0.1.0.dist-info/METADATA").decode())
    needed = metadata.get_all("Requires-Dist") or []
    assert sorted(each.split(">")[0] for each in needed if "extra ==" not in each) == [
        "alembic",
        "blinker",
        "flask",
        "sqlalchemy",
    ]
    assert set(metadata.get_all("Provides-Extra") or []) == {"rabbitmq", "postgres", "mysql", "metrics", "otel"}
