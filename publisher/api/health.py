"""What orchestrators and monitors ask."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from outbox import SchemaError
from outbox.errors import install
from outbox.process import metrics
from publisher import database, migrations
from publisher.api.problems import Problem

views = Blueprint("health", __name__)


@views.get("/livez")
def live() -> Response:
    """Answer: the process turns, whatever its servers do."""
    return jsonify({"ok": True})


@views.get("/readyz")
def ready() -> Response:
    """Say whether the database answers and has this code's tables. The broker is not asked: nothing here waits for it."""
    try:
        migrations.check(database.of(current_app).engine)
    except SchemaError as error:
        raise Problem(503, "unavailable", str(error)) from error
    return jsonify({"ok": True})


@views.get("/metrics")
def measurements() -> Response:
    """Return this process's metrics in Prometheus' text format."""
    rendered = metrics.render()
    if rendered is None:
        raise Problem(501, "no-metrics", install("metrics"))
    text, content_type = rendered
    return Response(text, content_type=content_type)
