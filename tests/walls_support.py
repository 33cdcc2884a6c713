"""A yard to try walls in: a slum's folders, instances with folders of their own, and the keeper's own way to start them."""

from __future__ import annotations

import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slum.model import Key, Level, Service
from slum.node.keeper_child import GO, Heritage, check_spawn, launch
from slum.node.limits.groups import Limits
from slum.node.runners.registry import runners
from slum.node.sockets import make_data_folder, make_run_folder
from slum.node.types import Instance, Spawn
from slum.node.uids import ROUTER_UID
from slum.paths import Home

PYTHON = "/usr/bin/python3"
DEADLINE_S = 20.0


def some_uid() -> int:
    """A uid that services may have and hardly any does: tests signal all processes of theirs."""
    return 230_000 + secrets.randbelow(35_000)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = DEADLINE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        select.select([], [], [], 0.005)


@dataclass
class Running:
    """A started child, its output so far, and its end."""

    pid: int
    output_fd: int
    output: bytes = b""
    status: int | None = None

    def read_until(self, wanted: bytes) -> bytes:
        deadline = time.monotonic() + DEADLINE_S
        while wanted not in self.output:
            ready, _, _ = select.select([self.output_fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {wanted!r} in {self.output!r}"
            piece = os.read(self.output_fd, 65536)
            assert piece, f"ended without {wanted!r}: {self.output!r}"
            self.output += piece
        return self.output

    def wait(self) -> int:
        """Read to the end of the output, reap, return the status (negative is a signal)."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            ready, _, _ = select.select([self.output_fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"still running: {self.output!r}"
            piece = os.read(self.output_fd, 65536)
            if not piece:
                break
            self.output += piece
        return self.reap()

    def reap(self) -> int:
        """Wait for the child alone: others may still hold its output."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.output_fd)
        self.status = os.waitstatus_to_exitcode(status)
        return self.status


def start(spawn: Spawn, listeners: Mapping[str, socket.socket] | None = None) -> Running:
    """Start *spawn* as the keeper does, but with its output in a pipe."""
    raw = check_spawn(json.loads(msgspec.json.encode(spawn)))
    read_end, write_end = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    held = [(listeners or {})[name].fileno() for name in spawn.listeners]
    stdio = (null, write_end, write_end)
    pid, report = launch(raw, listeners=held, stdio=stdio, fifo=None, heritage=Heritage())
    os.close(write_end)
    os.close(null)
    with report:
        report.setblocking(True)
        report.settimeout(DEADLINE_S)
        report.send(GO)
        failure = report.recv(65536)
    if failure:
        os.close(read_end)
        os.waitpid(pid, 0)
        raise OSError(json.loads(failure)["errno"], json.loads(failure)["error"])
    return Running(pid=pid, output_fd=read_end)


class Yard:
    """One slum's folders, with the modes that slum gives them, and whatever was started there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = Home(data=root / "d", run=root / "r")
        for folder in (self.home.data, self.home.run, self.home.bundles):
            folder.mkdir(mode=0o711)
        for folder in (self.home.private, self.home.state, self.home.agent, self.home.logs):
            folder.mkdir(mode=0o700)
        self.runners = runners(self.home)
        self.started: list[Running] = []

    def instance(
        self,
        service: str,
        command: tuple[str, ...],
        *,
        uid: int | None = None,
        id: str = "main",
        files: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        **more: object,
    ) -> Instance:
        """Return an instance with all its folders made; *files* are its bundle's, which is also its workdir."""
        key = Key(tenement="here", service=service, id=id)
        bundle = self.home.bundles / f"{service}-{id}"
        bundle.mkdir(exist_ok=True)
        for name, text in (files or {}).items():
            (bundle / name).write_text(text)
        data, run = self.home.services / service / id, self.home.instance_run(str(key))
        self.home.services.mkdir(mode=0o711, exist_ok=True)
        make_data_folder(data, uid=uid, gid=uid)
        make_run_folder(run, uid=uid, router_gid=ROUTER_UID)
        if uid is not None:
            os.chown(bundle, 0, uid)
            bundle.chmod(0o750)
        made = Instance(
            key=key,
            service=Service(name=service, command=command),
            release="0" * 64,
            generation=1,
            name=f"i/{run.name}/1",
            command=command,
            env={"PATH": "/usr/bin:/bin", "HOME": str(data), **(env or {})},
            uid=uid,
            gid=uid,
            bundle=bundle,
            data=data,
            run=run,
            workdir=bundle,
            log=self.home.instance_log(service, id),
        )
        return msgspec.structs.replace(made, **more)

    def start(self, level: Level, instance: Instance, listeners: Mapping[str, socket.socket] | None = None) -> Running:
        running = start(self.runners[level].spawn(instance), listeners)
        self.started.append(running)
        return running

    def run(self, level: Level, instance: Instance) -> tuple[int, str]:
        """Run to the end; return status and output."""
        running = self.start(level, instance)
        return running.wait(), running.output.decode()


@contextmanager
def open_yard() -> Iterator[Yard]:
    root = Path(f"/tmp/sy{secrets.token_hex(4)}")
    root.mkdir(mode=0o711)
    yard = Yard(root)
    try:
        yield yard
    finally:
        for running in yard.started:
            if running.status is None:
                kill_tree(running.pid)
                os.waitpid(running.pid, 0)
                os.close(running.output_fd)
        shutil.rmtree(root)


def descendants(pid: int) -> list[int]:
    """The chain of first children below *pid*, itself first."""
    chain = [pid]
    while True:
        children = Path(f"/proc/{chain[-1]}/task/{chain[-1]}/children")
        below = children.read_text().split() if children.exists() else []
        if not below:
            return chain
        chain.append(int(below[0]))


def kill_tree(pid: int) -> None:
    for each in reversed(descendants(pid)):
        if Path(f"/proc/{each}").exists():
            subprocess.run(["kill", "-KILL", str(each)], check=False, capture_output=True)


@contextmanager
def open_limits(home: Home) -> Iterator[Limits]:
    """What detect finds for *home*; every group is killed and removed at the end."""
    from slum.node.limits.detect import detect

    limits = detect(home)
    try:
        yield limits
    finally:
        for name in limits.list():
            limits.kill(name)
        wait_until(limits.clear, "all groups are empty")
