"""How processes speak: one line per event, a stable event name, a sentence for people, fields for machines.

A library never configures logging; only the commands call `configure`.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

_FIELDS = "outbox_fields"
_EVENT = "outbox_event"


def say(logger: logging.Logger, level: int, event: str, sentence: str, **fields: Any) -> None:
    """Log *sentence* under the stable name *event* (`broker.connected`). No payload, no secret may be among *fields*."""
    logger.log(level, "%s", sentence, extra={_EVENT: event, _FIELDS: fields})


class ConsoleFormatter(logging.Formatter):
    """`12:00:01.250 INFO    broker.connected: connected to amqp://… exchange=openevent`. One line, whatever was said."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%H:%M:%S.%f")[:-3]
        event = getattr(record, _EVENT, record.name)
        fields = "".join(f" {name}={value}" for name, value in getattr(record, _FIELDS, {}).items())
        said = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{record.getMessage()}{fields}")
        text = f"{moment} {record.levelname:<7} {event}: {said}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `event`, `message`, `logger`, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, _EVENT, "log"),
            "message": record.getMessage(),
            "logger": record.name,
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(log_format: str, level: int = logging.INFO) -> None:
    """Send everything of *level* and above to standard error, as `console` or `json` lines. For commands only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # pika writes the first 255 bytes of every returned body at WARNING: payload has no business in a log.
    for noisy in ("pika", "amqp", "kombu"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each plugin that it loads
