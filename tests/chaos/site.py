"""The cluster under test: members whose data lies on small disks of their own, tenements elsewhere, doors into it.

Everything that drives it goes through members' sockets and fronts and the command line. Leaving it ends every process and removes
every namespace, mount and folder. Root only.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster_provider import Provider, cloud_toml
from cluster_site import API_PORT, Cluster, Failed, Host, until

from slum.contexts import Contexts
from slum.node.home import NAME

CLONE_NEWNET = 0x40000000
KEYS = tuple(f"k{number}" for number in range(24))
"""Instances of a service of a drained machine: `slum restart` counts each one up, and nothing runs."""
REGISTER = "register"
"""An operator that nobody uses; its one host's name is the value of a register that whole fleets are swapped for."""
DISK_MB = 96
DISK_MB_DEFAULT = 700
SMALL = "--epoch-bytes 4194304 --ballast-bytes 8388608"
"""So that a member's disk can be small."""
DIAL_S = 4.0
_libc = ctypes.CDLL(None, use_errno=True)


class Site(Cluster):
    """*epoch_entries* None: all as it comes."""

    def __init__(self, *, epoch_entries: int | None = None, keep_logs: Path | None = None, token: str = "") -> None:
        super().__init__(token=token, keep_logs=keep_logs)
        self._options = "" if epoch_entries is None else f"{SMALL} --epoch-entries {epoch_entries}"
        self._disk_mb = DISK_MB_DEFAULT if epoch_entries is None else DISK_MB
        self._mounts: list[Path] = []
        self._user: Contexts | None = None

    def close(self) -> None:
        try:
            super().close()
        finally:
            for mount in self._mounts:
                subprocess.run(["umount", "-l", str(mount)], capture_output=True, check=False)
            if self._mounts:
                subprocess.run(["rm", "-rf", "--one-file-system", str(self.base)], check=False)

    def host(self, name: str) -> Host:
        known = name in self.hosts
        host = super().host(name)
        if not known and name.startswith("m"):
            host.data.mkdir(mode=0o711)
            options = f"size={self._disk_mb}m,mode=0711"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "chaos", str(host.data)], check=True)
            self._mounts.append(host.data)
            if self._options:
                host.env["SLUM_LEDGER_OPTIONS"] = self._options
        return host

    def begin(self, members: int) -> Provider:
        """Make the members; return the provider of the tenements' machines, to be entered before `populate`."""
        self.make(members=members)
        self.until_whole(120)
        return Provider(self, [self.hosts[name] for name in self.members])

    def populate(self, tenements: int) -> None:
        """Apply a fleet of *tenements* elsewhere, a register, and counters on a machine that is drained."""
        first = self.hosts["m1"]
        nodes = [f"t{number}" for number in range(1, tenements + 1)]
        toml = self.base / "slum.toml"
        head = f'[fleet]\nname = "chaos"\n\n[operators.m1]\ntype = "local"\nmember = "m1"\n\n[operators.{REGISTER}]\ntype = "ssh"\n'
        head += 'hosts = ["nobody"]\n\n[tenement.m1]\noperator = "m1"\n\n'
        rest = cloud_toml(nodes) if nodes else ""
        toml.write_text(head + rest)
        self.slum(first, "apply", str(toml), "--yes", timeout=180)
        self.slum(first, "drain", "m1", timeout=60)
        counters = '[tenement.m1.service.counters]\ncommand = ["true"]\nlisten = "none"\nisolation = "process"\n'
        toml.write_text(f"{head}{counters}\n[tenement.m1.instances]\ncounters = {json.dumps(list(KEYS))}\n\n{rest}")
        self.slum(first, "apply", str(toml), "--yes", timeout=180)

    # --- doors --------------------------------------------------------------------------------------------------------
    def ask(self, host: Host, path: str, *, timeout_s: float = 10.0) -> Any:
        """Return the document at *path* of *host*'s API; Failed for anything else."""
        with contextlib.closing(Line(lambda: at_socket(host, timeout_s))) as line:
            answer = line.ask("GET", path)
        if answer.status != 200:
            raise Failed(f"{host.name} {path}: {answer.status} {answer.text[:300]}")
        return answer.document

    def whole(self) -> str:
        """Return "" when all members see one leader and each other, also through their fronts; else what is missing."""
        views = {}
        for name in self.members:
            try:
                views[name] = self.ask(self.hosts[name], "/v1/cluster", timeout_s=5.0)
            except (OSError, http.client.HTTPException, AssertionError) as error:
                return f"{name}: {error}"
        if len({(view["leader"], view["epoch"]) for view in views.values()}) != 1 or None in {
            view["leader"] for view in views.values()
        }:
            return str({name: (view["leader"], view["epoch"]) for name, view in views.items()})
        for name, view in views.items():
            rows = {row["id"]: row["role"] for row in view["members"]}
            if set(rows) != set(self.members) or not set(rows.values()) <= {"leader", "follower"}:
                return f"{name} sees {rows}"
            deaf = [row["id"] for row in view["members"] if not row["followed"]]
            if deaf:
                return f"{name} does not follow the agents of {deaf}"
        return ""

    def until_whole(self, seconds: float) -> None:
        said = [""]

        def is_whole() -> bool:
            said[0] = self.whole()
            return not said[0]

        try:
            until(is_whole, seconds, "a whole cluster")
        except Failed:
            raise Failed(f"not whole within {seconds:g} s: {said[0]}") from None

    def leads(self) -> Host | None:
        """Return who says that it leads and reaches a majority, None when nobody does at this moment."""
        for name in self.members:
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                view = self.ask(self.hosts[name], "/v1/cluster", timeout_s=2.0)
                if view["role"] == "leader" and view["majority"]:
                    return self.hosts[name]
        return None

    def front(self, host: Host) -> Callable[[], socket.socket]:
        """Return how to dial *host*'s front as an administrator; to be called in a namespace that reaches it."""
        if self._user is None:
            token = self.token_of(self.hosts["m1"], "user", "chaos", "--role", "admin")
            made = Contexts(self.base / "contexts")
            at = self.hosts["m1"]
            with_netns(at, lambda: made.add("chaos", [at.api], token, wait_s=60, say=lambda _: None))
            self._user = made
        tls = self._user.tls(self._user.load("chaos"))
        return lambda: _at_front(host, tls)


def remove_left(token: str) -> None:
    """Remove what a run named *token* has left that was killed itself: processes, namespaces, mounts, folders."""
    left = Site(token=token)
    for netns in sorted(Path("/run/netns").glob(f"sl{token}-*")):
        name = netns.name.partition("-")[2]
        if name != "hub":
            host = Host(name, netns.name, "", left.base / name, Path(f"/tmp/c{token}{name}"))
            left.hosts[name] = host
            left.power_off(host)
            left._mounts.append(host.data)
    left.close()


@dataclass(frozen=True)
class Answer:
    status: int
    text: str

    @property
    def document(self) -> Any:
        return json.loads(self.text)


class Line(http.client.HTTPConnection):
    """HTTP over whatever *dial* connects to."""

    def __init__(self, dial: Callable[[], socket.socket]) -> None:
        super().__init__("slum")
        self._dial = dial

    def connect(self) -> None:
        self.sock = self._dial()

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """Send, and return the answer; whatever fails leaves a line that dials anew."""
        try:
            self.request(method, path, body, dict(headers or {}))
            got = self.getresponse()
            return Answer(got.status, got.read().decode())
        except BaseException:
            self.close()
            raise


def at_socket(host: Host, timeout_s: float) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.settimeout(timeout_s)
    try:
        made.connect(str(host.api_socket))
    except OSError:
        made.close()
        raise
    return made


def _at_front(host: Host, tls: ssl.SSLContext, timeout_s: float = 8.0) -> socket.socket:
    plain = socket.create_connection((host.address, API_PORT), DIAL_S)
    try:
        made = tls.wrap_socket(plain, server_hostname=NAME)
    except BaseException:
        plain.close()
        raise
    made.settimeout(timeout_s)
    return made


def enter_netns(host: Host) -> None:
    """Move this thread, for as long as it lives, into *host*'s network."""
    with open(f"/run/netns/{host.netns}") as netns:
        if _libc.setns(netns.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def with_netns(host: Host, work: Callable[[], Any]) -> None:
    """Do *work* in *host*'s network, in a thread of its own, and raise what it raised."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            enter_netns(host)
            work()
        except BaseException as error:  # noqa: BLE001  raised below, in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, name=f"in {host.name}")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
