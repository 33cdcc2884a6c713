"""A provider whose machines are hosts of a cluster_site.Cluster: Hetzner's fake API, and what a machine does at its first boot.

It answers on loopback inside every member's network namespace, so that a member that is cut off from the others still has
its provider, or not: ``away``. A machine that is made becomes the host of the same name and does what its user data says:
`slum join` with the token that is in it. One that is destroyed is powered off and wiped.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import uvicorn
from cluster_site import Cluster, Host
from fakes.hetzner import FakeHetzner

PORT = 8901
TOKEN = "T" * 64
BACKLOG = 64
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Provider:
    """Serves from entering until leaving; *members* are the hosts that can reach it."""

    def __init__(self, cluster: Cluster, members: Sequence[Host]) -> None:
        self.cluster = cluster
        self.fake = FakeHetzner(TOKEN)
        self.fake.on_boot = self._boot
        self.fake.on_end = self._end
        self._members = tuple(members)
        self._sockets: list[socket.socket] = []
        self._server: uvicorn.Server | None = None
        self._threads: list[threading.Thread] = []
        self._machines: dict[str, str] = {}
        """By the server's name: the host's."""

    def __enter__(self) -> Self:
        self._sockets = [listening_on(host) for host in self._members]
        self.fake.url = f"http://127.0.0.1:{PORT}"
        config = uvicorn.Config(
            self.fake, log_config=None, lifespan="off", access_log=False, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._start("provider", lambda: self._server and self._server.run(sockets=self._sockets))
        for host in self._members:
            for name, value in (("HCLOUD_TOKEN", TOKEN), ("HCLOUD_ENDPOINT", f"{self.fake.url}/v1")):
                self.cluster.slum(host, "secret", "set", name, "--operator", input=value)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.should_exit = True
        for thread in self._threads:
            thread.join(30)
        for each in self._sockets:
            each.close()

    def _boot(self, name: str, user_data: Any) -> None:
        """Called by the fake, which waits: the first boot goes on in a thread of its own."""
        urls, machine, token = what_to_join(user_data)
        host = self.cluster.host(machine)
        self._machines[name] = machine
        self._start(f"boot {machine}", lambda: self._join(host, urls, machine, token))

    def _join(self, host: Host, urls: list[str], machine: str, token: str) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            words = ["join", *urls, "--tenement", machine, "--token-file", "-", "--wait", "120"]
            ran = self.cluster.slum(host, *words, input=token, check=False, timeout=150)
            (self.cluster.base / f"boot-{machine}.log").write_text(str(ran))

    def _end(self, name: str) -> None:
        machine = self._machines.get(name)
        if machine is not None:
            host = self.cluster.hosts[machine]
            self.cluster.power_off(host)
            shutil.rmtree(host.data, ignore_errors=True)

    def _start(self, name: str, work: Any) -> None:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)


def listening_on(host: Host) -> socket.socket:
    """Return a socket that listens on *host*'s loopback; made by a thread that enters its namespace and ends there."""
    made: list[socket.socket] = []

    def enter() -> None:
        with open(f"/run/netns/{host.netns}") as netns:
            if _libc.setns(netns.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            listening = socket.create_server(("127.0.0.1", PORT), backlog=BACKLOG)
        made.append(listening)

    thread = threading.Thread(target=enter, name=f"enter {host.name}")
    thread.start()
    thread.join()
    return made[0]


def what_to_join(user_data: str) -> tuple[list[str], str, str]:
    """Return (URLs, machine, token) of slum.cloudinit's user data."""
    token = re.search(r"^ +content: (\".*\")$", user_data, re.MULTILINE)
    command = re.search(r"slum-join, (\"[^\"]*\"), (\"[^\"]*\"), (\"[^\"]*\")\]", user_data)
    if token is None or command is None:
        raise ValueError(f"this is not our user data: {user_data[:500]}")
    return json.loads(command[2]).split(), json.loads(command[3]), json.loads(token[1])


def cloud_toml(nodes: Sequence[str]) -> str:
    """Return the operator of this provider, and *nodes* as its machines; to be added to cluster_site.fleet_toml."""
    from cluster_site import hello_toml

    text = '[operators.cloud]\ntype = "hetzner"\nlocation = "fsn1"\nserver_type = "cx23"\n\n'
    for name in nodes:
        text += f'[tenement.{name}]\noperator = "cloud"\n{hello_toml(name)}\n'
    return text
