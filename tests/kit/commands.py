"""Run the project's commands inside the test process, each with its own environment."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner, Result

from outbox.cli import group
from tests.kit.processes import environment

if TYPE_CHECKING:
    from collections.abc import Mapping


class Commands:
    """`outbox …` with the settings *env*, and none of the machine's."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = dict(env)

    def __call__(self, *arguments: str, input: str | None = None, env: Mapping[str, str] | None = None) -> Result:
        """Run `outbox` with *arguments*; what is no clear ending (a traceback) is raised."""
        wanted = environment({**self.env, **(env or {})})
        unset = {name: None for name in os.environ if name not in wanted}
        root = logging.getLogger()
        handlers, level, on_sigterm = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)
        try:
            result = CliRunner(env={**unset, **wanted}).invoke(group, arguments, input=input, prog_name="outbox")
        finally:  # relay and services configure logging and SIGTERM for their process
            root.handlers[:] = handlers
            root.setLevel(level)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def fine(self, *arguments: str, input: str | None = None) -> str:
        """Run a command that must succeed; its standard output."""
        result = self(*arguments, input=input)
        assert result.exit_code == 0, result.output
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """Run a command with `--json` that must succeed; its decoded answer."""
        return json.loads(self.fine(*arguments, "--json"))

    def refused(self, *arguments: str, code: int = 1, input: str | None = None) -> str:
        """Run a command that must end with *code*; its standard error."""
        result = self(*arguments, input=input)
        assert result.exit_code == code, result.output
        return result.stderr
