"""PgBouncer in front of a PostgreSQL: one server connection serves many clients, a transaction at a time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tests.kit.ports import accepts, free_port
from tests.kit.server_process import ServerMissingError, ServerProcess, first_folder_with


class PgBouncer(ServerProcess):
    """A private PgBouncer before the server of *upstream*; in mode `transaction` unless told otherwise."""

    def __init__(self, upstream: str, mode: str = "transaction", pool_size: int = 3) -> None:
        self._bin = self.programs()
        super().__init__("pgbouncer", system_user="postgres")
        self.port = free_port()
        target = urlsplit(upstream)
        login = f"user={unquote(target.username or 'postgres')}"
        if target.password:
            login += f" password={unquote(target.password)}"
        self._configuration = self._write(
            "pgbouncer.ini",
            f"[databases]\n* = host={target.hostname} port={target.port or 5432} {login}\n"
            "[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {mode}\ndefault_pool_size = {pool_size}\nserver_idle_timeout = 10\n",
        )

    @staticmethod
    def programs() -> Path:
        """The folder of pgbouncer. Raises ServerMissingError."""
        path = os.environ.get("PATH", os.defpath).split(os.pathsep)
        found = first_folder_with([*path, "/usr/sbin"], ["pgbouncer"])
        if found is None:
            raise ServerMissingError("no PgBouncer on this machine: install it (Debian: apt-get install pgbouncer)")
        return found

    def start(self) -> None:
        """Start; returns when connections are taken."""
        self._launch([self._bin / "pgbouncer", self._configuration], {"PATH": os.defpath, "LC_ALL": "C.UTF-8"})

    def _answers(self) -> bool:
        return accepts(self.port)

    def through(self, url: str) -> str:
        """The URL of the same database through this pooler."""
        return urlunsplit(urlsplit(url)._replace(netloc=f"postgres@127.0.0.1:{self.port}"))

    def version(self) -> tuple[int, ...]:
        """Its version; from 1.21 on it can follow prepared statements."""
        said = subprocess.run([self._bin / "pgbouncer", "--version"], capture_output=True, text=True, check=True).stdout
        return tuple(int(part) for part in said.split()[1].split("."))

    def kill(self) -> None:
        if self.running:
            self.resume()
        self._end(signal.SIGKILL)
