from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator
from werkzeug.wrappers import Response

from publisher.api import openapi
from tests.integration.publisher.conftest import CONTRACT, EVENT, Api
from tests.integration.publisher.contract import Contract

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_the_document_describes_every_route_and_no_other(sqlite_api: Api) -> None:
    routes = {
        (method.lower(), re.sub(r"<(\w+:)?\w+>", "{}", rule.rule))
        for rule in sqlite_api.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint not in ("static", "docs.home")
    }

    assert {(method, re.sub(r"\{\w+\}", "{}", path)) for method, path in CONTRACT.operations} == routes


def test_every_operation_answers_as_described(sqlite_api: Api) -> None:
    """The journey through all operations; each answer is checked where it is received, and here that none was left out."""
    api = sqlite_api
    CONTRACT.succeeded.clear()
    event, headers = api.post("/v1/events", EVENT)
    message = headers["Link"].partition("<")[2].partition(">")[0]
    parts = f"/v1/events/{event['id']}"
    for path in ("/v1/events", parts, message, "/livez", "/readyz", "/metrics", "/openapi.json", "/docs"):
        assert api.request("GET", path).status_code == 200
    api.change(parts, state="published")
    things = {kind: api.make(f"{parts}/{kind}", name="It")["id"] for kind in ("tracks", "microlocations", "speakers")}
    things["sessions"] = api.make(f"{parts}/sessions", title="It")["id"]
    session = f"/v1/sessions/{things['sessions']}"
    api.put(f"{session}/speakers/{things['speakers']}")
    api.delete(f"{session}/speakers/{things['speakers']}")
    api.move(things["sessions"], "accepted")
    for kind, number in things.items():
        api.get(f"/v1/{kind}/{number}")
        api.change(f"/v1/{kind}/{number}", **({"title": "That"} if kind == "sessions" else {"name": "That"}))
        api.all(f"{parts}/{kind}")
        api.delete(f"/v1/{kind}/{number}")
    api.delete(parts)

    assert CONTRACT.succeeded == CONTRACT.operations


def test_the_document_served_is_the_document_checked(sqlite_api: Api) -> None:
    served = sqlite_api.get("/openapi.json")

    assert Contract(served).operations == CONTRACT.operations
    assert served["components"] == openapi.document("0")["components"]


def test_every_reference_in_the_document_leads_somewhere() -> None:
    document = openapi.document("0")
    for name in set(re.findall(r"'#/components/(\w+/\w+)'", str(document))):
        section, _, key = name.partition("/")
        assert key in document["components"][section], name


def test_every_schema_in_the_document_is_one() -> None:
    for schema in _schemas(openapi.document("0")):
        Draft202012Validator.check_schema(schema)


def _schemas(node: Any) -> Iterator[Any]:
    """Everything that the document calls a schema, alone or by name."""
    if isinstance(node, dict):
        yield from (node["schema"],) if "schema" in node else ()
        yield from node.get("schemas", {}).values()
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _schemas(inner)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"starts_at": "yesterday"}, "is not a 'date-time'"),
        ({"name": 1}, "is not of type 'string'"),
        ({"surprise": 1}, "Additional properties are not allowed"),
    ],
)
def test_an_answer_that_breaks_the_contract_is_noticed(sqlite_api: Api, change: dict[str, Any], problem: str) -> None:
    event = sqlite_api.make("/v1/events", **EVENT)
    answer = Response(json.dumps(event | change), content_type="application/json")

    with pytest.raises(AssertionError, match=problem):
        CONTRACT.check("GET", f"/v1/events/{event['id']}", None, answer)


def test_the_page_shows_every_operation_and_fetches_nothing_from_elsewhere(sqlite_api: Api) -> None:
    answer = sqlite_api.request("GET", "/docs")
    page = answer.get_data(as_text=True)

    for _, path in CONTRACT.operations:
        assert f"<code>{path}</code>" in page
    assert not re.findall(r"<script|<img|style=|\son\w+=", page)
    assert re.findall(r'(?:href|src)="(?!#|/)([^"]*)"', page) == []
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; style-src 'self'")
    with sqlite_api.app.test_client().get("/docs/static/docs.css") as style:  # an open file until it is closed
        assert style.status_code == 200


def test_the_examples_on_the_page_work(sqlite_api: Api) -> None:
    page = sqlite_api.request("GET", "/docs").get_data(as_text=True)
    example = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert example
    bodies = re.findall(r"-d &#39;(.*?)&#39;|-d '(.*?)'", example[1], re.DOTALL)

    assert len(bodies) == 3
    event = sqlite_api.request("POST", "/v1/events", data=bodies[0][1], headers={"Content-Type": "application/json"})
    assert event.status_code == 201


def test_the_root_leads_a_person_to_the_page(sqlite_api: Api) -> None:
    answer = sqlite_api.request("GET", "/")

    assert (answer.status_code, answer.headers["Location"]) == (302, "/docs")
