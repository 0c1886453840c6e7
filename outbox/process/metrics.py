"""Counters, gauges and histograms: prometheus-client's where it is installed (extra `metrics`), silent ones elsewhere.

No metric carries a message id, a key or a payload as a label, and reading them never asks a database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

try:
    import prometheus_client as _prometheus
except ImportError:  # the extra `metrics` is not installed
    _prometheus = None  # type: ignore[assignment]


class Metric(Protocol):
    """The part of a prometheus-client metric that this project uses."""

    def labels(self, *values: str) -> Metric: ...
    def inc(self, amount: float = 1) -> None: ...
    def set(self, value: float) -> None: ...
    def observe(self, value: float) -> None: ...


class _Silent:
    def labels(self, *values: str) -> _Silent:  # noqa: ARG002
        return self

    def inc(self, amount: float = 1) -> None:
        """Count nothing."""

    def set(self, value: float) -> None:
        """Keep nothing."""

    def observe(self, value: float) -> None:
        """Observe nothing."""


def counter(name: str, text: str, labels: Sequence[str] = ()) -> Metric:
    """Return the counter *name* (which ends in `_total`), with values only going up."""
    return _Silent() if _prometheus is None else _prometheus.Counter(name, text, labels)  # type: ignore[return-value]


def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Metric:
    """Return the gauge *name*."""
    return _Silent() if _prometheus is None else _prometheus.Gauge(name, text, labels)  # type: ignore[return-value]


def histogram(name: str, text: str, labels: Sequence[str] = ()) -> Metric:
    """Return the histogram *name* of seconds, from one millisecond to a few minutes."""
    if _prometheus is None:
        return _Silent()
    buckets = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
    return _prometheus.Histogram(name, text, labels, buckets=buckets)  # type: ignore[return-value]


def render() -> tuple[bytes, str] | None:
    """Return the exposition text and its content type, or None without prometheus-client."""
    if _prometheus is None:
        return None
    return _prometheus.generate_latest(), _prometheus.CONTENT_TYPE_LATEST
