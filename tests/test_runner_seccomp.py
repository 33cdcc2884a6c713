"""The system call filter: built for both architectures, cached by content, and what ordinary programs still can do."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from walls_support import PYTHON, Yard, open_yard, some_uid

from slum.errors import SlumError
from slum.model import Level
from slum.node import seccomp

UID = some_uid()


@pytest.fixture
def yard() -> Iterator[Yard]:
    with open_yard() as opened:
        yield opened


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_for_each_architecture(tmp_path: Path, machine: str) -> None:
    file = tmp_path / "filter"
    seccomp.write_filter(file, machine)
    program = list(struct.iter_unpack("=HBBI", file.read_bytes()))
    assert 100 < len(program) < 400
    assert program[1][3] == seccomp.ARCHITECTURES[machine]
    assert (0x15, seccomp.ARCHITECTURES[machine]) in {(code, operand) for code, _, _, operand in program[5:]}
    assert os.listdir(tmp_path) == ["filter"]


def test_the_file_is_made_once_by_a_child(tmp_path: Path) -> None:
    file = seccomp.filter_file(tmp_path)
    inode = file.stat().st_ino
    assert seccomp.filter_file(tmp_path) == file
    assert file.stat().st_ino == inode


def test_an_unknown_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp.platform, "machine", lambda: "pdp11")
    with pytest.raises(SlumError, match="no system call filter for pdp11"):
        seccomp.filter_file(tmp_path)


def test_a_filter_that_cannot_be_written_says_why(tmp_path: Path) -> None:
    with pytest.raises(SlumError, match="cannot be built"):
        seccomp.filter_file(tmp_path / "absent")


@pytest.mark.root
def test_ordinary_programs_work_behind_it(yard: Yard) -> None:
    """Threads, processes, sockets, locks, timers, shared memory, SQLite, a random seed: nothing of daily use is denied."""
    code = """
import asyncio, ctypes, fcntl, mmap, multiprocessing, os, random, select, socket, sqlite3, subprocess, tempfile, threading

thread = threading.Thread(target=print, args=("thread",)); thread.start(); thread.join()
assert subprocess.run(["echo", "child"], check=True).returncode == 0
with multiprocessing.Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_DGRAM), (socket.AF_UNIX, socket.SOCK_DGRAM)):
    socket.socket(family, kind).close()
socket.socketpair()[0].close()
assert socket.if_nameindex()  # by netlink
assert sqlite3.connect(os.environ["HOME"] + "/db").execute("pragma journal_mode = wal").fetchone() == ("wal",)
assert len(mmap.mmap(-1, 4096)) == 4096
asyncio.run(asyncio.sleep(0))
select.epoll().close()
os.mkfifo(os.environ["HOME"] + "/fifo")
os.eventfd(0)
os.memfd_create("m")
os.sched_yield(); os.nice(1); os.getrandom(8)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.personality(0xffffffff) == 0, "asking for it is allowed"
assert libc.personality(0x0040000) == -1 and ctypes.get_errno() == 1
assert libc.unshare(0x200) == 0, "unsharing what is no namespace is allowed"
print("fine")
"""
    status, output = yard.run(Level.NAMESPACE, yard.instance("daily", (PYTHON, "-W", "ignore", "-c", code), uid=UID))
    assert status == 0, output
    assert output.splitlines()[-1] == "fine"


@pytest.mark.root
def test_refusals_by_number(yard: Yard) -> None:
    """EPERM for what is named, ENOSYS for clone3 and for what is newer than the filter."""
    code = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
for number in (435, 463, 467, 600, 425):
    ctypes.set_errno(0)
    print(number, libc.syscall(number, 0, 0, 0, 0, 0, 0), errno.errorcode[ctypes.get_errno()])
import socket
for family, kind, protocol in ((17, 3, 0), (38, 5, 0), (40, 1, 0), (16, 3, 4), (2, 3, 1), (10, 3, 58), (2, 10, 0)):
    try:
        socket.socket(family, kind, protocol)
        print("opened", family)
    except OSError as error:
        print(family, kind, errno.errorcode[error.errno])
"""
    status, output = yard.run(Level.NAMESPACE, yard.instance("numbers", (PYTHON, "-c", code), uid=UID))
    assert status == 0, output
    lines = output.splitlines()
    assert lines[:5] == ["435 -1 ENOSYS", "463 -1 ENOSYS", "467 -1 ENOSYS", "600 -1 ENOSYS", "425 -1 EPERM"]
    assert {line.split()[-1] for line in lines[5:]} == {"EPERM"}
