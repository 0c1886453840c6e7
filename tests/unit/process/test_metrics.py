"""Metrics: prometheus-client's where it is installed, silent ones elsewhere."""

from __future__ import annotations

import re

import pytest

from outbox.process import metrics
from tests.architecture.source import modules
from tests.kit.processes import ROOT


def test_counters_gauges_and_histograms_are_exposed() -> None:
    metrics.counter("outbox_test_metrics_total", "A counter.").inc()
    metrics.gauge("outbox_test_metrics_gauge", "A gauge.").set(7)
    metrics.histogram("outbox_test_metrics_seconds", "A histogram.").observe(0.02)
    rendered = metrics.render()
    assert rendered is not None
    text = rendered[0].decode()
    assert "outbox_test_metrics_total 1.0" in text
    assert "outbox_test_metrics_gauge 7.0" in text
    assert 'outbox_test_metrics_seconds_bucket{le="0.025"} 1.0' in text


def test_without_prometheus_client_they_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_prometheus", None)
    metrics.counter("a_total", "A counter.", ["topic"]).labels("x").inc()
    metrics.gauge("a", "A gauge.").set(7)
    metrics.histogram("a_seconds", "A histogram.").observe(1)
    assert metrics.render() is None


def test_the_documents_name_every_metric_and_no_other() -> None:
    made = re.compile(r'metrics\.(?:counter|gauge|histogram)\(\s*"(\w+)"')
    found = {name for module in modules("outbox") for name in made.findall(module.path.read_text(encoding="utf-8"))}
    rows = re.findall(
        r"^\| (`(?:outbox|consumer)_\w+`[^|]*)", (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == found
