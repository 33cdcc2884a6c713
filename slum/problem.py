"""One thing that is wrong in a fleet, and the words in which problems are told. Pure.

*at* is the place as keys, in the files' words; fleetfile adds file and line where it knows them.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable

from slum.frozen import Frozen

At = tuple[str | int, ...]


class Problem(Frozen):
    """``file:line: dotted.key: message``; without a file (a fleet that a client sent) the place alone."""

    at: At
    message: str
    file: str = ""
    line: int | None = None
    given: At = ()
    """Another place whose value makes this a problem; what could not be read there makes none."""

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line is not None else self.file
        return printable(": ".join(part for part in (where, dotted(self.at), self.message) if part))


class Range(Frozen):
    """The numbers that a key may hold, both ends included."""

    low: float
    high: float

    def problem(self, at: At, value: float) -> Problem | None:
        if math.isfinite(value) and self.low <= value <= self.high:
            return None
        return Problem(at=at, message=f"{shown(value)} is not between {self}")

    def __str__(self) -> str:
        return f"{self.low:.12g} and {self.high:.12g}"


def file_key(field: str) -> str:
    """Return the key by which the files call a model's field: durations carry no unit there."""
    return field.removesuffix("_s")


def dotted(at: At) -> str:
    """Return *at* as TOML would write it: ``service.api.env."my key"``."""
    return ".".join(part if isinstance(part, str) and _BARE.fullmatch(part) else shown(part) for part in at)


def shown(value: object, limit: int = 60) -> str:
    """Return *value* as TOML text, at most *limit* characters of it, free of control characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return printable(json.dumps(value if len(value) <= limit else value[:limit] + "...", ensure_ascii=False))
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 128:
        return "a huge number"
    return str(value)


def printable(text: str) -> str:
    """Return *text* on one line, with what could steer a terminal written out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean `X`?" with the valid word nearest to *word*, or nothing."""
    found = difflib.get_close_matches(word[:64].lower().replace("-", "_"), (k.replace("-", "_") for k in known), 1, 0.6)
    by_key = {k.replace("-", "_"): k for k in known}
    return f"; did you mean `{by_key[found[0]]}`?" if found else ""


_BARE = re.compile(r"[A-Za-z0-9_-]{1,64}")
