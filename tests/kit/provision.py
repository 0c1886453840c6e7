"""Before the tests: see to it that PostgreSQL, RabbitMQ and PgBouncer are there to be started, and `ip` for network faults.

`python -m tests.kit.provision` installs what is missing where that is possible without asking (Debian and its kin, as
root) and starts no daemon; elsewhere it says what to install and leaves the decision to the tests: they skip, or fail in CI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit import netns
from tests.kit.pgbouncer import PgBouncer
from tests.kit.server_process import ServerMissingError
from tests.kit.servers import PostgresServer, RabbitServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: What Debian's packages ask before they start a daemon: exit code 101 means "you may not".
_POLICY = Path("/usr/sbin/policy-rc.d")


def missing(environ: Mapping[str, str]) -> dict[str, str]:
    """Debian package → what to do by hand, for each server that is neither installed nor named in *environ*."""
    wanted = [
        ("postgresql", "TEST_DATABASE_URL", PostgresServer.programs),
        ("rabbitmq-server", "TEST_BROKER_URL", RabbitServer.programs),
        ("pgbouncer", "", PgBouncer.programs),
        ("iproute2", "", netns.programs),
    ]
    lacking: dict[str, str] = {}
    for package, variable, find in wanted:
        if environ.get(variable):
            continue
        try:
            find()
        except ServerMissingError as error:
            lacking[package] = str(error)
    return lacking


@contextmanager
def _no_daemon_starts(policy: Path) -> Iterator[None]:
    if policy.exists():  # somebody's own rule stands
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink()


def install(packages: Sequence[str], policy: Path = _POLICY) -> None:
    """Install Debian *packages* without starting what they bring. Raises CalledProcessError."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-qq", "update"], env=env, check=True)
    with _no_daemon_starts(policy):
        command = ["apt-get", "-qq", "install", "--yes", "--no-install-recommends", *packages]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    lacking = missing(os.environ)
    if not lacking:
        return 0
    if os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"installing for the tests: {' '.join(lacking)}", flush=True)
        install(list(lacking))
        lacking = missing(os.environ)
    for advice in lacking.values():
        print(advice, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
