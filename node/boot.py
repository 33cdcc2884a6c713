"""Bringing a machine's keeper up and down: what it starts by itself, and who keeps it alive after a reboot.

A machine of its own has one such program, the agent (``up``); a control plane's has more (slum.server.boot), started by the
same means. Where systemd runs and a unit of ours is installed, the keeper is that unit; elsewhere it is detached.
Synchronous and light: the command line calls these. Must never stop a service unless asked to stop all.
"""

from __future__ import annotations

import errno
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from slum.alive import ASKED, SILENT_MS, SILENT_MS_SLOW, silent_ms
from slum.errors import ConfigError, SlumError, Unreachable
from slum.node.keeperclient import Child, Hello, KeeperError, call, start_detached
from slum.node.types import Log, Respawn, Spawn
from slum.paths import Home

AGENT = "agent"
SLOW = frozenset({"ledger", "backup"})
"""Programs that may wait long for a disk, or for a store."""
INHERITED = ("LANG", "LC_ALL", "TZ", "HOME", "VIRTUAL_ENV", "SLUM_LEDGER_OPTIONS", ASKED)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NOT_OURS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST})
GRACE_S = 10.0
POLL_S = 0.02


def program(
    home: Home, name: str, module: str, python: str = sys.executable, env: Mapping[str, str] | None = None
) -> Spawn:
    """Return one of slum's own programs as the keeper keeps it alive; its environment is a few names of *env* (ours)."""
    given = os.environ if env is None else env
    own = {name: given[name] for name in INHERITED if name in given}
    own["PATH"] = f"{Path(python).parent}:{given.get('PATH') or PATH}"
    return Spawn(
        name=name,
        argv=(python, "-P", "-m", module, "--data-dir", str(home.data), "--run-dir", str(home.run)),
        env={**own, "SLUM_DATA_DIR": str(home.data), "SLUM_RUN_DIR": str(home.run), "PYTHONUNBUFFERED": "1"},
        # Mounts, cgroups and other uids are the agent's work, and what it starts inherits this flag from it.
        no_new_privs=name != AGENT,
        log=Log(path=str(home.own_log(name)), keep=2),
        respawn=Respawn(silent_ms_max=silent_ms(SILENT_MS_SLOW if name in SLOW else SILENT_MS, given)),
    )


def agent_program(home: Home) -> Spawn:
    return program(home, AGENT, "slum.node.agent")


def write_boot(home: Home, programs: Sequence[Spawn]) -> None:
    """Write boot.json, from which a keeper starts *programs* after a reboot too; whole or not at all.

    ConfigError when the data folder is not ours to write.
    """
    temporary = home.boot.with_name(f".boot.{secrets.token_hex(4)}")
    try:
        home.data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.format(msgspec.json.encode({"children": programs})))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(home.boot)
    except OSError as error:
        refused = error.errno in NOT_OURS
        raise (ConfigError if refused else SlumError)(
            f"the data folder {home.data} cannot be written: {error.strerror}",
            hint="choose another with --data-dir or SLUM_DATA_DIR, or be the user it belongs to" if refused else "",
        ) from error


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


def start(home: Home, programs: Sequence[Spawn]) -> tuple[Hello, tuple[str, ...], bool]:
    """Make a keeper run that keeps *programs* alive; return its hello, what was started now, and if it was itself."""
    write_boot(home, programs)
    before = children(home)
    hello = start_detached(home)
    if before is None:
        return hello, tuple(spawn.name for spawn in programs), True
    running = {child.name for child in before if child.running}
    return hello, tuple(one.name for one in programs if one.name not in running and spawn(home, one)), False


def children(home: Home) -> tuple[Child, ...] | None:
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


def spawn(home: Home, wanted: Spawn) -> bool:
    """Start *wanted*; False when the keeper has it already, between two lives of its own."""
    try:
        call(home, "spawn", spawn=msgspec.to_builtins(wanted))
    except KeeperError as error:
        if error.kind == "exists":
            return False
        raise
    return True


def restart(home: Home, name: str) -> None:
    """Have the program *name* read its files anew, if it runs: the keeper starts it again."""
    try:
        call(home, "signal", name=name)
    except KeeperError as error:
        if error.kind != "missing":
            raise
    except Unreachable:
        return


def shut_down(home: Home, names: set[str], grace_s: float = GRACE_S) -> tuple[str, ...]:
    """Let the keeper end *names* and return those that ran when they are gone; SlumError when they do not go."""
    were = running(home, names)
    try:
        call(home, "shutdown", names=sorted(names), grace_s=grace_s)
    except Unreachable:
        return ()
    end = time.monotonic() + grace_s + 5.0
    while left := running(home, names):
        if time.monotonic() > end:
            raise SlumError(f"these do not end: {', '.join(left[:10])}", hint="they ignore SIGKILL; see `dmesg`")
        time.sleep(POLL_S)
    return were


def running(home: Home, names: set[str]) -> tuple[str, ...]:
    return tuple(child.name for child in children(home) or () if child.running and child.name in names)
