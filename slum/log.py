"""Structured logs of the programs that the keeper keeps alive: one JSON object a line on stderr.

The event is a stable past-tense snake_case name, all else key-values: ``log.info("agent_connected", machine="here")``.
Values are never secrets. The standard library's loggers (uvicorn, asyncio) end up in the same form. structlog is
imported by ``start`` and ``get``, not by importing this module.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger


def start(program: str, level: int = logging.INFO) -> FilteringBoundLogger:
    """Send this process's logs to stderr as JSON lines and return its logger. Call once, first thing."""
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            _naming(program),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            _render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    root.setLevel(logging.WARNING)
    return get()


def get() -> FilteringBoundLogger:
    """Return the process's logger."""
    import structlog

    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


Fields = MutableMapping[str, Any]


def _naming(program: str) -> Callable[[Any, str, Fields], Fields]:
    def name(_logger: Any, _method: str, fields: Fields) -> Fields:
        fields.setdefault("program", program)
        return fields

    return name


def _render(_logger: Any, _method: str, fields: Fields) -> str:
    return msgspec.json.encode(dict(fields), enc_hook=repr).decode()


class _Forward(logging.Handler):
    """Hands records of the standard library's loggers to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        get().log(
            record.levelno,
            "library_logged",
            logger=record.name,
            message=record.getMessage().strip(),
            exc_info=record.exc_info,
        )
