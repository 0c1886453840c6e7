"""A client of a running publisher, over HTTP with the standard library."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any


class Api:
    """The API at *url*, as somebody with curl sees it."""

    def __init__(self, url: str) -> None:
        self.url = url

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request; return status and decoded answer, whatever the status."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refusal:
            with refusal:
                return refusal.code, json.loads(refusal.read() or b"null")

    def get(self, path: str) -> Any:
        """The answer to a GET that must succeed."""
        status, answer = self.request("GET", path)
        assert status == 200, answer
        return answer

    def send(self, method: str, path: str, body: Any) -> Any:
        """The answer to a change that must succeed."""
        status, answer = self.request(method, path, body)
        assert status in (200, 201), answer
        return answer

    def all(self, path: str) -> list[Any]:
        """Everything of a collection, page after page."""
        items, following = [], f"{path}?limit=200"
        while following:
            page = self.get(following)
            items += page["items"]
            following = page["next"]
        return items
