"""Text for people: tables, times, sizes, and what instances, status, events and explanations look like.

Pure: values in, lines out; the clock and the colours come as arguments, so that the same data gives the same text. Colours
are asked of a Paint by style name and change no widths. Whatever a service wrote itself (log lines, details) passes
through clean(), so that it cannot steer the reader's terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, tzinfo
from typing import Protocol

from slum.wire import Exit, Phase


class Paint(Protocol):
    """Returns *text* in *style* ("good", "bad", "warn", "dim", "strong"; "" is none), or unchanged."""

    def __call__(self, text: str, style: str) -> str: ...


def plain(text: str, style: str) -> str:
    """The Paint of pipes: no colour."""
    return text


class Cell(str):
    """A table cell with a style."""

    __slots__ = ("style",)
    style: str

    def __new__(cls, text: str, style: str = "") -> Cell:
        made = super().__new__(cls, text)
        made.style = style
        return made


PHASE_STYLE: dict[str, str] = {
    Phase.HEALTHY: "good",
    Phase.RUNNING: "good",
    Phase.EXITED: "dim",
    Phase.STOPPED: "dim",
    Phase.PENDING: "warn",
    Phase.STARTING: "warn",
    Phase.STOPPING: "warn",
    Phase.DEGRADED: "warn",
    Phase.BACKOFF: "bad",
    Phase.UNHEALTHY: "bad",
    Phase.FAILED: "bad",
}

_SGR = re.compile(r"\x1b\[[0-9;]*m")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")


def clean(text: str, *, keep_color: bool = False) -> str:
    """Return *text* without control characters but tabs; colours (SGR sequences alone) stay when *keep_color*."""
    if keep_color:
        parts = _SGR.split(text)
        marks = [*_SGR.findall(text), ""]
        kept = "".join(_CONTROL.sub("", part) + mark for part, mark in zip(parts, marks, strict=True))
        return kept + ("\x1b[0m" if len(parts) > 1 else "")
    return _CONTROL.sub("", _SGR.sub("", text))


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    paint: Paint,
    *,
    width_max: int | None = None,
    spare: Iterable[str] = (),
) -> list[str]:
    """Return aligned lines: two spaces between columns, nothing after the last one, columns that are empty left out.

    Where that is wider than *width_max*, the columns of the names *spare* are left out, one after the other, until it fits.
    """
    body = [list(row) for row in rows]
    wanted = [n for n in range(len(header)) if not body or any(row[n] for row in body)]
    width = {n: max(len(header[n]), *(len(row[n]) for row in body), 0) for n in wanted}
    for name in spare:
        if width_max is None or sum(width[n] + 2 for n in wanted) - 2 <= width_max:
            break
        wanted = [n for n in wanted if header[n] != name]
    return [
        "  ".join(
            (paint(text, style) if text else "") + " " * (0 if n == wanted[-1] else width[n] - len(text))
            for n, text, style in cells
        ).rstrip()
        for cells in (
            [(n, header[n], "dim") for n in wanted],
            *(
                [(n, row[n] or ("-" if header[n] else ""), getattr(row[n], "style", "")) for n in wanted]
                for row in body
            ),
        )
    ]


def columns(rows: Sequence[Sequence[str]], *, indent: int = 2, gap: int = 3) -> list[str]:
    """Return *rows* aligned without a header, each after *indent* spaces."""
    count = max((len(row) for row in rows), default=0)
    width = [max((len(row[n]) for row in rows if n < len(row)), default=0) for n in range(count)]
    return [
        (" " * indent + (" " * gap).join(text.ljust(width[n]) for n, text in enumerate(row))).rstrip() for row in rows
    ]


def seconds(value: float) -> str:
    """Return a span in its one best unit: "0.4 s", "14 s", "5 min", "22 h", "3 d"."""
    value = max(value, 0.0)
    if value < 10:
        return f"{value:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if value < limit:
            return f"{int(value // unit)} {name}"
    return f"{int(value // 86_400)} d"


def size(value: int) -> str:
    """Return bytes in binary steps: "512 B", "14.2 MB", "1.5 GB" (powers of 1024, as `memory_limit_mb` counts)."""
    amount = float(value)
    for unit in ("B", "KB", "MB", "GB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TB"


def clock(at: float, now: float, zone: tzinfo | None = None) -> str:
    """Return the local time of *at*: the hour alone when it is today, else with its date."""
    moment, today = datetime.fromtimestamp(at, zone), datetime.fromtimestamp(now, zone)
    return moment.strftime("%H:%M:%S" if moment.date() == today.date() else "%Y-%m-%d %H:%M:%S")


def exit_text(ended: Exit) -> str:
    """Return how a process ended: "exit 2 after 0.1 s", "killed by SIGKILL (out of memory) after 3.0 s"."""
    return f"{status_text(ended.status)}{' (out of memory)' if ended.oom else ''} after {seconds(ended.ran_s)}"


def status_text(status: int | None) -> str:
    """Return a wait status as words: "exit 2", "killed by SIGTERM", or that nobody saw it."""
    if status is None:
        return "ended unseen"
    if status >= 0:
        return f"exit {status}"
    from signal import Signals

    try:
        return f"killed by {Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def quantity(count: int, one: str, many: str = "") -> str:
    """Return "1 service", "2 services"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def instance_name(service: str, instance: str, *, alone: bool) -> str:
    """Return how people name an instance: by its service when it is the only one, else SERVICE/ID."""
    return service if alone else f"{service}/{instance}"
