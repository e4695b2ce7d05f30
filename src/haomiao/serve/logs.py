"""Structured logs: one JSON object a line on stderr. What users wrote never gets in: no prompt, no answer, no key."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

LEVELS = ("debug", "info", "warning", "error")
_log = logging.getLogger("haomiao.serve")


class JsonFormatter(logging.Formatter):
    """A record as one line. Control characters are escaped by JSON, so that no text can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        facts: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage()[:1000],
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            facts["exception"] = self.formatException(record.exc_info)[-4000:]
        return json.dumps(facts, ensure_ascii=True, default=str)


def configure(level: str) -> None:
    """Send this server's log, and the warnings of uvicorn and asyncio, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    _log.handlers[:] = [handler]
    _log.setLevel(level.upper())
    _log.propagate = False
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        other = logging.getLogger(name)
        other.handlers[:] = [handler] if name in ("uvicorn", "asyncio") else []
        other.propagate = name.startswith("uvicorn.")
        other.setLevel(logging.ERROR)


def event(name: str, **facts: Any) -> None:
    """One line at info."""
    _log.info(name, extra={"facts": {key: value for key, value in facts.items() if value is not None}})
