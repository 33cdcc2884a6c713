"""What becomes of a child's output: stamped lines, rotation, rates, full disks, and neighbours that are not starved."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from keeper_support import Rig, child_of, exited, holds, python, rig, shell

from slum.node.keeper_log import LINE_BYTES_MAX, LogFile, stamp
from slum.node.types import Log

__all__ = ["rig"]

STAMP = b"17.250 "
CHUNKS = st.lists(
    st.one_of(
        st.binary(max_size=50),
        st.sampled_from([b"\n", b"\n\n", b"line\n", b"half", b"x" * LINE_BYTES_MAX, b"y" * (LINE_BYTES_MAX * 2 + 7)]),
    ),
    max_size=12,
)


@given(CHUNKS)
def test_however_it_is_cut_into_chunks_every_line_is_stamped_once(chunks: list[bytes]) -> None:
    out, column = b"", 0
    for chunk in chunks:
        text, column = stamp(chunk, 17.25, column)
        out += text
    whole = b"".join(chunks)
    lines = out.split(b"\n")
    assert all(line.startswith(STAMP) for line in lines[:-1])
    assert not lines[-1] or lines[-1].startswith(STAMP)
    assert column == max(0, len(lines[-1]) - len(STAMP))
    bare = [line[len(STAMP) :] for line in lines]
    assert all(len(line) <= LINE_BYTES_MAX for line in bare)
    expected = []
    for line in whole.split(b"\n"):
        while len(line) > LINE_BYTES_MAX:
            expected.append(line[:LINE_BYTES_MAX])
            line = line[LINE_BYTES_MAX:]
        expected.append(line)
    assert bare == expected


def test_rotation_keeps_the_newest_and_moves_compressed_files_along(tmp_path: Path) -> None:
    file = LogFile(str(tmp_path / "current"), bytes_max=100, keep=2)
    for number in range(12):
        assert file.append(b"%02d %s\n" % (number, b"x" * 46), 0)
        if number == 3:
            (tmp_path / "current.1").rename(tmp_path / "current.1.zst")
    file.close()
    held = {path.name: path.read_bytes()[:2] for path in tmp_path.iterdir()}
    assert held == {"current": b"10", "current.1": b"08", "current.2": b"06"}


def test_rotation_falls_between_lines(tmp_path: Path) -> None:
    file = LogFile(str(tmp_path / "current"), bytes_max=100, keep=1)
    assert file.append(b"a" * 90, 90)
    assert file.append(b"b" * 20 + b"\nnext\n", 0)
    file.close()
    assert (tmp_path / "current.1").read_bytes() == b"a" * 90 + b"b" * 20 + b"\n"
    assert (tmp_path / "current").read_bytes() == b"next\n"


async def test_lines_of_both_streams_come_in_order_with_their_time(rig: Rig) -> None:
    client = await rig.started()
    before = time.time()
    await client.spawn(shell(rig, "c", "echo one; echo two >&2; printf 'no end'"))
    await exited(client, "c")
    assert rig.logged("c") == ["one", "two", "no end"]
    assert rig.raw_log("c").endswith(b"\n")
    times = [float(line.split()[0]) for line in rig.raw_log("c").splitlines()]
    assert all(before - 0.001 <= each <= time.time() for each in times)
    assert all(len(line.split(b" ")[0].partition(b".")[2]) == 3 for line in rig.raw_log("c").splitlines())


async def test_a_mark_stands_in_every_line_also_in_the_keepers_own(rig: Rig) -> None:
    client = await rig.started()
    log = rig.log("c", rate_bytes_s=100, burst_bytes=200, mark=12)
    await client.spawn(shell(rig, "c", "echo one; sleep 0.1; seq 1000", log=log))
    await exited(client, "c")
    lines = rig.raw_log("c").splitlines()
    assert len(lines) == 2
    assert b"[slum] dropped" in lines[1]
    assert all(re.fullmatch(rb"[0-9]+\.[0-9]{3}/12 .+", line) for line in lines)


async def test_a_flood_is_cut_counted_and_said_and_a_neighbour_is_not_starved(rig: Rig) -> None:
    client = await rig.started()
    log = rig.log("flood", rate_bytes_s=100_000, burst_bytes=200_000, bytes_max=150_000, keep=2)
    await client.spawn(shell(rig, "flood", "exec yes 'a line of some length, again and again'", log=log))
    await client.spawn(shell(rig, "calm", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done"))
    folder = Path(log.path).parent
    # It may be in a file that is full already.
    await holds(lambda: any(b"[slum] dropped " in path.read_bytes() for path in folder.glob("*")))
    heard = len(rig.logged("calm"))
    await holds(lambda: len(rig.logged("calm")) > heard + 30)
    stats = await client.stats()
    assert stats.dropped_bytes["flood"] > 1_000_000
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 150_000
    flooding = await child_of(client, "flood")
    assert flooding is not None
    assert flooding.running
    used, start = cpu_s(rig.pid), time.monotonic()
    await holds(lambda: time.monotonic() > start + 1.5)
    spent = (cpu_s(rig.pid) - used) / (time.monotonic() - start)
    assert spent < 0.5, "dropping should cost little"


async def test_what_was_dropped_is_said_when_the_child_ends(rig: Rig) -> None:
    client = await rig.started()
    log = rig.log("burst", rate_bytes_s=1000, burst_bytes=1000)
    code = "import os; os.write(1, b'x' * 500 + b'\\n'); os.write(1, b'y' * 5000 + b'\\n')"
    await client.spawn(python(rig, "burst", code, log=log))
    await exited(client, "burst")
    lines = rig.logged("burst")
    assert lines[-1].startswith("[slum] dropped ")
    dropped = int(lines[-1].split()[2])
    assert dropped + sum(len(line) + 1 for line in lines[:-1]) == 5502


async def test_a_log_that_cannot_be_written_is_dropped_and_the_child_lives(rig: Rig) -> None:
    client = await rig.started()
    await holds(rig.folder.exists)
    (rig.folder / "logs").write_text("a file where a folder should be")
    await client.spawn(shell(rig, "c", "while :; do echo word; sleep 0.01; done"))
    await holds(lambda: "c is not logged now" in rig.said)

    async def dropped() -> int:
        return (await client.stats()).dropped_bytes.get("c", 0)

    while await dropped() < 50:
        pass
    (rig.folder / "logs").unlink()
    await holds(lambda: "word" in rig.logged("c"))
    assert rig.logged("c")[0].startswith("[slum] dropped ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("cannot mount a tmpfs")
        pytest.skip("cannot mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(fd, bytes(4096)):
            pass
    os.close(fd)


@pytest.mark.root
async def test_a_full_disk_neither_kills_nor_stalls(rig: Rig, small_disk: Path) -> None:
    client = await rig.started()
    log = Log(path=str(small_disk / "current"), bytes_max=1 << 20)
    filler = small_disk / "filler"
    await client.spawn(shell(rig, "c", "while :; do echo some words of a line; sleep 0.001; done", log=log))
    fill(filler)
    while not (await client.stats()).dropped_bytes:
        pass
    assert (await client.hello()).pid == rig.pid
    filler.unlink()
    await holds(lambda: "[slum] dropped " in Path(log.path).read_text())


async def test_long_output_without_newlines_is_cut_and_rotated(rig: Rig) -> None:
    client = await rig.started()
    log = rig.log("c", bytes_max=100_000, keep=1)
    code = "import os\nfor _ in range(40): os.write(1, b'z' * 20000)"
    await client.spawn(python(rig, "c", code, log=log))
    await exited(client, "c")
    folder = Path(log.path).parent
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {"current", "current.1"}
    assert max(sizes.values()) <= 100_000 + 3 * (64 << 10)
    assert all(len(line) <= LINE_BYTES_MAX + 20 for line in (folder / "current.1").read_bytes().split(b"\n"))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_an_idle_keeper_does_nothing(rig: Rig) -> None:
    client = await rig.started()
    for number in range(5):
        await client.spawn(shell(rig, f"n{number}", "exec sleep 1000"))

    def switches() -> int:
        status = Path(f"/proc/{rig.pid}/status").read_text()
        return sum(int(line.split()[1]) for line in status.splitlines() if "ctxt_switches" in line)

    settled = switches()
    start = time.monotonic()
    await holds(lambda: time.monotonic() > start + 0.7)
    assert switches() - settled <= 3, sys.version
