"""The story of 2017, told again: `python -m publisher.demo` (or `make demo`).

Starts the public commands on embedded SQLite in `instance/`, a process each, and breaks things on purpose. Every number it
prints comes from the `--json` of a public command or from the API; a number that is not as promised ends it with exit code 1.
Afterwards API and status stay up until Ctrl-C, unless `DEMO=brief`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller

CHECKOUT = Path(__file__).resolve().parent.parent
INSTANCE = CHECKOUT / "instance"
#: Marks an `instance/` that an earlier demo made, and that the next one may throw away.
MARK = INSTANCE / ".made-by-the-demo"
BIN = Path(sys.executable).parent
CONFERENCE = CHECKOUT / "publisher" / "demo_conference"
WAIT_SECONDS = 30.0
_SETTINGS = ("DATABASE_URL", "BROKER_URL", "CONSUMER_DATABASE_URL", "BROKER_MANAGEMENT_URL")


class WrongCount(Exception):
    """A number is not what the promise says."""


class MailCatcher:
    """A mail server that keeps to whom letters were sent, and refuses the addresses it is told to."""

    def __init__(self) -> None:
        self.recipients: list[str] = []
        self.refused: set[str] = set()
        self.port = free_port()
        self._controller = Controller(self, hostname="127.0.0.1", port=self.port)

    def start(self) -> None:
        self._controller.start()

    def stop(self) -> None:
        self._controller.stop()

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:  # noqa: N802
        if address in self.refused:
            return "452 mailbox full"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        self.recipients += envelope.rcpt_tos
        return "250 OK"


class Demo:
    """The processes of the application in the box, and the questions the story asks them."""

    def __init__(self) -> None:
        self.mail = MailCatcher()
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        ours = ("OUTBOX_", "CONSUMER_")
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in _SETTINGS}
        self.environ["NOTIFICATIONS_SMTP_URL"] = f"smtp://127.0.0.1:{self.mail.port}"

    # --- processes ----------------------------------------------------------------------------------------------------

    def start(self, name: str, *command: str, **environ: str) -> None:
        """Start a public command in the background; what it says goes to `instance/logs/`."""
        with (INSTANCE / "logs" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], cwd=CHECKOUT, env={**self.environ, **environ}, stdout=log, stderr=log
            )

    def start_relay(self, **environ: str) -> None:
        # Short leases, so that nobody has to watch a dead relay's shards run out.
        self.start("relay", "outbox", "relay", OUTBOX_LEASE="3s", OUTBOX_CONFIRM_TIMEOUT="2s", **environ)

    def stop(self, name: str) -> None:
        """Stop a process in order; it must end by itself and say that all is well."""
        process = self.processes.pop(name)
        process.terminate()
        expect(f"exit code of {name} after SIGTERM", process.wait(WAIT_SECONDS), 0, quiet=True)

    def run(self, *command: str) -> str:
        """Run a public command and return what it prints."""
        result = subprocess.run(
            [str(BIN / command[0]), *command[1:]], cwd=CHECKOUT, env=self.environ, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise WrongCount(f"{' '.join(command)} ended with {result.returncode}: {result.stderr.strip()}")
        return result.stdout

    def ask(self, *command: str) -> Any:
        """Run a public command and return the JSON that it prints."""
        return json.loads(self.run(*command, "--json"))

    def status(self) -> dict[str, Any]:
        return self.ask("outbox", "status")  # type: ignore[no-any-return]

    def service(self, name: str) -> dict[str, Any]:
        return self.ask("outbox", "consumer", "status", name)  # type: ignore[no-any-return]

    def until_quiet(self) -> None:
        """Wait until nothing is pending and the exports service has everything that was published."""
        until("nothing is pending", lambda: self.status()["pending"] == 0)

    # --- the API ------------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Call the API; return status and decoded answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:  # noqa: S310
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def sessions(self) -> list[dict[str, Any]]:
        return self.call("GET", "/v1/events/1/sessions?limit=200")[1]["items"]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Prepare `instance/`, start everything, and end everything."""
        prepare_folder()
        subprocess.run(
            [str(BIN / "flask"), "--app", "publisher", "migrate"],
            cwd=CHECKOUT,
            env=self.environ,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self.mail.start()
        try:
            self.start("api", "flask", "--app", "publisher", "run", "--port", str(self.port))
            self.start("exports", "outbox", "consumer", "run", "exports")
            self.start("notifications", "outbox", "consumer", "run", "notifications")
            self.start_relay()
            until("the API answers", self._api_answers)
            until("both services run", lambda: all(self.service(n)["running"] for n in ("exports", "notifications")))
            yield
        finally:
            for process in self.processes.values():
                process.terminate()
            for process in self.processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(WAIT_SECONDS)
                process.kill()
            self.mail.stop()

    def _api_answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.call("GET", "/readyz")[0] == 200
        return False


# --- the chapters -----------------------------------------------------------------------------------------------------


def a_commit_is_heard(demo: Demo) -> None:
    """Import a conference: every signal of the transaction arrives, once."""
    report = demo.ask("flask", "--app", "publisher", "import", str(CONFERENCE))
    sent = len(demo.ask("outbox", "list", "--limit", "1000"))
    say(f"imported {report['name']!r}: {len(demo.sessions())} sessions; their signals were sent before the commit, as in 2017")
    demo.until_quiet()
    expect("messages published", demo.status()["published_total"], sent)
    until("the exports service applied them", lambda: demo.service("exports")["applied_total"] == sent)
    expect("messages applied by exports", demo.service("exports")["applied_total"], sent)
    calendar = INSTANCE / "exports" / "event-1" / "schedule.ics"
    scheduled = [s for s in demo.sessions() if s["state"] in ("accepted", "confirmed") and s["starts_at"]]
    until("the calendar is written", lambda: entries(calendar) == len(scheduled))
    expect("accepted sessions in the calendar", entries(calendar), len(scheduled))


def a_rollback_is_not(demo: Demo) -> None:
    """The bug of 2017: a signal before a commit that then fails."""
    from flask import current_app

    from publisher import create_app, database
    from publisher.signals import sessions_modified

    before = demo.service("exports")["applied_total"]
    written = len(demo.ask("outbox", "list", "--limit", "1000"))
    with create_app({"DATABASE_URL": f"sqlite:///{INSTANCE / 'openevent.db'}"}).app_context():
        session = database.session()
        session.begin()
        sessions_modified.send(current_app._get_current_object(), event_id=1, session_id=1, change="updated", session={})  # type: ignore[attr-defined]
        session.rollback()
        session.close()
    say("sent a signal, then rolled back: in 2017 the task was queued already")
    expect("messages in the outbox, as before", len(demo.ask("outbox", "list", "--limit", "1000")), written)
    expect("messages applied by exports, as before", demo.service("exports")["applied_total"], before)


def the_broker_may_be_away(demo: Demo) -> None:
    """Nobody can use the broker for a while; the API does not notice."""
    applied = demo.service("exports")["applied_total"]
    session = demo.sessions()[0]["id"]
    usual = timed(lambda: demo.call("PATCH", f"/v1/sessions/{session}", {"comments": "on"}))
    demo.until_quiet()
    with broker_away():
        answers, taken = [], []
        for number in range(20):
            began = time.monotonic()
            answers.append(demo.call("PATCH", f"/v1/sessions/{session}", {"comments": f"change {number}"})[0])
            taken.append(time.monotonic() - began)
        say(f"the broker is away; 20 changes over HTTP all the same, {max(taken) * 1000:.0f} ms the slowest")
        say(f"({usual * 1000:.0f} ms took one before)")
        expect("answers 200", answers.count(200), 20)
        expect("messages waiting in the outbox", demo.status()["pending"], 20)
    demo.until_quiet()
    until("exports has them", lambda: demo.service("exports")["applied_total"] == applied + 21)
    expect("applied after its return, one before and 20", demo.service("exports")["applied_total"] - applied, 21)


def the_relay_may_die(demo: Demo) -> None:
    """SIGKILL between the broker's confirm and the relay's note of it: the one moment that makes a duplicate."""
    demo.stop("relay")
    before = demo.service("exports")
    session = demo.sessions()[0]["id"]
    for number in range(5):
        demo.call("PATCH", f"/v1/sessions/{session}", {"comments": f"before the crash {number}"})
    demo.start_relay(OUTBOX_FAILPOINTS="R3=kill")
    expect("the relay is killed (exit code)", demo.processes.pop("relay").wait(WAIT_SECONDS), -signal.SIGKILL)
    until("the confirmed message is applied", lambda: demo.service("exports")["applied_total"] > before["applied_total"])
    expect("still pending: it could not be noted as sent", demo.status()["pending"], 5)
    demo.start_relay()
    demo.until_quiet()
    until("exports saw the duplicate", lambda: demo.service("exports")["duplicates_total"] > before["duplicates_total"])
    after = demo.service("exports")
    expect("delivered twice", after["duplicates_total"] - before["duplicates_total"], 1)
    expect("applied, once each", after["applied_total"] - before["applied_total"], 5)


def poison_is_set_aside(demo: Demo) -> None:
    """A message that can't be applied waits for a person, later ones of its key behind it; everybody else goes on."""
    from publisher import create_app, database
    from publisher.signals import session_state_changed

    session = next(s for s in demo.sessions() if s["state"] == "pending" and len(s["speaker_ids"]) > 1)
    speakers = {s["id"]: s["email"] for s in demo.call("GET", "/v1/events/1/speakers?limit=200")[1]["items"]}
    full, *others = [speakers[id] for id in session["speaker_ids"]]
    demo.mail.recipients.clear()
    demo.mail.refused = {full}
    app = create_app({"DATABASE_URL": f"sqlite:///{INSTANCE / 'openevent.db'}"})
    with app.app_context(), database.session() as db, db.begin():  # what a careless release would do
        session_state_changed.send(app, event_id=1, session_id=session["id"])
    demo.call("POST", f"/v1/sessions/{session['id']}/state", {"state": "accepted"})
    say("sent a message without half of its fields, then accepted a session")
    until("both are set aside", lambda: demo.service("notifications")["parked"] == 2)
    expect("parked: the broken one, and the next of its key behind it", demo.service("notifications")["parked"], 2)
    expect("letters sent so far", len(demo.mail.recipients), 0)
    expect("parked by exports, which has nothing to do with it", demo.service("exports")["parked"], 0)
    waiting = demo.ask("outbox", "consumer", "parked", "list", "notifications")
    why = ("--reason", "half of its fields are missing", "--yes")
    demo.run("outbox", "consumer", "parked", "discard", "notifications", waiting[0]["id"], *why)
    say("discarded the broken one, the other follows by itself")
    until("nothing is parked", lambda: demo.service("notifications")["parked"] == 0)
    until("the letters are out", lambda: len(demo.mail.recipients) >= len(others))
    say(f"the mail server has no room for {full}: that letter waits, alone")
    expect("letters to the others", demo.mail.recipients, others)


CHAPTERS: tuple[tuple[str, Callable[[Demo], None]], ...] = (
    ("1  What commits is heard", a_commit_is_heard),
    ("2  What rolls back is not", a_rollback_is_not),
    ("3  The broker may be away", the_broker_may_be_away),
    ("4  The relay may die at the worst moment", the_relay_may_die),
    ("5  Poison is set aside", poison_is_set_aside),
)


def main() -> int:
    """Tell the story; return 0, or 1 when a count is wrong."""
    for end in (signal.SIGTERM, signal.SIGHUP):  # whatever ends the demo ends what it started
        signal.signal(end, signal.default_int_handler)
    demo = Demo()
    began = time.monotonic()
    try:
        with alone(), demo.running():
            for title, chapter in CHAPTERS:
                print(f"\n{title}")
                chapter(demo)
            print(f"\nAll counts are as promised ({time.monotonic() - began:.0f} s).", flush=True)
            if os.environ.get("DEMO") != "brief":
                stay(demo)
    except WrongCount as error:
        print(f"  ✗ {error}\n    logs: {INSTANCE / 'logs'}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def stay(demo: Demo) -> None:
    """Keep everything up, showing the operator's view, until Ctrl-C."""
    print(f"""
  API     http://127.0.0.1:{demo.port}/docs
  files   {INSTANCE / "exports" / "event-1"}
  look    .venv/bin/outbox status · list · consumer status exports

Ctrl-C ends it.
""")
    subprocess.run([str(BIN / "outbox"), "status", "--watch"], cwd=CHECKOUT, env=demo.environ, check=False)


# --- small things -----------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print a sentence of the story."""
    print(f"  {text}", flush=True)


def expect(what: str, found: object, promised: object, *, quiet: bool = False) -> None:
    """Compare a number with the promise; raise WrongCount if it differs."""
    if found != promised:
        raise WrongCount(f"{what}: {found}, promised was {promised}")
    if not quiet:
        print(f"  ✓ {what}: {found}", flush=True)


def until(what: str, holds: Callable[[], bool]) -> None:
    """Wait until *holds* does, at most WAIT_SECONDS; raise WrongCount naming *what* otherwise."""
    deadline = time.monotonic() + WAIT_SECONDS
    pause = threading.Event()
    while not holds():
        if time.monotonic() > deadline:
            raise WrongCount(f"waited {WAIT_SECONDS:.0f} s in vain until {what}")
        pause.wait(0.3)  # each look starts a process: looking all the time would slow down what is waited for


def timed(call: Callable[[], object]) -> float:
    """Return how many seconds *call* took."""
    began = time.monotonic()
    call()
    return time.monotonic() - began


def entries(calendar: Path) -> int:
    """Return the number of events in an iCalendar file; 0 while there is none."""
    return calendar.read_text(encoding="utf-8").count("BEGIN:VEVENT") if calendar.exists() else 0


@contextlib.contextmanager
def broker_away() -> Iterator[None]:
    """Lock everybody out of the embedded broker, as a server that is down would."""
    connection = sqlite3.connect(INSTANCE / "broker.db", isolation_level=None, timeout=WAIT_SECONDS)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other demos out of this checkout: they would delete `instance/` under us. The kernel frees the lock."""
    folder = os.open(CHECKOUT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = MARK.read_text() if MARK.exists() else ""
            by_hand = f", or: kill {other}" if other else ""
            raise SystemExit(f"another demo works in {INSTANCE}; end it with Ctrl-C where it runs{by_hand}") from None
        yield
    finally:
        os.close(folder)


def prepare_folder() -> None:
    """Begin with an empty `instance/`: one that an earlier demo made is deleted, with all that came into it since; no other."""
    if INSTANCE.exists() and any(INSTANCE.iterdir()):
        if not MARK.exists():
            raise SystemExit(f"{INSTANCE} holds data that the demo did not make; move it away and try again")
        shutil.rmtree(INSTANCE)
    (INSTANCE / "logs").mkdir(parents=True, exist_ok=True)
    MARK.write_text(str(os.getpid()))


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    raise SystemExit(main())
