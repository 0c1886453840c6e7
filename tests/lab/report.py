"""What a run of the lab found, as data and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.lab.faults import FAULTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.judgement import Judgement
    from tests.lab.run import Held, Run


def summary(run: Run, judgement: Judgement, *, seed: int, seconds: float) -> dict[str, Any]:
    """Return everything that is worth keeping of *run*."""
    healthy = sum(count for topic, count in judgement.duplicates.items() if not topic.startswith("trouble."))
    return {
        "seed": seed,
        "seconds": round(seconds),
        "messages": judgement.messages,
        "deliveries": judgement.deliveries,
        "of_replaced_histories": judgement.forgotten,
        "duplicates": healthy,
        "duplicates_of_troubled_topics": sum(judgement.duplicates.values()) - healthy,
        "problems": {kind: {"count": len(found), "some": found[:20]} for kind, found in judgement.problems.items()},
        "ended_by_itself": run.fallen,
        "quiet": _figures(run.quiet),
        "faults": {
            name: _figures(run.held[name]) | {"contained": FAULTS[name].contained} for name in FAULTS if name in run.held
        },
        "clean": not judgement.problems and not run.fallen,
    }


def _figures(held: Held) -> dict[str, Any]:
    return {
        "times": held.times,
        "canaries": len(held.latencies),
        "p50_ms": _quantile(held.latencies, 0.5),
        "p99_ms": _quantile(held.latencies, 0.99),
        "worst_ms": _quantile(held.latencies, 1.0),
        "recovery_seconds": round(max(held.recoveries, default=0.0), 1),
    }


def _quantile(values: Sequence[float], part: float) -> float:
    """Return the *part* quantile in milliseconds; 0 of nothing."""
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))] * 1000, 1) if ordered else 0.0


def table(found: dict[str, Any]) -> str:
    """Return *found* for people."""
    lines = [
        f"seed {found['seed']}, {found['seconds']} s: {found['messages']} messages, {found['deliveries']} deliveries, "
        f"{found['duplicates']} duplicates (and {found['duplicates_of_troubled_topics']} of topics in trouble), "
        f"{found['of_replaced_histories']} of histories that a restored database forgot",
        f"{'':44}{'times':>6}{'p50 ms':>10}{'p99 ms':>10}{'worst ms':>10}{'recovery s':>12}",
        _line("quiet", found["quiet"]),
        *(_line(name.replace("_", " "), figures) for name, figures in found["faults"].items()),
        *(f"{kind.upper()}: {each['count']}: {each['some'][:5]}" for kind, each in found["problems"].items()),
        *(f"ENDED BY ITSELF: {each}" for each in found["ended_by_itself"]),
        "clean" if found["clean"] else "NOT CLEAN",
    ]
    return "\n".join(lines)


def _line(name: str, figures: dict[str, Any]) -> str:
    contained = " *" if figures.get("contained") else ""
    numbers = "".join(f"{figures[key]:>10}" for key in ("p50_ms", "p99_ms", "worst_ms"))
    return f"{name + contained:44}{figures['times']:>6}{numbers}{figures['recovery_seconds']:>12}"
