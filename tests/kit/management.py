"""As much of RabbitMQ's management API as tests need, with the standard library."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator


class ManagementError(Exception):
    """The API refused a request; the text has method, path and answer."""


class Management:
    """The management API at *url*, which carries user and password."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = parts.scheme == "https"
        self._address = (parts.hostname or "127.0.0.1", parts.port or 15672)
        self.user = unquote(parts.username or "guest")
        secret = f"{self.user}:{unquote(parts.password or 'guest')}".encode()
        self._headers = {
            "Authorization": "Basic " + base64.b64encode(secret).decode(),
            "Content-Type": "application/json",
        }

    def request(self, method: str, path: str, body: object = None) -> Any:
        """Send one request to `/api/` + *path*; returns the decoded answer or None. Raises ManagementError, OSError."""
        make = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = make(*self._address, timeout=15)
        try:
            connection.request(method, f"/api/{path}", json.dumps(body) if body is not None else "", self._headers)
            response = connection.getresponse()
            text = response.read().decode()
        except http.client.HTTPException as broken:
            raise ManagementError(f"{method} /api/{path}: {broken!r}") from broken
        finally:
            connection.close()
        if response.status >= 400:
            raise ManagementError(f"{method} /api/{path}: {response.status} {text}")
        return json.loads(text) if text else None

    def alive(self) -> bool:
        """Whether the API answers and knows our password."""
        try:
            self.request("GET", "whoami")
        except (OSError, ManagementError):
            return False
        return True

    def empty(self) -> None:
        """Delete every virtual host, and make a new `/`."""
        for vhost in self.request("GET", "vhosts"):
            self.request("DELETE", f"vhosts/{quote(vhost['name'], safe='')}")
        self._make("/", self.user)

    def _make(self, vhost: str, user: str) -> None:
        name = quote(vhost, safe="")
        self.request("PUT", f"vhosts/{name}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.request("PUT", f"permissions/{name}/{quote(user, safe='')}", everything)

    @contextlib.contextmanager
    def new_vhost(self, user: str | None = None) -> Iterator[str]:
        """The name of a new virtual host on which *user* (default: the API's) may do everything."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self._make(name, user or self.user)
        yield name
        # A test may have left its broker dead; then the virtual host goes with the broker's folder.
        with contextlib.suppress(OSError, ManagementError):
            self.request("DELETE", f"vhosts/{name}")
