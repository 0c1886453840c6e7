"""One private server process: its folder, its user, its log, its end. `tests.kit.servers` has the kinds."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit.guardian import guardian
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_BOOT_SECONDS = 90.0
STOP_SECONDS = 30.0


class ServerMissingError(Exception):
    """The programs of a server are not on this machine; the text says what to install."""


def first_folder_with(candidates: Iterable[str], programs: Sequence[str]) -> Path | None:
    for candidate in candidates:
        folder = Path(candidate)
        if all((folder / program).exists() for program in programs):
            return folder
    return None


class ServerProcess:
    """One server process in a process group of its own, with its folder, its user and its log."""

    last_signal = signal.SIGKILL

    def __init__(self, kind: str, system_user: str) -> None:
        self.kind = kind
        self._account = self._unprivileged(system_user) if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix=f"outbox-{kind}-"))
        guardian().remove(self.folder)
        self.log = self.folder / f"{kind}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._suspended = False
        self._own(self.folder)

    @staticmethod
    def _unprivileged(name: str) -> pwd.struct_passwd:
        for candidate in (name, "nobody"):
            with contextlib.suppress(KeyError):
                return pwd.getpwnam(candidate)
        raise ServerMissingError(f"no user {name!r} and no user 'nobody' to run a private server as: root is refused")

    def _own(self, path: Path) -> None:
        if self._account is not None:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(mode)
        self._own(path)
        return path

    def _spawn(self, command: Sequence[str | Path], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        account = self._account
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )

    def _run(self, command: Sequence[str | Path], env: Mapping[str, str], timeout: float = 60.0) -> str:
        account = self._account
        done = subprocess.run(
            command,
            env=env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def _launch(self, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        assert self._process is None, f"{self.kind} already runs; stop() or kill() it first"
        self._process = self._spawn(command, env, self.log)
        guardian().watch(self._process.pid, self.last_signal)
        eventually(self._is_up, timeout=_BOOT_SECONDS, what=f"{self.kind} to start (log: {self.log})", interval=0.1)

    def _is_up(self) -> bool:
        process = self._process
        if process is not None and process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{self.kind} ended with {process.returncode} while starting:\n{tail}")
        return self._answers()

    def _answers(self) -> bool:
        raise NotImplementedError

    @property
    def running(self) -> bool:
        """Whether the process is there (suspended counts)."""
        return self._process is not None and self._process.poll() is None

    def _end(self, number: signal.Signals, whole_group: bool = False) -> None:
        process, self._process = self._process, None
        self._suspended = False
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if whole_group:
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid, number)
        process.wait(STOP_SECONDS)
        guardian().spare(process.pid)

    def suspend(self) -> None:
        """SIGSTOP: connections stay open, nobody answers."""
        assert self._process is not None, f"{self.kind} does not run"
        os.killpg(self._process.pid, signal.SIGSTOP)
        self._suspended = True

    def resume(self) -> None:
        """SIGCONT after suspend()."""
        assert self._process is not None, f"{self.kind} does not run"
        os.killpg(self._process.pid, signal.SIGCONT)
        self._suspended = False

    def kill(self) -> None:
        """A crash; start() boots again on the same ports and data."""
        raise NotImplementedError

    def discard(self) -> None:
        """End it whatever its state, and remove its data."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
