"""`python -m tests.lab [--seconds N] [--seed S] [--faults a,b]`: run it, print a table, end with 1 if anything is wrong."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.lab.faults import FAULTS
from tests.lab.report import summary, table
from tests.lab.run import Run
from tests.lab.stage import Stage


def main() -> int:
    """Run the lab and return the exit code."""
    arguments = _arguments()
    say = _teller()
    say(f"seed {arguments.seed}, {arguments.seconds:g} s; Ctrl-C ends the faults, not the verdict")
    chance = random.Random(arguments.seed)
    with Stage(chance) as stage, Run(stage, chance, say) as run:
        began = time.monotonic()
        signal.signal(signal.SIGINT, lambda *_: run.stop())
        run.play(arguments.seconds, arguments.faults)
        judgement = run.finish()
        found = summary(run, judgement, seed=arguments.seed, seconds=time.monotonic() - began)
        if arguments.logs:
            stage.keep_logs(arguments.logs)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0 if found["clean"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--faults", type=_names, default=[], help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--logs", type=Path, help="keep what all processes printed in this folder")
    return parser.parse_args()


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in FAULTS]:
        raise argparse.ArgumentTypeError(f"no fault is called {unknown[0]!r}; there are {', '.join(FAULTS)}")
    return names


def _teller() -> Callable[[str], None]:
    began = time.monotonic()
    return lambda text: print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
