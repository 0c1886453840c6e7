"""Which request or trace a message belongs to: headers stamped at capture, from what the process has loaded anyway."""

from __future__ import annotations

import re
import sys
from contextvars import ContextVar

#: Set it where there is no request, or to follow another id: `outbox.capture.trace.correlation_id.set("job-17")`.
correlation_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)

# W3C Trace Context: version ff and ids of zeros alone are not valid.
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_CORRELATION = re.compile(r"[\x21-\x7e]{1,128}")


def headers() -> dict[str, str]:
    """Return `traceparent` (OpenTelemetry's current span, else the request's) and `correlationid`.

    That is `correlation_id`, else the request's X-Request-Id. What is not valid is left out: it comes from outside.
    """
    found = {}
    given = _request_headers()
    trace = _current_span() or given.get("traceparent", "")
    if _TRACEPARENT.fullmatch(trace):
        found["traceparent"] = trace
    correlation = correlation_id.get() or given.get("X-Request-Id", "")
    if _CORRELATION.fullmatch(correlation):
        found["correlationid"] = correlation
    return found


def _request_headers() -> dict[str, str]:
    flask = sys.modules.get("flask")  # an application without flask has no flask request
    if flask is None or not flask.has_request_context():
        return {}
    return flask.request.headers  # type: ignore[no-any-return]


def _current_span() -> str:
    trace = sys.modules.get("opentelemetry.trace")  # who traces has loaded it
    if trace is None:
        return ""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
