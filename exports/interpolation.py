"""Compose's variables in a text: ``$NAME``, ``${NAME}``, ``${NAME:-default}``, ``$$``. Pure: no variable is ever read.

Source: the Compose specification, "Interpolation". Nested defaults are filled in as well.
"""

from __future__ import annotations

import re

import msgspec

DEPTH_MAX = 20
VARIABLES_MAX = 1000

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Filled(msgspec.Struct, frozen=True, kw_only=True):
    """*text* with defaults in place of variables; *alone* names the variable when the text was nothing else."""

    text: str
    missing: tuple[str, ...] = ()
    """Variables without a default; nothing stands for them in the text."""
    defaulted: tuple[str, ...] = ()
    alone: str | None = None


def fill(text: str, depth: int = 0) -> Filled:
    """Return *text* with what can be known of its variables; what is nested beyond reason stays as it is."""
    if "$" not in text or depth > DEPTH_MAX or text.count("$") > VARIABLES_MAX:
        return Filled(text=text)
    out: list[str] = []
    missing: list[str] = []
    defaulted: list[str] = []
    at, alone = 0, None
    while at < len(text):
        if text[at] != "$":
            end = text.find("$", at)
            end = len(text) if end < 0 else end
            out.append(text[at:end])
            at = end
        elif text.startswith("$$", at):
            out.append("$")
            at += 2
        else:
            begun = at
            name, operation, rest, at = _variable(text, at)
            if name is None:
                out.append("$")
                at = begun + 1
                continue
            if begun == 0 and at == len(text):
                alone = name
            if operation in (":-", "-"):
                inner = fill(rest, depth + 1)
                out.append(inner.text)
                missing += inner.missing
                defaulted += [name, *inner.defaulted]
            else:
                missing.append(name)
    return Filled(text="".join(out), missing=tuple(missing), defaulted=tuple(defaulted), alone=alone)


def _variable(text: str, at: int) -> tuple[str | None, str, str, int]:
    """Return (name, operator, its operand, the end) of the variable at *at*; no name when it is none."""
    braced = text.startswith("${", at)
    found = _NAME.match(text, at + (2 if braced else 1))
    if found is None:
        return None, "", "", at
    if not braced:
        return found[0], "", "", found.end()
    depth, end = 1, found.end()
    while end < len(text) and depth:
        depth += {"{": text[end - 1] == "$", "}": -1}.get(text[end], 0)
        end += 1
    if depth:
        return None, "", "", at
    operand = text[found.end() : end - 1]
    operation = next((op for op in (":-", "-", ":?", "?", ":+", "+") if operand.startswith(op)), "")
    return found[0], operation, operand[len(operation) :], end
