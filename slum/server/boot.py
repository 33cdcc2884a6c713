"""Bringing slum up on a machine and down again: the keeper, and the children that it starts by itself.

``up`` makes it true that keeper, ledger, server and agent run; a second one finds the first. ``down`` ends control plane
and agent, and with *services* everything. Synchronous and light: the command line calls these.
"""

from __future__ import annotations

import http.client
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from slum.errors import Unreachable
from slum.frozen import Frozen
from slum.ledger.refusal import MARK
from slum.node import boot, service
from slum.node.boot import GRACE_S, POLL_S
from slum.node.keeperclient import call
from slum.node.limits.detect import detect
from slum.node.types import Spawn
from slum.operators.local import Site
from slum.paths import Home

PROGRAMS: Mapping[str, str] = {
    "ledger": "slum.ledger.process",
    "server": "slum.server.process",
    "agent": "slum.node.agent",
}
"""In the order in which they are started."""
FRONT = "front"
"""The server starts it: see slum.server.front."""
BACKUP = {"backup": "slum.backup.process"}
"""Started where there is a server.toml, which may ask for it."""
UP_S = 30.0
ENDS = 3
"""After so many for one reason the ledger is not waited for any more."""
LAST_BYTES = 16 << 10


class UpResult(Frozen):
    """True when something was started."""

    keeper_started: bool
    """False when the keeper ran already."""
    started: tuple[str, ...]
    """The programs that this call started (a keeper that it started starts all)."""
    keeper_pid: int
    data: str
    run: str

    def __bool__(self) -> bool:
        return bool(self.started)


class DownResult(Frozen):
    """True when something was stopped."""

    stopped: tuple[str, ...]
    """Names of the children that were ended; empty when nothing ran."""
    left: int
    """How many children go on: services, builds, the router."""

    def __bool__(self) -> bool:
        return bool(self.stopped)


def boot_children(home: Home, python: str = sys.executable, env: Mapping[str, str] | None = None) -> tuple[Spawn, ...]:
    """Return the programs that the keeper keeps alive; their environment is a few names of *env* (default: ours)."""
    programs = {**PROGRAMS, **(BACKUP if home.server_config.exists() else {})}
    return tuple(boot.program(home, name, module, python, env) for name, module in programs.items())


def operator_site(home: Home, member: str) -> Site:
    """Return what the operators of *member* are given, without what a leader knows."""
    agent = next(spawn for spawn in boot_children(home) if spawn.name == "agent")
    return Site(home=home, member=member, agent=agent)


def write_boot(home: Home) -> tuple[Spawn, ...]:
    """Write boot.json, from which a keeper starts the programs after a reboot too, and return them."""
    children = boot_children(home)
    boot.write_boot(home, children)
    return children


def up(home: Home, *, timeout_s: float = UP_S, wait: bool = True) -> UpResult:
    """Make keeper, ledger, server and agent run and return when the API answers; finds what runs. Unreachable if not.

    By its systemd unit where one is installed, which is this slum's from then on. Without *wait* return at once. The front of a member is the server's to start, and ends with ``down``.
    """
    new = boot.children(home) is None
    done = service.start(home, boot_children(home), installing=False)
    if wait:
        wait_for_api(home, timeout_s)
    return UpResult(
        keeper_started=new,
        started=done.started,
        keeper_pid=int(call(home, "hello")["pid"]),
        data=str(home.data),
        run=str(home.run),
    )


def shut_down_servers(home: Home, grace_s: float = GRACE_S) -> tuple[str, ...]:
    """End ledger and server, to be started again with another identity; services and agent go on."""
    return boot.shut_down(home, {"ledger", "server"}, grace_s)


def down(home: Home, *, services: bool, grace_s: float = GRACE_S) -> DownResult:
    """End agent, front, server and ledger, then with *services* all the rest; nothing running is nothing to do."""
    stopped = boot.shut_down(
        home, {child.name for child in boot.children(home) or () if child.name in (*PROGRAMS, *BACKUP, FRONT)}, grace_s
    )
    _close_front(home)
    if services:
        stopped += boot.shut_down(home, {child.name for child in boot.children(home) or ()}, grace_s)
    left = sum(child.running for child in boot.children(home) or ())
    if services and not left:
        detect(home).clear()
    return DownResult(stopped=stopped, left=left)


def _close_front(home: Home) -> None:
    """Let the keeper, which may live on with the services, take no connections that nobody would answer."""
    try:
        for held in call(home, "listeners")["listeners"]:
            if held["name"].startswith(f"{FRONT}/"):
                call(home, "close", name=held["name"])
    except Unreachable:
        return  # a keeper without children has ended, and its listeners with it


def is_ready(home: Home, timeout_s: float = 2.0) -> bool:
    """Tell whether the API answers and its ledger is there."""
    connection = _Connection(str(home.api_socket), timeout_s)
    try:
        connection.request("GET", "/v1/health")
        body = connection.getresponse().read()
        return bool(msgspec.json.decode(body, type=dict[str, bool]).get("ledger"))
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return False
    finally:
        connection.close()


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("slum", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def wait_for_api(home: Home, timeout_s: float = UP_S) -> None:
    """Return when the API answers; Unreachable, with the last that was logged, when it does not in time.

    The Refusal of a member that must not serve any more is raised at once, and a ledger that ends again and again for one
    reason is not waited for.
    """
    end = time.monotonic() + timeout_s
    log = home.own_log("ledger")
    since = log.stat().st_size if log.is_file() else 0
    while not is_ready(home):
        if (home.state / MARK).exists():
            from slum.ledger import fence  # only then: it brings the engine with it

            fence.check(home.state)
        ends = _ends(log, since)
        if len(ends) >= ENDS and len(set(ends[-ENDS:])) == 1:
            raise Unreachable(f"the ledger ends again and again: {ends[-1][0]}", hint=ends[-1][1])
        if time.monotonic() > end:
            words, hint = _last_words(home)
            raise Unreachable(
                f"the control plane did not come up in time; the last it said: {words}",
                hint=hint
                or f"look at {home.own_log('ledger')} and {home.own_log('server')}; `slum doctor` checks this machine",
            )
        time.sleep(POLL_S)


def _last_words(home: Home) -> tuple[str, str]:
    """Return what ledger and server said last, and what to do next: an error if one of them ended with it, else the newest line."""
    logs = [path for name in ("ledger", "server") if (path := home.own_log(name)).is_file()]
    logs.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    last = [line for path in logs for line in _lines(path, max(0, path.stat().st_size - LAST_BYTES))[-1:]]
    for line in last:
        error = _error(line)
        if error is not None:
            return error
    return (last[0] if last else "nothing"), ""


def _ends(log: Path, since: int) -> list[tuple[str, str]]:
    """Return the errors with which the ledger has ended, and what to do next, in what *log* has beyond *since*."""
    if not log.is_file() or log.stat().st_size <= since:
        return []
    found = (_error(line) for line in _lines(log, since))
    return [error for error in found if error is not None]


def _error(line: str) -> tuple[str, str] | None:
    """Return the error that *line* of a log tells of, and what to do next."""
    try:
        said = msgspec.json.decode(line.partition(" ")[2], type=dict[str, object])
    except msgspec.DecodeError:
        return None
    return (str(said["error"]), str(said.get("hint", ""))) if "error" in said else None


def _lines(path: Path, at: int) -> list[str]:
    with path.open("rb") as file:
        file.seek(at)
        return file.read(LAST_BYTES).decode("utf-8", "replace").splitlines()
