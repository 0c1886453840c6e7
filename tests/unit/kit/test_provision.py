from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.kit import netns, provision
from tests.kit.pgbouncer import PgBouncer
from tests.kit.server_process import ServerMissingError
from tests.kit.servers import PostgresServer, RabbitServer

if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn


def _absent() -> NoReturn:
    raise ServerMissingError("not on this machine")


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `apt-get` that notes what it was asked and whether daemons might start; the notes' file is returned."""
    notes, program = tmp_path / "notes", tmp_path / "bin" / "apt-get"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$* $([ -x {tmp_path}/policy ] && echo no-daemons)" >> {notes}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return notes


def test_a_server_named_by_its_url_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresServer, "programs", staticmethod(_absent))
    monkeypatch.setattr(RabbitServer, "programs", staticmethod(_absent))
    monkeypatch.setattr(PgBouncer, "programs", staticmethod(lambda: None))
    monkeypatch.setattr(netns, "programs", lambda: None)
    assert provision.missing({}).keys() == {"postgresql", "rabbitmq-server"}
    assert provision.missing({"TEST_DATABASE_URL": "postgresql://"}).keys() == {"rabbitmq-server"}
    assert provision.missing({"TEST_DATABASE_URL": "postgresql://", "TEST_BROKER_URL": "amqp://"}) == {}


def test_what_is_missing_is_installed_while_no_daemon_may_start(apt: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    provision.install(["postgresql", "rabbitmq-server"], policy)
    update, install = apt.read_text().splitlines()
    assert update == "-qq update "
    assert install == "-qq install --yes --no-install-recommends postgresql rabbitmq-server no-daemons"
    assert not policy.exists()


def test_a_rule_of_the_machine_about_daemons_is_left_alone(apt: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    policy.write_text("#!/bin/sh\nexit 0\n")
    provision.install(["postgresql"], policy)
    assert policy.read_text() == "#!/bin/sh\nexit 0\n"


def test_nothing_missing_is_silent(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PgBouncer, "programs", staticmethod(lambda: None))
    monkeypatch.setattr(netns, "programs", lambda: None)
    monkeypatch.setenv("TEST_DATABASE_URL", "postgresql://")
    monkeypatch.setenv("TEST_BROKER_URL", "amqp://")
    assert provision.main() == 0
    assert capfd.readouterr() == ("", "")
