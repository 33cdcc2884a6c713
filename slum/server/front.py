"""The front: Caddy, which ends TLS for the API and says on a unix socket who asks, and its process under the keeper.

It takes TLS 1.3 only, asks for a client certificate and lets nobody on who shows one that another authority signed or that
is out of date; who shows none may still join and renew. It runs as a uid of its own, not the router's: services decide
where that one's requests go, and this one's socket is believed. Of what a client says in X-Slum-* nothing passes.
Restarting it (a renewed certificate, other addresses) keeps connections waiting, for the keeper holds the listeners.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slum import log
from slum.alive import silent_ms
from slum.errors import ConfigError, SlumError
from slum.frozen import Frozen
from slum.node import caddywatch
from slum.node.caddyconfig import Json
from slum.node.keeperclient import KeeperClient, KeeperError
from slum.node.router import end, find_caddy, reachable, write_config
from slum.node.types import Log, OpenFile, Respawn, Spawn
from slum.node.uids import FRONT_UID
from slum.paths import Home
from slum.pki.authority import SERVER_NAME
from slum.server import cluster, trust
from slum.server.listening import listen_at
from slum.server.peer import ADDRESS_HEADER, SERIAL_HEADER, URI_HEADER

if TYPE_CHECKING:
    from slum.server.control import Control

NAME = "front"
PORT = 7443
EVERYWHERE = (f"0.0.0.0:{PORT}", f"[::]:{PORT}")
FIRST_FD = 3
BACKLOG = 1024
START_S = 15.0
LOOK_S = 20.0
AGAIN_S = 1.0
BODY_MB_MAX = 300
RESTARTING = {
    "code": "no_quorum",
    "message": "this member's server does not answer",
    "hint": "it is restarted by itself; another member answers meanwhile",
}


class Settings(Frozen):
    """front.json: what makes a machine have a front."""

    listen: tuple[str, ...]


def listener(home: Home) -> socket.socket:
    """Return the socket that the front passes requests on to, in a folder that only its uid may enter."""
    root = os.geteuid() == 0
    home.front_run.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root:
        os.chown(home.front_run, 0, FRONT_UID)
        home.front_run.chmod(0o710)
    return listen_at(home.front_socket, BACKLOG, gid=FRONT_UID if root else None)


async def ensure(keeper: KeeperClient, home: Home, listen: Sequence[str] | None = None) -> tuple[str, ...]:
    """Make the front run and answer at *listen* (as before by default); return the addresses. May be repeated at will.

    Needs the certificate that trust.certify makes. ConfigError when an address is taken, SlumError when Caddy does not start.
    """
    _make_folders(home)
    async with _alone(home):
        settings = Settings(listen=tuple(listen)) if listen is not None else read_settings(home)
        if settings is None:
            raise ConfigError("this machine has no front", hint="`slum server init` makes it")
        addresses = await _listen(keeper, settings.listen)
        if listen is not None:
            trust.write(_settings_file(home), msgspec.json.encode(settings))
        await _ensure(keeper, home, addresses)
    return addresses


async def _ensure(keeper: KeeperClient, home: Home, addresses: tuple[str, ...]) -> None:
    config = front_config(home, len(addresses), home.authority_certificate.read_text())
    spawn = front_spawn(home, addresses, config)
    page = (await keeper.call("list", after=_BEFORE))["children"]
    running = next((child for child in page if child["name"] == NAME and child["state"] == "running"), None)
    if running is None or running["meta"].get("made_of") != spawn.meta["made_of"]:
        await end(keeper, NAME)
        _copy(home)
        write_config(home.front / "caddy.json", config, FRONT_UID)
        await keeper.spawn(spawn)
        await _answering(home, addresses[0])
        log.get().info("front_started", listen=addresses)
    for listening in await keeper.listeners():
        if listening.name.startswith(f"{NAME}/") and listening.name not in spawn.listeners:
            await keeper.close_listener(listening.name)


async def close(keeper: KeeperClient, home: Home) -> None:
    """Make this machine one without a front, for a member that has left; nothing to close is fine."""
    _make_folders(home)
    async with _alone(home):
        for path in (_settings_file(home), home.front_certificate, home.front_key, *_copies(home)):
            path.unlink(missing_ok=True)
        await end(keeper, NAME)
        for listening in await keeper.listeners():
            if listening.name.startswith(f"{NAME}/"):
                await keeper.close_listener(listening.name)


async def keep(control: Control) -> None:
    """Keep the front running and its certificate fresh, where there is to be one, until cancelled."""
    last = ""
    while True:
        why = ""
        # A front runs before anything can be committed: what is committed is read through it, and members find each other.
        for step in (_certified, _running, _sealed) if _settings_file(control.home).exists() else ():
            try:
                await step(control)
            except (SlumError, KeeperError, OSError) as error:
                why = why or f"{type(error).__name__}: {error}"
        if why and why != last:
            log.get().warning("front_not_kept", why=why)
        last = why
        await asyncio.sleep(AGAIN_S if why else LOOK_S)


async def watch(home: Home) -> None:
    """End a front that hangs, where there is to be one, until cancelled."""

    async def ask(seconds: float) -> None:
        # Whoever says no, or hangs up, does not hang; what is wrong with the settings is for keep() to say.
        with contextlib.suppress(ssl.SSLError, ConnectionError, ConfigError):
            settings = read_settings(home)
            if settings is not None:
                await answer(settings.listen[0], seconds)

    await caddywatch.watch(home, NAME, _settings_file(home).exists, ask, silent_ms() / 1000)


async def _certified(control: Control) -> None:
    """Renew by the members' time, not by a clock that may be wrong: what that would make, nobody else would accept."""
    now = await cluster.time_of_members(control)
    if now is None and control.home.front_certificate.exists():
        return
    await trust.certify(control.link, control.view.reader, control.home, control.me, now=now or time.time())


async def _running(control: Control) -> None:
    keeper = await KeeperClient.connect(control.home)
    try:
        await ensure(keeper, control.home)
    finally:
        await keeper.close()


async def _sealed(control: Control) -> None:
    """Where this member leads: see to it that every member can open the authority's key."""
    if (await control.link.leader()).is_self:
        await trust.seal_to(control.link, control.view.reader, control.home, actor=f"slum@{control.me}")


def read_settings(home: Home) -> Settings | None:
    """Return how this machine's front is to be; None where there is none."""
    try:
        return msgspec.json.decode(_settings_file(home).read_bytes(), type=Settings)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{_settings_file(home)} cannot be read: {error}", hint="`slum server init` again") from error


def front_config(home: Home, listeners: int, authority: str) -> Json:
    """Return Caddy's configuration for so many inherited listeners; pure."""
    der = base64.b64encode(ssl.PEM_cert_to_DER_cert(authority)).decode()
    certificate, key = (str(path) for path in _copies(home))
    server = {
        "listen": [f"fd/{number}" for number in range(FIRST_FD, FIRST_FD + listeners)],
        "protocols": ["h1", "h2"],
        "automatic_https": {"disable": True},
        "read_header_timeout": "10s",
        "idle_timeout": "5m",
        "max_header_bytes": 65536,
        # Clients call it slum.internal whatever address they dialled.
        "strict_sni_host": False,
        "tls_connection_policies": [
            {
                "protocol_min": "tls1.3",
                "fallback_sni": SERVER_NAME,
                "default_sni": SERVER_NAME,
                "client_authentication": {
                    "mode": "verify_if_given",
                    "ca": {"provider": "inline", "trusted_ca_certs": [der]},
                },
            }
        ],
        "routes": [{"handle": [_forget_claims(), _limit(), _proxy(home)]}],
        "errors": {"routes": [{"handle": [_away()]}]},
    }
    return {
        "admin": {"disabled": True, "config": {"persist": False}},
        "logging": {"logs": {"default": {"level": "WARN", "exclude": ["http.log.access", "http.log.error"]}}},
        "apps": {
            "http": {"servers": {NAME: server}},
            "tls": {"certificates": {"load_files": [{"certificate": certificate, "key": key}]}},
        },
    }


def _forget_claims() -> Json:
    """Of its own handler: within one, Caddy deletes after it sets."""
    return {"handler": "headers", "request": {"delete": ["X-Slum-*"]}}


def _limit() -> Json:
    return {"handler": "request_body", "max_size": BODY_MB_MAX << 20}


def _proxy(home: Home) -> Json:
    says = {
        URI_HEADER: ["{http.request.tls.client.san.uris.0}"],
        SERIAL_HEADER: ["{http.request.tls.client.serial}"],
        ADDRESS_HEADER: ["{http.request.remote.host}"],
    }
    return {
        "handler": "reverse_proxy",
        "upstreams": [{"dial": f"unix/{home.front_socket}"}],
        "transport": {"protocol": "http", "compression": False},
        "load_balancing": {"try_duration": "2s", "try_interval": "50ms"},
        "flush_interval": -1,
        "headers": {"request": {"set": says}},
    }


def _away() -> Json:
    return {
        "handler": "static_response",
        "status_code": 503,
        "headers": {"Content-Type": ["application/json"], "Retry-After": ["1"]},
        "body": msgspec.json.encode({"error": RESTARTING}).decode(),
    }


def front_spawn(home: Home, addresses: Sequence[str], config: Json) -> Spawn:
    """Return the child "front"; its meta tells what it was made of, the certificate included."""
    root = os.geteuid() == 0
    caddy = find_caddy().resolve()
    argv: tuple[str, ...] = (str(caddy), "run", "--config", str(home.front / "caddy.json"))
    files: tuple[OpenFile, ...] = ()
    if root and not reachable(caddy):
        fd = FIRST_FD + len(addresses)
        argv, files = (f"/proc/self/fd/{fd}", *argv[1:]), (OpenFile(path=str(caddy), fd=fd),)
    listeners = tuple(_listener_name(address) for address in addresses)
    storage = str(home.front / "caddy")
    env = {"HOME": storage, "XDG_DATA_HOME": storage, "XDG_CONFIG_HOME": storage}
    certificate = home.front_certificate.read_bytes()
    facts = (argv, listeners, env, caddy.stat().st_mtime_ns, config, certificate)
    return Spawn(
        name=NAME,
        argv=argv,
        env=env,
        uid=FRONT_UID if root else None,
        gid=FRONT_UID if root else None,
        umask=0o077,
        listeners=listeners,
        listen_env=False,
        open_files=files,
        log=Log(path=str(home.own_log(NAME)), keep=2),
        respawn=Respawn(),
        meta={"made_of": hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]},
    )


@asynccontextmanager
async def _alone(home: Home) -> AsyncIterator[None]:
    """Keep the server and a command from doing it at the same time."""
    descriptor = os.open(home.front / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_folders(home: Home) -> None:
    root = os.geteuid() == 0
    for folder, owner, mode in ((home.front, 0, 0o710), (home.front / "caddy", FRONT_UID, 0o700)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root:
            os.chown(folder, owner, FRONT_UID)
            folder.chmod(mode)


def _copy(home: Home) -> None:
    """Put what the front shows where its uid can read it."""
    for source, target in zip((home.front_certificate, home.front_key), _copies(home), strict=True):
        trust.write(target, source.read_bytes())
        if os.geteuid() == 0:
            os.chown(target, 0, FRONT_UID)
            target.chmod(0o640)


def _copies(home: Home) -> tuple[Path, Path]:
    return home.front / "front.crt", home.front / "front.key"


def _settings_file(home: Home) -> Path:
    return home.front / "front.json"


async def _listen(keeper: KeeperClient, listen: Sequence[str]) -> tuple[str, ...]:
    bound = []
    for address in listen:
        try:
            await keeper.listen(_listener_name(address), tcp=address, backlog=BACKLOG)
        except KeeperError as error:
            if address.startswith("[") and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(listen) > 1:
                continue
            raise ConfigError(
                f"the API cannot listen on {address}: {error}", hint="choose another with --listen or --api-port"
            ) from error
        bound.append(address)
    return tuple(bound)


def _listener_name(address: str) -> str:
    return f"{NAME}/{address.replace(':', '_').replace('[', '').replace(']', '')}"


async def _answering(home: Home, address: str) -> None:
    """Return once TLS is spoken at *address* (a connection waits in the queue until then); SlumError after START_S."""
    try:
        await answer(address, START_S)
    except OSError as error:
        raise SlumError(
            f"the front does not start: {str(error) or f'no answer in {START_S:.0f} s'}",
            hint=f"its log is {home.own_log(NAME)}",
        ) from error


async def answer(address: str, timeout_s: float) -> None:
    """Return once TLS is spoken at *address*, whoever by; TimeoutError after *timeout_s*, another OSError when it is not."""
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    # It has to answer, not to be believed: one whose certificate has expired does not hang.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with asyncio.timeout(timeout_s):
        _, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=SERVER_NAME)
        writer.close()
        await writer.wait_closed()


_BEFORE = "fronst"
"""The keeper lists by name: what comes right after this."""
