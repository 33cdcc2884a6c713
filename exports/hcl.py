"""HCL out, exactly as `terraform fmt` wants it, with every text a literal.

There is no well-kept HCL writer for Python, and what exports need is little: attributes, blocks, lists, objects, and
references that we wrote ourselves (Raw). A text can never become a template: ``${`` and ``%{`` are escaped, also behind
further dollars. HCL itself normalises texts to NFC, which is_exact() tells. Pure. Source: the HCL native syntax
specification, and hclwrite's formatter for the alignment of equals signs.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence

import msgspec

LINE_MAX = 100


class Raw(msgspec.Struct, frozen=True):
    """An expression of our own, written as it stands."""

    text: str


class Block(msgspec.Struct, frozen=True):
    """``type "label" { ... }``. An empty text in *body* is an empty line, any other a comment."""

    type: str
    labels: tuple[str, ...] = ()
    body: tuple[Item, ...] = ()


class Attribute(msgspec.Struct, frozen=True):
    name: str
    value: Value


Value = str | int | bool | None | Raw | Sequence["Value"] | Mapping[str, "Value"]
Item = Attribute | Block | str

OMIT = Raw("")
"""Stands for no attribute at all, which is something else than null."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TEMPLATE = re.compile(r"([$%])(\1*)\{")
_SIMPLE = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


def block(kind: str, /, *labels: str, body: Sequence[Item] = (), **attributes: Value) -> Block:
    """Return a block with *attributes* first, then *body*; an attribute that is OMIT is left out."""
    attributes = {name: value for name, value in attributes.items() if value is not OMIT}
    return Block(kind, labels, (*(Attribute(name, value) for name, value in attributes.items()), *body))


def document(items: Sequence[Item]) -> str:
    """Return the text of a file: top-level blocks with an empty line between them, comments right above theirs."""
    lines: list[str] = []
    for item in items:
        if lines and not lines[-1].startswith("#"):
            lines.append("")
        lines += _lines((item,))
    return "\n".join(lines) + "\n"


def string(text: str) -> str:
    """Return *text* as a quoted literal that holds exactly it."""
    escaped = "".join(_SIMPLE.get(c) or (c if c.isprintable() else _unicode(c)) for c in text)
    return '"' + _TEMPLATE.sub(_no_template, escaped) + '"'


def is_exact(text: str) -> bool:
    """Tell whether HCL keeps *text* as it is: every HCL text is in NFC."""
    return unicodedata.normalize("NFC", text) == text


def identifier(name: str) -> str:
    """Return *name* as an identifier; what starts with a digit gets an underscore, which no name of slum holds."""
    return name if _IDENTIFIER.fullmatch(name) else f"_{name}"


def _no_template(found: re.Match[str]) -> str:
    """One mark before the brace is doubled, as the language has it; of several the last is written by its code."""
    mark, more = found[1], found[2]
    return f"{mark}{mark}{{" if not more else f"{mark}{more[1:]}\\u{ord(mark):04x}{{"


def _unicode(char: str) -> str:
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def _lines(items: Sequence[Item]) -> Iterator[str]:
    """Attributes on consecutive single lines have their equals signs below each other."""
    chain: list[tuple[str, str]] = []
    for item in items:
        if isinstance(item, Attribute):
            value = list(_value(item.value))
            if len(value) == 1:
                chain.append((item.name, value[0]))
                continue
            yield from _aligned(chain)
            yield f"{item.name} = {value[0]}"
            yield from value[1:]
        else:
            yield from _aligned(chain)
            if isinstance(item, str):
                yield f"# {item}" if item else ""
            else:
                head = " ".join([item.type, *(string(label) for label in item.labels), "{"])
                if not item.body:
                    yield head + "}"
                    continue
                yield head
                yield from (f"  {line}" if line else "" for line in _lines(item.body))
                yield "}"
        chain = []
    yield from _aligned(chain)


def _aligned(chain: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = max((len(name) for name, _ in chain), default=0)
    yield from (f"{name:<{width}} = {value}" for name, value in chain)


def _value(value: Value) -> Iterator[str]:
    match value:
        case None:
            yield "null"
        case bool():
            yield "true" if value else "false"
        case int():
            yield str(value)
        case str():
            yield string(value)
        case Raw(text=text):
            yield from text.split("\n")
        case Mapping():
            yield from _object(value)
        case _:
            yield from _list(value)


def _list(values: Sequence[Value]) -> Iterator[str]:
    parts = [list(_value(value)) for value in values]
    line = f"[{', '.join(part[0] for part in parts)}]"
    if all(len(part) == 1 for part in parts) and len(line) <= LINE_MAX:
        yield line
        return
    yield "["
    for part in parts:
        yield from (f"  {text}{',' if n == len(part) - 1 else ''}" for n, text in enumerate(part))
    yield "]"


def _object(values: Mapping[str, Value]) -> Iterator[str]:
    if not values:
        yield "{}"
        return
    items = [Attribute(key if _IDENTIFIER.fullmatch(key) else string(key), value) for key, value in values.items()]
    yield "{"
    yield from (f"  {line}" for line in _lines(items))
    yield "}"
