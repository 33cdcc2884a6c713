"""Read one TOML file that a stranger may have written: bounded, never surprising, and with a line for every key.

tomllib gives no positions, and trusts its input (it recurses without limit, and a 40 KB dotted key takes it seconds).
So one linear lexer runs over the text first: it refuses what is nested too deeply before tomllib sees it, and after
that the same tokens tell on which line each key stands. Every failure is a ConfigError that names file and line. It
must never interpret keys: that is fleetfile's job.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import tomllib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from slum.errors import ConfigError

STDIN = "-"
BYTES_MAX = 256 << 10
DEPTH_MAX = 16
"""Of nested arrays and inline tables together, and of the parts of one dotted key."""

Keys = tuple[str | int, ...]
"""Where something stands in a document: table keys and array positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A parsed file. *name* is how messages call it, *folder* what its relative paths are relative to."""

    name: str
    folder: Path
    data: Mapping[str, Any]
    lines: Mapping[Keys, int]

    def line(self, keys: Keys) -> int | None:
        """Return the line of *keys*, or of the nearest table around it, or None."""
        while keys:
            if keys in self.lines:
                return self.lines[keys]
            keys = keys[:-1]
        return None


def read(path: Path, name: str | None = None) -> Document:
    """Return the document in *path*, "-" being standard input; ConfigError when it cannot be read or is not TOML.

    What standard input names is looked for from the working folder.
    """
    name = name or str(path)
    if name == STDIN:
        return parse(sys.stdin.buffer.read(BYTES_MAX + 1), name, Path())
    return parse(_read_bytes(path, name), name, path.parent)


def parse(raw: bytes, name: str, folder: Path) -> Document:
    """Return the document in *raw*; ConfigError with file and line when it is none."""
    if len(raw) > BYTES_MAX:
        raise ConfigError(f"{name}: larger than {BYTES_MAX >> 10} KB", hint="split the services over several tenements")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ConfigError(f"{name}:1: starts with a byte order mark", hint="save it as UTF-8 without BOM")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 (byte {raw[error.start]:#04x})") from error
    tokens = tuple(_lex(text))
    starts = _line_starts(text)
    _check_depth(tokens, starts, name)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError; so is int() of 5,000 digits
        raise ConfigError(_syntax_message(str(error), name, text)) from error
    return Document(name=name, folder=folder, data=data, lines=_Locator(tokens, starts).lines())


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ConfigError(f"{name}: is not a regular file", hint="`-` reads standard input")
            return file.read(BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{name}: no such file", hint="`slum init` writes a commented slum.toml") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{name}: is a folder, not a file", hint=f"name the file, e.g. {name}/slum.toml") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{name}: cannot be read: {why}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a FIFO would wait for a writer


def _syntax_message(error: str, name: str, text: str) -> str:
    """Turn tomllib's "X (at line 3, column 5)" into "file:3: not TOML: x (column 5)"."""
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", error, re.DOTALL)
    if found is None:
        return f"{name}: not TOML: {error[:200]}"
    what = re.sub(r"\(('[^)]*)\)", _dotted, found[1][:1].lower() + found[1][1:200])
    if what.startswith(("cannot overwrite", "cannot declare", "duplicate inline table key", "cannot mutate")):
        what += ": the same key twice"
    if found[2] is None:
        return f"{name}:{text.count(chr(10)) + (not text.endswith(chr(10)))}: not TOML: {what} (at the end of the file)"
    return f"{name}:{found[2]}: not TOML: {what} (column {found[3]})"


def _dotted(keys: re.Match[str]) -> str:
    """Return tomllib's "('a', 'b')" as it stands in a file: [a.b]."""
    return "[" + ".".join(re.findall(r"'([^']*)'", keys[1])) + "]"


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


# One alternative a character, so nothing is tried twice: linear, whatever the text. An unterminated string ends the
# lexing (kind "open"), since going on behind it would be quadratic; tomllib refuses the text at that very place.
# Groups are not repeated possessively: Python 3.11.2 ends such a repetition too early.
_TOKENS = re.compile(
    r"""
      (?P<skip>[ \t\r]++|\#[^\n]*+)
    | (?P<newline>\n)
    | (?P<string>\"{3}(?:[^"\\]|\\[\s\S]|"{1,2}(?!"))*"{3,5} | '{3}(?:[^']|'{1,2}(?!'))*'{3,5}
                |(?!\"{3})"(?:[^"\\\n]|\\[^\n])*" | (?!'{3})'[^'\n]*+')
    | (?P<open>["'])
    | (?P<mark>[\[\]{}=.,])
    | (?P<bare>[^\s\[\]{}=.,"'\#]++)
    | (?P<other>[\s\S])
    """,
    re.VERBOSE,
)


def _lex(text: str) -> Iterator[_Token]:
    for found in _TOKENS.finditer(text):
        kind = found.lastgroup or "other"
        if kind == "open":
            return
        if kind != "skip":
            yield _Token(found[0] if kind == "mark" else kind, found[0], found.start())


def _line_starts(text: str) -> tuple[int, ...]:
    return (0, *(found.end() for found in re.finditer("\n", text)))


def _check_depth(tokens: tuple[_Token, ...], starts: tuple[int, ...], name: str) -> None:
    depth = dots = 0
    before = ""
    for token in tokens:
        if token.kind in ("[", "{"):
            depth += 1
        elif token.kind in ("]", "}"):
            depth = max(0, depth - 1)
        if token.kind == ".":
            dots += 1
        elif before != ".":
            dots = 0
        before = token.kind
        if depth > DEPTH_MAX or dots >= DEPTH_MAX:
            raise ConfigError(f"{name}:{bisect_right(starts, token.start)}: nested deeper than {DEPTH_MAX} levels")


class _Locator:
    """Walks the tokens of a text that tomllib accepted, and notes the first line of each key."""

    def __init__(self, tokens: tuple[_Token, ...], starts: tuple[int, ...]) -> None:
        self._tokens = (*tokens, _Token("end", "", starts[-1]))
        self._starts = starts
        self._at = 0
        self._lines: dict[Keys, int] = {}
        self._counts: dict[Keys, int] = {}
        """How many elements each array of tables has so far."""

    def lines(self) -> dict[Keys, int]:
        table: Keys = ()
        while (token := self._peek()).kind != "end":
            if token.kind == "newline":
                self._at += 1
            elif token.kind == "[":
                table = self._header()
            else:
                self._pair(table)
        return self._lines

    def _peek(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _header(self) -> Keys:
        line = self._line(self._take())
        many = self._peek().kind == "["
        if many:
            self._take()
        keys: Keys = ()
        parts = self._dotted()
        for part in parts[:-1]:
            keys = self._inside((*keys, part))
            self._lines.setdefault(keys, line)
        keys = (*keys, *parts[-1:])
        if many:
            self._counts[keys] = self._counts.get(keys, 0) + 1
        self._lines.setdefault(keys, line)
        keys = self._inside(keys)
        self._lines.setdefault(keys, line)
        self._skip_line()
        return keys

    def _inside(self, keys: Keys) -> Keys:
        """Return *keys*, or its newest element when it is an array of tables."""
        return (*keys, self._counts[keys] - 1) if keys in self._counts else keys

    def _pair(self, table: Keys) -> None:
        """Key, equals sign, value. Always moves on, so that an unforeseen text cannot hold it up."""
        line, before = self._line(self._peek()), self._at
        keys = table
        for part in self._dotted():
            keys = (*keys, part)
            self._lines.setdefault(keys, line)
        if self._peek().kind == "=":
            self._take()
            self._value(keys)
        if self._at == before:
            self._take()

    def _dotted(self) -> tuple[str, ...]:
        parts = []
        while self._peek().kind in ("bare", "string"):
            parts.append(_key_text(self._take()))
            if self._peek().kind != ".":
                break
            self._take()
        return tuple(parts)

    def _value(self, keys: Keys) -> None:
        opening = self._peek().kind
        if opening not in ("[", "{"):
            while self._peek().kind not in ("newline", ",", "]", "}", "end"):
                self._take()
            return
        self._take()
        position = 0
        while (token := self._peek()).kind not in ("]", "}", "end"):
            if token.kind in (",", "newline"):
                self._take()
            elif opening == "{":
                self._pair(keys)
            else:
                self._lines.setdefault((*keys, position), self._line(token))
                self._value((*keys, position))
                position += 1
        self._take()

    def _skip_line(self) -> None:
        while self._peek().kind not in ("newline", "end"):
            self._take()

    def _line(self, token: _Token) -> int:
        return bisect_right(self._starts, token.start)


def _key_text(token: _Token) -> str:
    if token.kind == "bare":
        return token.text
    if token.text.startswith("'"):
        return token.text[1:-1]
    return str(tomllib.loads(f"key = {token.text}")["key"])
