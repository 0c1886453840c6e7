"""Who may import whom: the layout is the architecture, and this keeps it true."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.architecture.source import Module, is_in, modules
from tests.kit.processes import ROOT, environment

#: The modules in which a signal becomes rows.
CAPTURE = ("outbox.capture", "outbox.store.capturing")
RELAY = ("outbox.relay", "outbox.store.relaying", "outbox.store.settling", "outbox.store.leases")
CONSUMER = ("outbox.consumer",)
COMMANDS = ("outbox.cli",)

#: A library has one home.
HOMES = {
    "pika": ("outbox.relay.rabbitmq",),
    "kombu": ("outbox.consumer", "outbox.embedded"),
    "amqp": ("outbox.consumer", "outbox.embedded"),
    "flask": (),
    "click": ("outbox.cli",),
    "alembic": ("outbox.migrations",),
    "prometheus_client": ("outbox.process.metrics",),
    "opentelemetry": ("outbox.capture.trace",),
    "blinker": ("outbox.capture", "outbox.consumer"),
}

#: What applications may hold on to.
PUBLIC = (
    "outbox.consumer",
    "outbox.database",
    "outbox.errors",
    "outbox.process.logs",
    "outbox.process.masking",
    "outbox.message",
    "outbox.process.metrics",
    "outbox.migrations",
    "outbox.settings",
    "outbox.store.operating",
)


def _library() -> tuple[Module, ...]:
    return modules("outbox")


def _offenders(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{module.name} imports {name}"
        for module in _library()
        if module.is_in(*importers)
        for name in sorted(module.imports)
        if is_in(name, *forbidden)
    ]


def test_the_reader_of_imports_sees_lazy_ones_and_not_those_for_types() -> None:
    doctor = next(module for module in _library() if module.name == "outbox.cli.doctor")
    assert "outbox.relay.open_broker" in doctor.imports
    assert "outbox.relay.broker.Broker" not in doctor.imports
    assert len(_library()) > 60


@pytest.mark.parametrize(
    ("importers", "forbidden"),
    [
        (CAPTURE, (*RELAY, *CONSUMER, *HOMES["pika"], "outbox.embedded")),
        (RELAY, (*CAPTURE, *CONSUMER)),
        (CONSUMER, (*CAPTURE, *RELAY)),
    ],
    ids=["capture", "relay", "consumer"],
)
def test_capture_relay_and_consumer_never_import_one_another(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> None:
    assert _offenders(importers, forbidden) == []


def test_nothing_imports_the_relay_but_the_commands() -> None:
    importers = tuple(
        module.name for module in modules("outbox", "publisher", "consumers") if not module.is_in("outbox.relay", *COMMANDS)
    )
    offenders = [
        f"{module.name} imports {name}"
        for module in modules("outbox", "publisher", "consumers")
        if module.name in importers
        for name in module.imports
        if is_in(name, "outbox.relay")
    ]
    assert offenders == []


def test_nothing_imports_the_commands_but_the_extension_that_offers_them() -> None:
    offenders = [
        module.name
        for module in modules("outbox", "publisher", "consumers")
        if not module.is_in(*COMMANDS) and any(is_in(name, *COMMANDS) for name in module.imports)
    ]
    assert offenders == ["outbox.capture.outbox"]


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_alone(library: str) -> None:
    strangers = [
        module.name
        for module in _library()
        if not module.is_in(*HOMES[library]) and any(is_in(name, library) for name in module.imports)
    ]
    assert strangers == []


def test_the_applications_use_public_names_and_never_each_other() -> None:
    for module in modules("publisher", "consumers"):
        for name in module.imports:
            if is_in(name, "outbox") and name not in ("outbox", "outbox.store", "outbox.process"):
                is_top_level = name.count(".") == 1 and not name.split(".")[1].islower()
                assert is_top_level or is_in(name, *PUBLIC), f"{module.name} imports {name}"
        other = "consumers" if module.is_in("publisher") else "publisher"
        assert not [name for name in module.imports if is_in(name, other)], module.name
    services = {module.name.split(".")[1] for module in modules("consumers") if "." in module.name}
    for module in modules("consumers"):
        own = module.name.split(".")[1] if "." in module.name else ""
        others = [f"consumers.{service}" for service in services - {own}]
        assert not [name for name in module.imports if is_in(name, *others)], module.name


# --- what an import does -----------------------------------------------------------------------------------------------


def _loaded(program: str) -> set[str]:
    """The top-level modules that a new interpreter has loaded after *program*."""
    program += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("program", "absent"),
    [
        ("import outbox", {"pika", "kombu", "amqp", "flask", "sqlalchemy", "alembic", "click"}),
        ("from outbox import Outbox", {"pika", "kombu", "amqp", "alembic"}),
        ("from publisher import create_app; create_app()", {"pika", "kombu", "amqp"}),
        ("import outbox.consumer; outbox.consumer.Service('x')", {"flask", "pika", "werkzeug"}),
        ("import outbox.consumer.runtime", {"flask", "pika", "werkzeug"}),
        ("import outbox.relay.daemon", {"flask", "kombu", "werkzeug"}),
        ("import outbox.cli", {"flask", "pika", "kombu", "amqp", "sqlalchemy", "alembic"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(program: str, absent: set[str], tmp_path: object) -> None:
    settings = (
        f"import os; os.environ.update(DATABASE_URL='sqlite:///{tmp_path}/x.db', BROKER_URL='embedded:///{tmp_path}/b.db')\n"
    )
    assert _loaded(settings + program) & absent == set()


_WATCH = """
import os, sys
roots = {roots!r}
standard = ("os.py", "<frozen os>", "_collections_abc.py", "<frozen _collections_abc>")
doings = []
watching = True

def hook(event, arguments):
    if watching and (event.startswith("socket.") or event in ("sqlite3.connect", "subprocess.Popen", "os.mkdir", "os.fork")):
        doings.append(f"{{event}} {{arguments!r}}")

class Watched(type(os.environ)):
    def _seen(self, name):
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.endswith(standard):
            frame = frame.f_back
        if watching and frame is not None and frame.f_code.co_filename.startswith(roots):
            doings.append(f"{{frame.f_code.co_filename}} reads {{name}}")

    def __getitem__(self, name):
        self._seen(name)
        return super().__getitem__(name)

    def __iter__(self):
        self._seen("*")
        return super().__iter__()

os.environ.__class__ = Watched
sys.addaudithook(hook)
import importlib
for name in {names!r}:
    importlib.import_module(name)
watching = False
print("\\n".join(doings))
"""


def test_importing_any_module_reads_no_environment_and_touches_nothing() -> None:
    packages = ("outbox", "publisher", "consumers")
    names = [module.name for module in modules(*packages) if not module.name.endswith("__main__")]
    program = _WATCH.format(roots=tuple(f"{ROOT}/{package}/" for package in packages), names=names)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_the_watch_sees_what_it_looks_for(tmp_path: object) -> None:
    program = _WATCH.format(roots=("/",), names=["json"]).replace(
        "importlib.import_module(name)",
        "os.environ.get('HOME'); os.getenv('X'); __import__('socket').socket(); __import__('sqlite3').connect(':memory:')",
    )
    # `-c` has no file name of its own, so the program is given one.
    program = f"exec(compile({program!r}, '/program.py', 'exec'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    for expected in ("/program.py reads HOME", "/program.py reads X", "socket.__new__", "sqlite3.connect"):
        assert expected in done.stdout
