"""The headers of trace and correlation, from whatever the process has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from flask import Flask
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from outbox.capture import trace

if TYPE_CHECKING:
    from collections.abc import Mapping

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def headers_in_a_request(headers: Mapping[str, str]) -> dict[str, str]:
    with Flask("app").test_request_context(headers=dict(headers)):
        return trace.headers()


def test_outside_of_everything_there_are_none() -> None:
    assert trace.headers() == {}


def test_a_request_hands_on_its_trace_and_its_id() -> None:
    found = headers_in_a_request({"traceparent": VALID, "X-Request-Id": "abc-1"})
    assert found == {"traceparent": VALID, "correlationid": "abc-1"}


@pytest.mark.parametrize(
    "traceparent",
    ["", "nonsense", VALID.upper(), f"ff{VALID[2:]}", VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
     VALID.replace("00f067aa0ba902b7", "0" * 16), f"{VALID}-more"],
)  # fmt: skip
def test_a_trace_that_is_not_valid_is_left_out(traceparent: str) -> None:
    assert headers_in_a_request({"traceparent": traceparent}) == {}


@pytest.mark.parametrize("request_id", ["a b", "é", "x" * 129])
def test_a_request_id_that_cannot_be_a_header_is_left_out(request_id: str) -> None:
    assert headers_in_a_request({"X-Request-Id": request_id}) == {}


def test_the_current_span_goes_before_the_trace_of_the_request() -> None:
    context = SpanContext(trace_id=0xABC, span_id=0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    with use_span(NonRecordingSpan(context)):
        found = headers_in_a_request({"traceparent": VALID})
    assert found == {"traceparent": f"00-{'abc':0>32}-{'def':0>16}-01"}


def test_nothing_is_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    monkeypatch.delitem(sys.modules, "flask", raising=False)
    assert trace.headers() == {}
    assert "opentelemetry.trace" not in sys.modules
    assert "flask" not in sys.modules


def test_a_correlation_id_that_is_set_goes_before_that_of_the_request() -> None:
    token = trace.correlation_id.set("job-17")
    try:
        assert headers_in_a_request({"X-Request-Id": "abc-1"}) == {"correlationid": "job-17"}
    finally:
        trace.correlation_id.reset(token)
