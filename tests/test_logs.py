"""Logs: read back, merged, filtered and followed while the keeper's own code writes and rotates them."""

from __future__ import annotations

import asyncio
import gzip
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from slum.errors import ConfigError
from slum.node import logfiles, logs
from slum.node.keeper_log import LogFile, stamp
from slum.paths import Home

DEADLINE_S = 20.0


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(data=tmp_path / "data", run=tmp_path / "run")


class Writer:
    """The keeper's log file of one instance, small enough to rotate often."""

    def __init__(self, home: Home, id: str = "main", *, bytes_max: int = 8 << 20, keep: int = 4) -> None:
        self.folder = home.instance_log("web", id).parent
        self._file = LogFile(str(self.folder / "current"), bytes_max, keep)
        self.numbers = 0

    def line(self, text: str, at: float, mark: bytes = b"") -> None:
        stamped, column = stamp(text.encode() + b"\n", at, 0, mark)
        assert self._file.append(stamped, column)

    def count(self, lines: int) -> None:
        for _ in range(lines):
            self.numbers += 1
            self.line(f"line {self.numbers}", 1000 + self.numbers / 100)

    def close(self) -> None:
        self._file.close()

    def old(self) -> None:
        for path in self.folder.iterdir():
            os.utime(path, (time.time() - 1000,) * 2)


async def texts(lines: AsyncIterator[bytes], until: int | None = None) -> list[str]:
    """Return "ID TEXT" of all lines, or of the first *until*."""
    found: list[str] = []
    async with asyncio.timeout(DEADLINE_S), aclosing(lines):
        async for chunk in lines:
            assert chunk.endswith(b"\n")
            for line in chunk.decode().splitlines():
                name, at, text = line.split(" ", 2)
                assert float(at) > 0
                found.append(f"{name} {text}")
            if until is not None and len(found) >= until:
                break
    return found


def numbered(first: int, last: int) -> list[str]:
    return [f"main line {number}" for number in range(first, last + 1)]


async def test_all_files_are_read_in_order_whatever_form_they_have(home: Home) -> None:
    writer = Writer(home, bytes_max=600)
    writer.count(150)
    writer.close()
    names = logfiles.numbered(writer.folder)
    assert len(names) == 5
    writer.old()
    assert logfiles.compress(names[3])
    zipped = names[2].with_name("current.2.gz")
    zipped.write_bytes(gzip.compress(names[2].read_bytes()))
    names[2].unlink()
    assert {path.suffix for path in writer.folder.iterdir()} >= {".zst", ".gz", ".1"}
    found = await texts(logs.read(home, "web", ["main"]))
    assert found == numbered(151 - len(found), 150)
    assert len(found) > 100


async def test_several_instances_are_merged_by_time(home: Home) -> None:
    for name, offset in (("a", 0.0), ("b", 0.5)):
        writer = Writer(home, name, bytes_max=500)
        for number in range(20):
            writer.line(str(number), 1000 + number + offset)
        writer.close()
    found = await texts(logs.read(home, "web", ["b", "a"]))
    assert found == [f"{name} {number}" for number in range(20) for name in ("a", "b")]
    assert await texts(logs.read(home, "web", ["a", "b"], tail=3)) == ["b 18", "a 19", "b 19"]


async def test_since_tail_and_grep(home: Home) -> None:
    writer = Writer(home, bytes_max=1000)
    writer.count(100)
    writer.close()
    assert await texts(logs.read(home, "web", ["main"], since=1000.955)) == numbered(96, 100)
    assert await texts(logs.read(home, "web", ["main"], tail=70)) == numbered(31, 100)
    assert await texts(logs.read(home, "web", ["main"], tail=0)) == []
    assert await texts(logs.read(home, "web", ["main"], grep=r"line [5-9]0$")) == [
        f"main line {n}0" for n in range(5, 10)
    ]
    assert await texts(logs.read(home, "web", ["main"], grep=r"0$", tail=2)) == ["main line 90", "main line 100"]
    assert await texts(logs.read(home, "web", ["main"], grep=r"1$", tail=9, since=1000.8)) == [
        "main line 81",
        "main line 91",
    ]


async def test_lines_of_generations_and_one_offs_are_told_apart(home: Home) -> None:
    writer = Writer(home)
    for number in range(1, 4):
        writer.line(f"failed {number}", 1000 + number, b"/2")
        writer.line(f"serving {number}", 1000 + number, b"/1")
        writer.line(f"one-off {number}", 1000 + number)
    writer.close()
    assert await texts(logs.read(home, "web", ["main"], tail=2, generation=2)) == ["main failed 2", "main failed 3"]
    assert await texts(logs.read(home, "web", ["main"], generation=0)) == [f"main one-off {n}" for n in (1, 2, 3)]
    assert len(await texts(logs.read(home, "web", ["main"]))) == 9


async def test_no_log_is_no_lines(home: Home) -> None:
    assert await texts(logs.read(home, "web", ["main"])) == []
    assert await texts(logs.read(home, "web", [], tail=5)) == []


async def test_odd_lines_are_shown_with_the_time_of_the_line_before(home: Home) -> None:
    writer = Writer(home)
    writer.line("é ü", 1000)
    folder = writer.folder
    with (folder / "current").open("ab") as file:
        file.write(b"no time here\n\n1001.000 \xff\xfe\n1002.000 unfinished")
    writer.close()
    found = [line async for chunk in logs.read(home, "web", ["main"]) for line in chunk.splitlines()]
    assert found == [
        "main 1000.000 é ü".encode(),
        b"main 1000.000 no time here",
        b"main 1000.000 ",
        b"main 1001.000 \xff\xfe",
        b"main 1002.000 unfinished",
    ]


async def test_following_loses_nothing_and_repeats_nothing_across_rotations(home: Home) -> None:
    writer = Writer(home, bytes_max=3000)
    writer.count(50)
    lines = logs.read(home, "web", ["main"], follow=True, tail=10)
    found = b""
    async with asyncio.timeout(DEADLINE_S), aclosing(lines):
        while b"line 2050\n" not in found:
            found += await anext(lines)
            # So many that the file is rotated at every other look, but not four times between two.
            writer.count(min(200, 2050 - writer.numbers))
    writer.close()
    assert [line.split(b" ", 2)[2].decode() for line in found.splitlines()] == [f"line {n}" for n in range(41, 2051)]


async def test_following_begins_before_the_log_does_and_ends_when_closed(home: Home) -> None:
    lines = logs.read(home, "web", ["main"], follow=True)
    first = asyncio.create_task(anext(lines))
    writer = Writer(home)
    writer.line("hello", 1000)
    async with asyncio.timeout(DEADLINE_S):
        assert await first == b"main 1000.000 hello\n"
        await lines.aclose()
    writer.close()


async def test_following_only_shows_whole_lines(home: Home) -> None:
    writer = Writer(home)
    writer.line("one", 1000)
    lines = logs.read(home, "web", ["main"], follow=True, grep="one|two")
    async with asyncio.timeout(DEADLINE_S), aclosing(lines):
        assert await anext(lines) == b"main 1000.000 one\n"
        with (writer.folder / "current").open("ab", buffering=0) as file:
            file.write(b"1001.000 t")
            file.write(b"wo\n")
        assert await anext(lines) == b"main 1001.000 two\n"
    writer.close()


async def test_a_reader_that_was_overtaken_says_so_and_goes_on(home: Home) -> None:
    writer = Writer(home, bytes_max=200, keep=2)
    writer.count(1)
    lines = logs.read(home, "web", ["main"], follow=True)
    async with asyncio.timeout(DEADLINE_S), aclosing(lines):
        assert await anext(lines) == b"main 1000.010 line 1\n"
        writer.count(200)
        seen = b""
        while b"line 201\n" not in seen:
            seen += await anext(lines)
    writer.close()
    assert b"[slum] some lines were rotated away" in seen


@pytest.mark.parametrize("pattern", [r"(", r"(a+)+$", r"(?:(?:(?:a{1,999}){1,999}){1,999}){1,999}b", "a" * 501])
async def test_a_pattern_that_is_no_good_is_refused_in_time(home: Home, pattern: str) -> None:
    writer = Writer(home)
    writer.line("a" * 60 + "!", 1000)
    writer.close()
    with pytest.raises(ConfigError, match="pattern"):
        await texts(logs.read(home, "web", ["main"], grep=pattern))


async def test_a_slow_reader_makes_the_child_wait_and_leaving_ends_it(home: Home) -> None:
    writer = Writer(home)
    for number in range(20_000):
        writer.line("x" * 200, 1000 + number)
    writer.close()
    lines = logs.read(home, "web", ["main"])
    async with asyncio.timeout(DEADLINE_S):
        assert (await anext(lines)).startswith(b"main 1000.000 xxx")
        await lines.aclose()


async def test_compressing_keeps_every_line_and_starts_no_child_for_nothing(home: Home) -> None:
    writer = Writer(home, bytes_max=600)
    writer.count(100)
    before = await texts(logs.read(home, "web", ["main"]))
    await logs.compress_rotated(home)
    assert not list(writer.folder.glob("*.zst"))
    writer.old()
    await logs.compress_rotated(home)
    assert len(list(writer.folder.glob("*.zst"))) == len(list(writer.folder.iterdir())) - 1
    assert await texts(logs.read(home, "web", ["main"])) == before
    writer.count(60)
    writer.close()
    after = await texts(logs.read(home, "web", ["main"]))
    assert after == numbered(161 - len(after), 160)
    assert any(path.suffix == ".zst" for path in writer.folder.iterdir())


def test_a_file_that_is_renamed_while_it_is_compressed_stays_as_it_was(home: Home) -> None:
    writer = Writer(home, bytes_max=600)
    writer.count(100)
    writer.close()
    path = writer.folder / "current.2"
    moved = path.rename(writer.folder / "elsewhere")
    assert not logfiles.compress(path)
    assert not [name for name in os.listdir(writer.folder) if name.startswith(".") or name.endswith(".zst")]
    moved.rename(path)
    assert logfiles.compress(path)
    assert (writer.folder / "current.2.zst").exists()
    assert not path.exists()


def test_compressing_while_the_keeper_rotates_loses_and_doubles_nothing(home: Home) -> None:
    writer = Writer(home, bytes_max=300, keep=30)
    done = threading.Event()
    compressed = 0

    def compress() -> None:
        nonlocal compressed
        while not done.is_set():
            for number, path in sorted(logfiles.numbered(writer.folder).items()):
                if number and path.suffix != ".zst":
                    compressed += logfiles.compress(path)

    thread = threading.Thread(target=compress)
    thread.start()
    deadline = time.monotonic() + DEADLINE_S
    while compressed < 150 and time.monotonic() < deadline:
        writer.count(20)
        done.wait(0.003)
    done.set()
    thread.join()
    writer.close()
    files = logfiles.open_all(writer.folder)
    found = [line.split(b" ", 1)[1] for file in files for line in logfiles.lines(file)]
    for file in files:
        file.close()
    assert compressed >= 150
    assert len(files) == 31
    assert found == [b"line %d" % number for number in range(writer.numbers - len(found) + 1, writer.numbers + 1)]
    assert not [name for name in os.listdir(writer.folder) if name.startswith(".")]
