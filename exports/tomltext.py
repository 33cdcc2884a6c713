"""Tidying of what tomli_w writes: short lists of texts stand on one line, as people write them. Pure."""

from __future__ import annotations

import re

LINE_MAX = 100
_LIST = re.compile(
    r'^(?P<head>(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*") = )\[\n(?P<items>(?:    (?:"(?:[^"\\\n]|\\.)*"|\d+),\n)+)\]$',
    re.MULTILINE,
)


def tidy(text: str) -> str:
    """Return *text* with every list of texts or numbers that fits on one line.

    tomli_w writes each text on one line with its quotes and line ends escaped, so a line that starts with four spaces is
    always an element of a list.
    """
    return _LIST.sub(_on_one_line, text)


def _on_one_line(found: re.Match[str]) -> str:
    items = [line.strip().removesuffix(",") for line in found["items"].rstrip("\n").split("\n")]
    line = f"{found['head']}[{', '.join(items)}]"
    return line if len(line) <= LINE_MAX else found[0]
