"""`/openapi.json`, and `/docs`: the same as a page, rendered here: nothing is fetched from elsewhere, no script runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Blueprint, current_app, jsonify, make_response, redirect, render_template
from markupsafe import Markup, escape

import outbox
from publisher.api import openapi, problems

if TYPE_CHECKING:
    from flask import Response
    from werkzeug.wrappers import Response as AnyResponse

views = Blueprint("docs", __name__)

_POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


@views.get("/openapi.json")
def description() -> Response:
    """Return the OpenAPI document."""
    return jsonify(openapi.document(outbox.__version__))


@views.get("/docs")
def page() -> Response:
    """Return the OpenAPI document as a page."""
    document = openapi.document(outbox.__version__)
    text = render_template("docs.html", document=document, groups=_groups(document), problems=problems.KINDS)
    response = make_response(text)
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


@views.get("/")
def home() -> AnyResponse:
    """Lead a person who opens the address to the page."""
    return redirect("/docs")


def _groups(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return tag → its operations, each with its method and path, and its schemas resolved."""
    schemas = document["components"]["schemas"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for path, item in document["paths"].items():
        for method in ("get", "post", "patch", "put", "delete"):
            if method in item:
                operation = item[method]
                row = {"method": method.upper(), "path": path, "body": _body(operation, schemas), **operation}
                groups.setdefault(operation["tags"][0], []).append(row)
    return groups


def _body(operation: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any] | None:
    if "requestBody" not in operation:
        return None
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    found: dict[str, Any] = schemas[name]
    return found


@views.app_template_filter("shape")
def shape(schema: dict[str, Any]) -> str:
    """Return in a few words what a schema accepts."""
    kinds = schema.get("type", "")
    words = [kind for kind in (kinds if isinstance(kinds, list) else [kinds]) if kind]
    if "enum" in schema:
        return " | ".join(schema["enum"]) + _default(schema)
    text = " or ".join(schema.get("format", word) if word == "string" else word for word in words)
    if "pattern" in schema:
        text = schema["description"] + (", or null" if "null" in words else "")
    elif "maxLength" in schema:
        text += f", at most {schema['maxLength']:,} characters"
    if "minimum" in schema and schema["maximum"] < current_app.config["MAX_CONTENT_LENGTH"]:
        text += f", {schema['minimum']:g} to {schema['maximum']:g}"
    return text + _default(schema)


def _default(schema: dict[str, Any]) -> str:
    return f"; {schema['default']} where left out" if "default" in schema else ""


@views.app_template_filter("code")
def code(text: str) -> Markup:
    """Return *text* with what stands between backticks as code."""
    parts = (
        escape(part) if number % 2 == 0 else Markup("<code>{}</code>").format(part)
        for number, part in enumerate(text.split("`"))
    )
    return Markup("").join(parts)
