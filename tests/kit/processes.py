"""Run the project's own commands as child processes, watch what they print, and make them stop, hang or die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kit.guardian import guardian
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Self

#: The checkout: where `publisher` and `consumers` can be imported.
ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = re.compile(r"(OUTBOX_|CONSUMER_|FLASK_|(DATABASE|BROKER|BROKER_MANAGEMENT)_URL$)")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without any setting of the project, plus *extra*."""
    inherited = {name: value for name, value in os.environ.items() if not _SETTINGS.match(name)}
    return inherited | {"PYTHONUNBUFFERED": "1"} | dict(extra or {})


def _resolved(command: Sequence[str | Path]) -> list[str]:
    """The command with its program taken from the environment pytest runs in, where it has one of that name."""
    program, *arguments = map(str, command)
    beside = Path(sys.executable).parent / program
    if program == "python":
        program = sys.executable
    elif beside.exists():
        program = str(beside)
    return [program, *arguments]


def run(
    *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 60.0, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run *command* to its end; its exit code is in the answer, not an exception. *env* as for `environment`."""
    return subprocess.run(
        _resolved(command), env=environment(env), cwd=cwd, input=stdin, capture_output=True, text=True, timeout=timeout
    )


class Process:
    """A started child in a process group of its own, printing into *log*. A context manager: dead at the end."""

    def __init__(self, *command: str | Path, log: Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
        self.command = " ".join(map(str, command))
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                _resolved(command),
                env=environment(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        guardian().watch(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<Process {self.pid} {self.command!r}, exit code {self.exit_code}>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.poll()

    @property
    def stopped(self) -> bool:
        """Whether it hangs by a SIGSTOP, its own or another's."""
        status = subprocess.run(["ps", "-o", "stat=", "-p", str(self.pid)], capture_output=True, text=True).stdout
        return status.strip().startswith("T")

    @property
    def output(self) -> str:
        """Everything it has printed so far, both streams."""
        return self.log.read_text(errors="replace")

    def wait_for_line(self, pattern: str, timeout: float = 30.0) -> re.Match[str]:
        """The first match of the regular expression *pattern* within one printed line, now or later."""
        expression = re.compile(pattern, re.MULTILINE)

        def found() -> re.Match[str] | None:
            # Asked first: what it printed before it ended is in the log by the time its end is seen.
            ended = self.exit_code is not None
            match = expression.search(self.output)
            if match is None and ended:
                raise RuntimeError(f"{self!r} ended before it printed {pattern!r}:\n{self._tail()}")
            return match

        try:
            match = eventually(found, timeout, f"{self.command!r} to print {pattern!r}")
        except AssertionError as late:
            raise AssertionError(f"{late}; so far:\n{self._tail()}") from None
        assert match is not None
        return match

    def wait_for_http(self, url: str, status: int = 200, timeout: float = 30.0) -> str:
        """The body of the first answer with *status* to GET *url*."""

        def answered() -> tuple[str] | None:
            if self.exit_code is not None:
                raise RuntimeError(f"{self!r} ended before {url} answered:\n{self._tail()}")
            body = _get(url, status)
            return None if body is None else (body,)

        answer = eventually(answered, timeout, f"{url} to answer {status}")
        assert answer is not None
        return answer[0]

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code, once it has ended by itself; AssertionError with its last lines when it does not in time."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self!r} still runs after {timeout:g} s:\n{self._tail()}") from None
        guardian().spare(self.pid)
        return code

    def terminate(self) -> None:
        """SIGTERM to the process itself, who is to see to its children; returns at once."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to it and its children; returns when it is dead. Harmless when it has ended."""
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        guardian().spare(self.pid)

    def stop(self) -> None:
        """SIGSTOP to it and its children: they hang until cont()."""
        self._signal_group(signal.SIGSTOP)

    def cont(self) -> None:
        """SIGCONT after stop()."""
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, number: signal.Signals) -> None:
        # Once it was waited for, its number may be another's; its children may still be there only before that.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _tail(self) -> str:
        return "\n".join(self.output.splitlines()[-40:])


def _get(url: str, status: int) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            code, body = response.status, response.read()
    except urllib.error.HTTPError as refusal:
        code, body = refusal.code, refusal.read()
    except OSError:
        return None
    return body.decode(errors="replace") if code == status else None
