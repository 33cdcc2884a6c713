"""Bringing slum up on a machine and down again: the keeper, and the children that it starts by itself.

``up`` makes it true that keeper, ledger, server and agent run; a second one finds the first. ``down`` ends control plane
and agent, and with *services* everything. Synchronous and light: the command line calls these.
"""

from __future__ import annotations

import errno
import http.client
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from slum.errors import ConfigError, SlumError, Unreachable
from slum.frozen import Frozen
from slum.node.keeperclient import Child, KeeperError, call, start_detached
from slum.node.limits.detect import detect
from slum.node.types import Log, Respawn, Spawn
from slum.operators.local import Site
from slum.paths import Home

PROGRAMS: Mapping[str, str] = {
    "ledger": "slum.ledger.process",
    "server": "slum.server.process",
    "agent": "slum.node.agent",
}
"""In the order in which they are started."""
INHERITED = ("LANG", "LC_ALL", "TZ", "HOME", "VIRTUAL_ENV")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})
UP_S = 30.0
GRACE_S = 10.0
POLL_S = 0.02


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
    given = os.environ if env is None else env
    own = {name: given[name] for name in INHERITED if name in given}
    own["PATH"] = f"{Path(python).parent}:{given.get('PATH') or PATH}"
    return tuple(
        Spawn(
            name=name,
            argv=(python, "-P", "-m", module, "--data-dir", str(home.data), "--run-dir", str(home.run)),
            env={**own, "SLUM_DATA_DIR": str(home.data), "SLUM_RUN_DIR": str(home.run), "PYTHONUNBUFFERED": "1"},
            # Mounts, cgroups and other uids are the agent's work, and what it starts inherits this flag from it.
            no_new_privs=name != "agent",
            log=Log(path=str(home.own_log(name)), keep=2),
            respawn=Respawn(),
        )
        for name, module in PROGRAMS.items()
    )


def operator_site(home: Home, member: str) -> Site:
    """Return what the operators of *member* are given."""
    agent = next(spawn for spawn in boot_children(home) if spawn.name == "agent")
    return Site(home=home, member=member, agent=agent)


def write_boot(home: Home) -> tuple[Spawn, ...]:
    """Write boot.json, from which a keeper starts the programs after a reboot too, and return them; whole or not at all.

    ConfigError when the data folder is not ours to write.
    """
    children = boot_children(home)
    temporary = home.boot.with_name(f".boot.{secrets.token_hex(4)}")
    try:
        home.data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.format(msgspec.json.encode({"children": children})))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(home.boot)
    except OSError as error:
        refused = error.errno in NOT_OURS
        raise (ConfigError if refused else SlumError)(
            f"the data folder {home.data} cannot be written: {error.strerror}",
            hint="choose another with --data-dir or SLUM_DATA_DIR, or be the user it belongs to" if refused else "",
        ) from error
    return children


def check_keeper(home: Home) -> None:
    """Return when no keeper uses the run folder, or one that keeps the same data folder; ConfigError otherwise."""
    try:
        data = str(call(home, "hello").get("data") or home.data)
    except Unreachable:
        return
    if os.path.realpath(data) != os.path.realpath(home.data):
        raise ConfigError(
            f"what runs in {home.run} keeps its data in {data}, not in {home.data}; nothing was changed",
            hint=f"add --data-dir {data}, or choose another --run-dir for a control plane of its own",
        )


def up(home: Home, *, timeout_s: float = UP_S) -> UpResult:
    """Make keeper, ledger, server and agent run and return when the API answers; finds what runs. Unreachable if not."""
    check_keeper(home)
    children = write_boot(home)
    before = _children(home)
    hello = start_detached(home)
    if before is None:
        started = tuple(PROGRAMS)
    else:
        running = {child.name for child in before if child.running}
        started = tuple(spawn.name for spawn in children if spawn.name not in running and _spawn(home, spawn))
    _wait_for_api(home, time.monotonic() + timeout_s)
    return UpResult(
        keeper_started=before is None,
        started=started,
        keeper_pid=hello.pid,
        data=str(home.data),
        run=str(home.run),
    )


def down(home: Home, *, services: bool, grace_s: float = GRACE_S) -> DownResult:
    """End agent, server and ledger, then with *services* all the rest; nothing running is nothing to do."""
    stopped = _shut_down(home, {child.name for child in _children(home) or () if child.name in PROGRAMS}, grace_s)
    if services:
        stopped += _shut_down(home, {child.name for child in _children(home) or ()}, grace_s)
    left = sum(child.running for child in _children(home) or ())
    if services and not left:
        detect(home).clear()
    return DownResult(stopped=stopped, left=left)


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


def _children(home: Home) -> tuple[Child, ...] | None:
    """Return the keeper's children, also those between two lives; None without a keeper."""
    found: list[Child] = []
    while True:
        try:
            answer = call(home, "list", after=found[-1].name if found else None)
        except Unreachable:
            return None
        found += msgspec.convert(answer["children"], list[Child])
        if not answer["more"]:
            return tuple(found)


def _spawn(home: Home, spawn: Spawn) -> bool:
    """Start *spawn*; False when the keeper has it already, between two lives of its own."""
    try:
        call(home, "spawn", spawn=msgspec.to_builtins(spawn))
    except KeeperError as error:
        if error.kind == "exists":
            return False
        raise
    return True


def _wait_for_api(home: Home, end: float) -> None:
    while not is_ready(home):
        if time.monotonic() > end:
            raise Unreachable(
                f"the control plane did not come up in time; the last it said: {_last_words(home)}",
                hint=f"look at {home.own_log('ledger')} and {home.own_log('server')}; `slum doctor` checks this machine",
            )
        time.sleep(POLL_S)


def _last_words(home: Home) -> str:
    """Return the last line of the log that was written last, of ledger and server."""
    logs = [path for name in ("ledger", "server") if (path := home.own_log(name)).is_file()]
    if not logs:
        return "nothing"
    newest = max(logs, key=lambda path: path.stat().st_mtime)
    lines = newest.read_bytes()[-4096:].decode("utf-8", "replace").splitlines()
    return lines[-1] if lines else "nothing"


def _shut_down(home: Home, names: set[str], grace_s: float) -> tuple[str, ...]:
    """Let the keeper end *names* and return those that ran when they are gone; SlumError when they do not go."""
    running = _running(home, names)
    try:
        call(home, "shutdown", names=sorted(names), grace_s=grace_s)
    except Unreachable:
        return ()
    end = time.monotonic() + grace_s + 5.0
    while left := _running(home, names):
        if time.monotonic() > end:
            raise SlumError(f"these do not end: {', '.join(left[:10])}", hint="they ignore SIGKILL; see `dmesg`")
        time.sleep(POLL_S)
    return running


def _running(home: Home, names: set[str]) -> tuple[str, ...]:
    return tuple(child.name for child in _children(home) or () if child.running and child.name in names)
