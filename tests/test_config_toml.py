"""tomlfile: bounds that hold before tomllib sees the text, errors with a line, and a line for every key."""

from __future__ import annotations

import contextlib
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slum import tomlfile
from slum.errors import ConfigError
from slum.tomlfile import Document

HERE = Path("/nowhere")


def parse(text: str) -> Document:
    return tomlfile.parse(text.encode(), "f.toml", HERE)


def refused(raw: bytes | str) -> str:
    with pytest.raises(ConfigError) as caught:
        tomlfile.parse(raw.encode() if isinstance(raw, str) else raw, "f.toml", HERE)
    return caught.value.message


def test_every_key_has_its_line() -> None:
    document = parse(
        """# comment with [brackets] and "quotes"
[a.b]
c = 1  # [x]
"d.e" = '''
[not.a.table]
'''
f = { g = 1, h = [
  "x", # "]"
  { i = 2 },
] }
dotted.key = "\\"]"

[[list]]
k = 1
[[list]]
k = 2
[list.sub]
z = 1979-05-27 07:32:00
"""
    )
    expected = {
        ("a",): 2,
        ("a", "b"): 2,
        ("a", "b", "c"): 3,
        ("a", "b", "d.e"): 4,
        ("a", "b", "f"): 7,
        ("a", "b", "f", "g"): 7,
        ("a", "b", "f", "h"): 7,
        ("a", "b", "f", "h", 0): 8,
        ("a", "b", "f", "h", 1): 9,
        ("a", "b", "f", "h", 1, "i"): 9,
        ("a", "b", "dotted"): 11,
        ("a", "b", "dotted", "key"): 11,
        ("list",): 13,
        ("list", 0): 13,
        ("list", 0, "k"): 14,
        ("list", 1): 15,
        ("list", 1, "k"): 16,
        ("list", 1, "sub"): 17,
        ("list", 1, "sub", "z"): 18,
    }
    assert dict(document.lines) == expected
    assert document.line(("a", "b", "c", "not there")) == 3
    assert document.line(("nothing",)) is None


def test_windows_line_ends_count_once() -> None:
    assert parse("a = 1\r\n\r\nb = 2\r\n").lines == {("a",): 1, ("b",): 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = \n", "f.toml:2: not TOML: invalid value (column 5)"),
        ('a = "x', "f.toml:1: not TOML: unterminated string (at the end of the file)"),
        ("a = 1\n\na = 2\n", "f.toml:3: not TOML: cannot overwrite a value: the same key twice (column 6)"),
        ("[a.b]\n[a.b]\n", "f.toml:2: not TOML: cannot declare [a.b] twice: the same key twice (column 5)"),
        ("[a]\n[b]\n[a]\n", "f.toml:3: not TOML: cannot declare [a] twice: the same key twice (column 3)"),
        ("a = [" * 17, "f.toml:1: nested deeper than 16 levels"),
        ("a = " + "[" * 100_000, "f.toml:1: nested deeper than 16 levels"),
        ("a = " + "{a=" * 10_000, "f.toml:1: nested deeper than 16 levels"),
        ("\n" + ".".join("a" * 20_000) + " = 1", "f.toml:2: nested deeper than 16 levels"),
        ("[" + ".".join("a" * 17) + "]", "f.toml:1: nested deeper than 16 levels"),
        ("#" * (tomlfile.BYTES_MAX + 1), "f.toml: larger than 256 KB"),
        ("\ufeffa = 1", "f.toml:1: starts with a byte order mark"),
        (b"a = 1\nb = '\xff'\n", "f.toml:2: not UTF-8 (byte 0xff)"),
        ("a = " + "1" * 5000, "f.toml: not TOML: Exceeds the limit (4300 digits)"),
    ],
)
def test_refused_with_file_and_line(text: bytes | str, message: str) -> None:
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    "text",
    [
        '"""\\' * 60_000,
        "'''a" * 60_000,
        '"' * 250_000,
        "a='" * 80_000,
        "a." * 15 + "a=1\n",
        "[[a.b]]\n" * 30_000,
        "a = [" + "[]," * 80_000 + "]",
        "\n".join(f"a.b.c{n} = 1" for n in range(15_000)),
    ],
    ids=range(8),
)
@pytest.mark.timeout(60)
def test_no_text_hangs_it(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse(text)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, why in (
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "missing", "no such file"),
        (tmp_path / "fifo", "is not a regular file"),
        (Path("/dev/null"), "is not a regular file"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
    ):
        with pytest.raises(ConfigError, match=why):
            tomlfile.read(path)


def test_a_file_without_permission(tmp_path: Path) -> None:
    file = tmp_path / "slum.toml"
    file.touch(0)
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)  # root reads everything
    try:
        with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
            tomlfile.read(file)
    finally:
        os.seteuid(uid)


KEY = st.one_of(
    st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True),
    st.text(max_size=6).map(lambda key: '"' + "".join(f"\\U{ord(c):08X}" for c in key if c < "\ud800") + '"'),
)
VALUE = st.recursive(
    st.sampled_from(
        ['"x"', "1", "1.5", "true", "'''\na = 1\n'''", '"""]\n"""', "1979-05-27T07:32:00Z", "'#'", '"\\""']
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[" + ",\n".join(items) + "]"),
        st.lists(st.tuples(KEY, inner), max_size=3).map(lambda p: "{" + ", ".join(f"{k} = {v}" for k, v in p) + "}"),
    ),
    max_leaves=6,
)
PAIR = st.tuples(st.lists(KEY, min_size=1, max_size=3), VALUE).map(lambda p: f"{'.'.join(p[0])} = {p[1]}")
HEADER = st.tuples(st.lists(KEY, min_size=1, max_size=3), st.booleans()).map(
    lambda p: f"[[{'.'.join(p[0])}]]" if p[1] else f"[ {' . '.join(p[0])} ] # x"
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(PAIR, HEADER, st.just(""), st.just("# [c]")), max_size=8).map("\n".join))
def test_the_locator_knows_what_tomllib_knows(text: str) -> None:
    """For any valid text: exactly the keys of the parsed data have a line, and it is within the text."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert refused(text)
        return
    found: set[tomlfile.Keys] = set()

    def collect(value: object, at: tomlfile.Keys) -> None:
        if at:
            found.add(at)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, item in items:
            collect(item, (*at, key))

    collect(data, ())
    lines = parse(text).lines
    assert set(lines) == found
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
