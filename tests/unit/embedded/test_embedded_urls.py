from __future__ import annotations

from pathlib import Path

import pytest

from outbox.embedded import path_of
from outbox.errors import ConfigurationError


def test_three_slashes_name_a_file_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_of("embedded:///instance/broker.db") == tmp_path / "instance" / "broker.db"


def test_four_slashes_name_an_absolute_path() -> None:
    assert path_of("embedded:////var/lib/app/broker.db") == Path("/var/lib/app/broker.db")


def test_the_name_of_the_file_is_taken_as_it_is() -> None:
    assert path_of("embedded:////a/b c%20;d?e#f.db") == Path("/a/b c%20;d?e#f.db")


@pytest.mark.parametrize(
    "url", ["embedded://", "embedded:///", "embedded:////", "embedded://host/broker.db", "amqp://a:b@c/d", ""]
)
def test_anything_else_is_refused_with_the_shape(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"embedded:///instance/broker\.db"):
        path_of(url)
