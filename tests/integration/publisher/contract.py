"""Holds answers, and the bodies that were accepted, to what /openapi.json says of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator, FormatChecker

if TYPE_CHECKING:
    from werkzeug.wrappers import Response

Json = dict[str, Any]

FORMATS = FormatChecker(formats=("uuid",))


@FORMATS.checks("date-time")
def _is_moment(value: object) -> bool:
    """RFC 3339; the library's own check of it needs another library."""
    return not isinstance(value, str) or bool(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", value))


class Contract:
    """One OpenAPI document, and which of its operations were seen to succeed."""

    def __init__(self, document: Json) -> None:
        self.document = document
        self.succeeded: set[tuple[str, str]] = set()

    @property
    def operations(self) -> set[tuple[str, str]]:
        """All (method, path) of the document."""
        return {(method, path) for path, item in self.document["paths"].items() for method in item if method != "parameters"}

    def check(self, method: str, path: str, body: Any, answer: Response) -> None:
        """Raise AssertionError where *answer* is not one that the document describes."""
        template = self._template(path)
        operation = self.document["paths"].get(template, {}).get(method.lower()) if template else None
        if operation is None:
            assert answer.status_code in (302, 404, 405), f"{method} {path} is not described, and answers {answer.status_code}"
            return
        responses = operation["responses"]
        described = responses.get(str(answer.status_code))
        if described is None:
            assert answer.status_code >= 400, f"{method} {template} answers {answer.status_code}, which is not described"
            described = self._resolved(responses["default"])
        self._check_content(f"{method} {template} {answer.status_code}", described, answer)
        for name in described.get("headers", {}):
            assert name in answer.headers or name == "Link", f"{method} {template}: no header {name}"
        if answer.status_code < 400:
            self.succeeded.add((method.lower(), str(template)))
            if "requestBody" in operation and body is not None:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                self._check_value(f"{method} {template}, its body", schema, json.loads(json.dumps(body)))

    def _template(self, path: str) -> str | None:
        path = path.partition("?")[0]
        exact = [template for template in self.document["paths"] if template == path]
        for template in exact or self.document["paths"]:
            if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path):
                return str(template)
        return None

    def _check_content(self, where: str, described: Json, answer: Response) -> None:
        content = described.get("content")
        if content is None:
            assert answer.data == b"", f"{where}: no body is described"
            return
        assert answer.mimetype in content, f"{where}: {answer.mimetype} is not described"
        if str(answer.mimetype).endswith("json"):
            self._check_value(where, content[str(answer.mimetype)]["schema"], answer.get_json(force=True))

    def _resolved(self, schema: Json) -> Json:
        if "$ref" not in schema:
            return schema
        found = self.document
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        return found

    def _check_value(self, where: str, schema: Json, value: Any) -> None:
        # OpenAPI 3.1 speaks JSON Schema 2020-12; references lead into the components.
        validator = Draft202012Validator(schema | {"components": self.document["components"]}, format_checker=FORMATS)
        problems = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(value)]
        assert not problems, f"{where}: {problems}"
