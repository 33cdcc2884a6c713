"""What the tests of the cloud operators share: prism between operator and fake, and a look for a token where none may be."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes.cloud import Killed, SimClock
from operator_runs import CLUSTER, JOIN, Held, Plane

from slum.operators.base import MachineSpec

SPECS = Path(__file__).resolve().parent / "specs"
STATUS_UNKNOWN = "Unable to match the returned status code"


def a_spec(name: str = "w-1", incarnation: int = 1, *, ports: tuple[int, ...] = ()) -> MachineSpec:
    key = f"{name}.{incarnation}"
    return MachineSpec(cluster=CLUSTER, key=key, machine=name, tenement="w", join=JOIN, ports=ports)


@contextmanager
def prism(spec: str, upstream: str, folder: Path) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Run prism between a client and *upstream*; yields its address and what it found against *spec* so far."""
    program = Path(sys.prefix) / "prism/node_modules/.bin/prism"
    if not program.exists() or shutil.which("node") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("prism is not installed: scripts/install.sh dev does it")
        pytest.skip("prism is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "prism.log"
    with log.open("wb") as out:
        argv = [
            str(program),
            "proxy",
            "--errors",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            str(SPECS / spec),
            upstream,
        ]
        process = subprocess.Popen(argv, stdout=out, stderr=out)
    try:
        end = time.monotonic() + 60
        while b"is listening" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield (
            f"http://127.0.0.1:{port}",
            lambda: re.findall(r"(?:Violation: |terminated with error: ).*", log.read_text()),
        )
    finally:
        process.terminate()
        process.wait(10)


def frames_of_ours(error: BaseException) -> str:
    """Return the traceback of *error* with all local variables of the operators' frames, causes included."""
    shown = traceback.TracebackException.from_exception(error, capture_locals=True)
    lines, pending = [str(error), repr(error)], [shown]
    while pending:
        one = pending.pop()
        lines += [
            f"{f.line} {f.locals}" for f in one.stack if "test_" not in f.filename and "_support" not in f.filename
        ]
        pending += [more for more in (one.__cause__, one.__context__) if more is not None]
    return "\n".join(lines)


async def stop_before_call(plane: Plane, clock: SimClock) -> Held:
    """Let the leader of now commit its next intent and stop there; another process leads afterwards."""
    plane.holds = 1.0
    with pytest.raises(Killed):
        await plane.round()
    plane.holds = 0.0
    clock.at += 1.0
    plane.begin()
    (held,) = plane.held
    return held


async def rounds(plane: Plane, clock: SimClock, count: int = 40) -> None:
    for _ in range(count):
        await plane.round()
        clock.at += 20.0
