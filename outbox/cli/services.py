"""From the name that was typed to the service it means, and to its database."""

from __future__ import annotations

import pkgutil
import re
import sys
import traceback
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from outbox.cli.context import Place
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from sqlalchemy.engine import Engine

    from outbox.cli.context import Context
    from outbox.consumer import Service

_BARE = re.compile(r"[A-Za-z_]\w*")
_SPELLED = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")


def find(name: str) -> Service:
    """Return the service: `exports` means `consumers.exports:service`, `module:attribute` is anybody's.

    The working directory is put on the import path. Raises ConfigurationError, naming what is missing.
    """
    from outbox.consumer import Service

    module_name, attribute = _spelled_out(name)
    module = _import(module_name, name)
    found = getattr(module, attribute, None)
    if isinstance(found, Service):
        found.typed = name
        return found
    others = sorted(key for key, value in vars(module).items() if isinstance(value, Service))
    hint = f"; it has {', '.join(f'{module_name}:{other}' for other in others)}" if others else ""
    what = f"has no {attribute!r}" if found is None else f"has a {attribute!r} that is a {type(found).__name__}, no Service"
    raise ConfigurationError(f"{name}: {module_name} {what}{hint}")


def all_names() -> list[str]:
    """Return the bare names that work here: the modules of the package `consumers` in the working directory."""
    folder = Path.cwd() / "consumers"
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]) if not module.name.startswith("_"))


def _spelled_out(name: str) -> tuple[str, str]:
    if _BARE.fullmatch(name):
        return f"consumers.{name}", "service"
    if match := _SPELLED.fullmatch(name):
        return match[1], match[2]
    raise ConfigurationError(f"{name!r} names no service; write a bare name (exports) or module:attribute (shop.mail:service)")


def _import(module_name: str, typed: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            names = all_names() if module_name.startswith("consumers.") else []
            hint = f"; here are: {', '.join(names)}" if names else f"; looked in {folder} too"
            raise ConfigurationError(f"{typed}: there is no module {module_name}{hint}") from error
        raise ConfigurationError(_broken(module_name, error)) from error
    except ConfigurationError as error:  # ours: it says the place and the fix
        raise ConfigurationError(f"{module_name} can't be imported: {error}") from error
    except Exception as error:
        raise ConfigurationError(_broken(module_name, error)) from error


def _broken(module_name: str, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"{module_name} can't be imported: SyntaxError: {error.msg} ({error.filename}, line {error.lineno})"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}, line {frame.lineno}"
    return f"{module_name} can't be imported: {type(error).__name__}: {error} ({place})"


# --- its database -------------------------------------------------------------------------------------------------------


@contextmanager
def opened(here: Context, service: Service, name: str) -> Iterator[Engine]:
    """The engine of *service*, on tables of the right version; database errors inside name CONSUMER_DATABASE_URL."""
    from outbox.consumer import operating

    where = place(here, service, name)
    where.require_file()
    engine = operating.open_engine(service, here.settings)
    try:
        with where.naming():
            operating.check(service, engine)
            yield engine
    finally:
        engine.dispose()


def place(here: Context, service: Service, name: str) -> Place:
    """Return the database of *service*, which was typed as *name*."""
    from sqlalchemy import make_url

    url = make_url(str(here.settings.consumer_database_url).replace("{service}", service.name))
    return Place("CONSUMER_DATABASE_URL", url, f"outbox consumer migrate {name}", f"outbox consumer status {name}")
