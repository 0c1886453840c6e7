"""`python -m benchmarks [publish] [capture] [apply]`: prints a Markdown table, everything measured in this one run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable

from benchmarks import applying, capturing, publishing
from benchmarks.stage import percentile, servers, stage
from tests.kit.servers import PostgresServer, RabbitServer

Report = Callable[[str, str], None]


def publish(postgres: PostgresServer, rabbit: RabbitServer, report: Report) -> None:
    """Relay against a plain publisher."""
    with stage(postgres, rabbit) as place:
        plain = publishing.plain_publisher(place, 3000)
    report("plain pika publisher, one confirm at a time", f"{plain:,.0f} messages/s")
    for title, keys in (("without keys", 0), ("1,000 keys", 1000)):
        with stage(postgres, rabbit) as place:
            rate = publishing.relay(place, 20_000, keys)
        report(f"relay, 20,000 waiting, {title}", f"{rate:,.0f} messages/s, {rate / plain:.1f} × the plain publisher")


def capture(postgres: PostgresServer, rabbit: RabbitServer, report: Report) -> None:
    """A transaction with a message against one without."""
    with stage(postgres, rabbit) as place:
        for threads in (1, 8):
            rates = capturing.transactions(place, threads, rounds=5, seconds=2.0)
            title = f"transactions of one INSERT and one keyed message, {threads} thread{'s' if threads > 1 else ''}"
            ratio, instead = rates.message / rates.plain, rates.row / rates.plain
            report(title, f"{rates.message:,.0f}/s, {ratio:.2f} of those without; with a second INSERT instead: {instead:.2f}")
        report("WAL of one keyed message", f"{capturing.wal_bytes_per_message(place, 2000):,.0f} bytes")


def apply(postgres: PostgresServer, rabbit: RabbitServer, report: Report) -> None:
    """Latency, and a service that catches up."""
    with stage(postgres, rabbit) as place:
        seconds = applying.latency(place, per_second=100, seconds=15)
    report(
        "commit to handler at 100 messages/s",
        f"p50 {percentile(seconds, 50) * 1000:.1f} ms, p99 {percentile(seconds, 99) * 1000:.1f} ms",
    )
    with stage(postgres, rabbit) as place:
        rate = applying.applied(place, 10_000)
    report("a service applies, 10,000 waiting, 500 keys", f"{rate:,.0f} messages/s")


def main(names: list[str]) -> int:
    """Run the named measurements, all by default."""
    known = {"publish": publish, "capture": capture, "apply": apply}
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"no such measurement: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, 1 KiB bodies, quorum queue, PostgreSQL with fsync\n")
    print("| measured | result |\n| --- | --- |", flush=True)
    with servers() as (postgres, rabbit):
        for name in names or known:
            known[name](postgres, rabbit, lambda what, result: print(f"| {what} | {result} |", flush=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
