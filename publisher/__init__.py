"""The Open Event API: conferences over HTTP, with the signals of 2017. `create_app()` makes the application."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click
from flask import Flask
from flask.json.provider import DefaultJSONProvider

from outbox.database import create_engine
from outbox.settings import load
from publisher import api, commands, database, migrations
from publisher.topics import outbox

if TYPE_CHECKING:
    from flask import Response

    from outbox.settings import Settings

#: Where pyproject.toml says what runs without any setting.
CHECKOUT = Path(__file__).resolve().parent.parent
#: What `[tool.outbox]` gives: setting → its name in Settings.
_BOX = {
    "DATABASE_URL": "database_url",
    "BROKER_URL": "broker_url",
    "CONSUMER_DATABASE_URL": "consumer_database_url",
    "OUTBOX_EXCHANGE": "exchange",
    "OUTBOX_SOURCE": "source",
}


def create_app(config: Mapping[str, Any] = MappingProxyType({})) -> Flask:
    """Return the application; *config* goes before the environment, and that before `[tool.outbox]`.

    It connects to nothing, so that it starts before its servers are up; in embedded mode it makes folders and tables.
    Raises ConfigurationError; under the `flask` command its text alone is shown.
    """
    under_a_command = click.get_current_context(silent=True) is not None
    with commands.told() if under_a_command else nullcontext():
        return _create(config)


def _create(config: Mapping[str, Any]) -> Flask:
    app = Flask("publisher", static_url_path="/docs/static")
    app.config.from_mapping(config)
    app.json = Json(app)
    settings = load(config=app.config, environ=os.environ, folder=CHECKOUT)
    settings.require("DATABASE_URL", "BROKER_URL")
    # The extension reads the configuration and the environment, not pyproject.toml.
    box = {name: attribute for name, attribute in _BOX.items() if settings.origins.get(name) == "pyproject.toml"}
    app.config.update({name: getattr(settings, attribute) for name, attribute in box.items()})
    engine = create_engine(str(settings.database_url))
    database.init_app(app, engine)
    outbox.init_app(app, session=database.session, engine=engine)
    api.init_app(app)
    app.after_request(_harden)
    for command in (commands.migrate, commands.import_):
        app.cli.add_command(command)
    if _is_embedded(settings):
        migrations.upgrade(engine)
        engine.dispose()  # a server that forks after this must not share a connection among its children
    return app


class Json(DefaultJSONProvider):
    """JSON in the order of our fields, with letters as they are."""

    sort_keys = False
    ensure_ascii = False


def _is_embedded(settings: Settings) -> bool:
    return str(settings.broker_url).startswith("embedded:")


def _harden(response: Response) -> Response:
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-cache")
    return response
