"""Holds answers, and the bodies that were accepted, to what /openapi.json says of them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from werkzeug.test import TestResponse

Json = dict[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_FORMATS = {
    "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
_SAID = {"description", "examples", "default"}


class Contract:
    """One OpenAPI document, and which of its operations were seen to succeed."""

    def __init__(self, document: Json) -> None:
        self.document = document
        self.succeeded: set[tuple[str, str]] = set()

    @property
    def operations(self) -> set[tuple[str, str]]:
        """All (method, path) of the document."""
        return {(method, path) for path, item in self.document["paths"].items() for method in item if method != "parameters"}

    def check(self, method: str, path: str, body: Any, answer: TestResponse) -> None:
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

    def _check_content(self, where: str, described: Json, answer: TestResponse) -> None:
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
        schema = self._resolved(schema)
        kinds = schema.get("type", list(_TYPES))
        allowed = [kind for name in ([kinds] if isinstance(kinds, str) else kinds) for kind in _TYPES[name]]
        assert type(value) in allowed, f"{where}: {value!r} is no {kinds}"
        if value is None:
            return
        for keyword, told in schema.items():
            if keyword not in {"type", "required", *_SAID}:
                getattr(self, f"_check_{keyword}")(where, told, value)
        if missing := set(schema.get("required", ())) - (value.keys() if isinstance(value, dict) else set()):
            raise AssertionError(f"{where}: {sorted(missing)} missing")
        if schema.get("additionalProperties") is False:
            assert value.keys() <= schema["properties"].keys(), f"{where}: {sorted(value.keys() - schema['properties'].keys())}"

    def _check_properties(self, where: str, told: Json, value: Json) -> None:
        for name, inner in value.items():
            if name in told:
                self._check_value(f"{where}/{name}", told[name], inner)

    def _check_additionalProperties(self, where: str, told: bool, value: Json) -> None:  # noqa: N802
        assert told is False, f"{where}: this check knows no schema there"

    def _check_items(self, where: str, told: Json, value: list[Any]) -> None:
        for number, inner in enumerate(value):
            self._check_value(f"{where}/{number}", told, inner)

    def _check_enum(self, where: str, told: list[str], value: str) -> None:
        assert value in told, f"{where}: {value!r}"

    def _check_const(self, where: str, told: Any, value: Any) -> None:
        assert value == told, f"{where}: {value!r}"

    def _check_pattern(self, where: str, told: str, value: str) -> None:
        assert re.search(told, value), f"{where}: {value!r} has not the shape {told}"

    def _check_format(self, where: str, told: str, value: str) -> None:
        assert re.fullmatch(_FORMATS[told], value), f"{where}: {value!r} is no {told}"

    def _check_maxLength(self, where: str, told: int, value: str) -> None:  # noqa: N802
        assert len(value) <= told, f"{where}: {len(value)} characters"

    def _check_minLength(self, where: str, told: int, value: str) -> None:  # noqa: N802
        assert len(value) >= told, f"{where}: {len(value)} characters"

    def _check_minimum(self, where: str, told: float, value: float) -> None:
        assert value >= told, f"{where}: {value}"

    def _check_maximum(self, where: str, told: float, value: float) -> None:
        assert value <= told, f"{where}: {value}"
