"""The ways from an agent to a member: the unix socket of a control plane on this machine, or TLS to any of several.

A Door is one member's; a Way knows all doors, and in which order to try them: at random, the one that was just lost at the
end, and the addresses that this machine joined by when no other answers. It learns new ones from what members say.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from slum import log
from slum.errors import ConfigError, SlumError, Unreachable
from slum.node import home as homes
from slum.paths import Home

if TYPE_CHECKING:
    import ssl

BESIDE_S = 0.5
"""A door that has not opened by then is tried on beside the next one."""
RENEWED_S = 3600.0
"""For so long after a renewal no member is believed that the certificate has expired."""
READ_BYTES = 64 << 10
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Closable(Protocol):
    async def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Door(Protocol):
    """One member, as it can be dialled; *name* is for people."""

    @property
    def name(self) -> str: ...

    async def open(self) -> Streams:
        """Return a new connection; OSError when there is none."""
        ...


class Unix:
    """A control plane on this machine."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    async def open(self) -> Streams:
        return await asyncio.open_unix_connection(str(self._path), limit=READ_BYTES)


class Remote:
    """A member's front, which shows a certificate of the fleet's authority for slum.internal and is shown ours."""

    def __init__(self, url: str, tls: Callable[[], ssl.SSLContext]) -> None:
        self.name = url
        self._tls = tls

    async def open(self) -> Streams:
        host, port = homes.address_of(self.name)
        streams = await asyncio.open_connection(
            host, port, ssl=self._tls(), server_hostname=homes.NAME, limit=READ_BYTES, happy_eyeballs_delay=0.25
        )
        # Why our certificate is refused comes after the handshake, and a reset behind it: writing first would lose the word.
        for _ in range(2):
            await asyncio.sleep(0)
        return streams


class Way(Protocol):
    """All doors of an agent."""

    remote: bool
    current: Door | None
    """The door that the agent's line goes through."""

    def doors(self) -> tuple[tuple[Door, ...], ...]:
        """Return the doors in the order in which to try them; a later group only when nobody answers in the earlier."""
        ...

    def lost(self, door: Door) -> None:
        """Try *door* last the next time."""
        ...

    def learn(self, servers: Sequence[str]) -> None:
        """Take up where members answer, by their own word."""
        ...

    def expired(self) -> None:
        """A member says that our certificate has expired."""
        ...


class Near:
    """The way to a control plane on this machine."""

    remote = False

    def __init__(self, path: Path) -> None:
        self.current: Door | None = None
        self._door = Unix(path)

    def doors(self) -> tuple[tuple[Door, ...], ...]:
        return ((self._door,),)

    def lost(self, door: Door) -> None:
        """There is no other."""

    def learn(self, servers: Sequence[str]) -> None:
        """It stays where it is."""

    def expired(self) -> None:
        """There is no certificate."""


class Far:
    """The way to members elsewhere, from what `slum join` and members said."""

    remote = True

    def __init__(self, home: Home, told: homes.HomeFile) -> None:
        self.current: Door | None = None
        self.told = told
        self.expiry = asyncio.Event()
        """Set when a member said that the certificate has expired, whatever our clock says."""
        self._home = home
        self._context: ssl.SSLContext | None = None
        self._lost = ""
        self._trusted_until = 0.0

    def doors(self) -> tuple[tuple[Door, ...], ...]:
        known = random.sample(self.told.servers, len(self.told.servers))
        known.sort(key=lambda url: url == self._lost)
        others = [url for url in self.told.joined if url not in self.told.servers]
        return tuple(tuple(Remote(url, self._tls) for url in urls) for urls in (known, others) if urls)

    def lost(self, door: Door) -> None:
        self._lost = door.name

    def learn(self, servers: Sequence[str]) -> None:
        """Keep *servers*, on disk too; what is no address is left out, and nothing is nothing new."""
        urls = []
        for url in servers[: homes.SERVERS_MAX]:
            try:
                urls.append(homes.checked_url(url))
            except ConfigError as error:
                log.get().warning("server_not_understood", why=error.message)
        if not urls or tuple(urls) == self.told.servers:
            return
        # Read anew: a renewal may have written it meanwhile.
        self.told = msgspec.structs.replace(homes.read_home(self._home) or self.told, servers=tuple(urls))
        log.get().info("servers_learned", servers=urls)
        try:
            homes.write_home(self._home, self.told)
        except OSError as error:
            log.get().warning("servers_not_kept", why=str(error))

    def expired(self) -> None:
        """Have the certificate renewed, unless it just was: then one of the two clocks is the trouble."""
        if time.monotonic() >= self._trusted_until:
            self.expiry.set()

    def renewed(self) -> None:
        """Take up what a renewal left on the disk."""
        self.expiry.clear()
        self._trusted_until = time.monotonic() + RENEWED_S
        told = homes.read_home(self._home)
        if told is not None:
            self.told = told
        self._context = None

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            self._context = homes.tls(self._home)
        return self._context


def way_of(home: Home) -> Near | Far:
    """Return the way of this machine's agent."""
    try:
        told = homes.read_home(home)
    except SlumError as error:
        # Services are to be kept all the same.
        log.get().error("home_unreadable", why=error.message)
        told = None
    return Near(home.api_socket) if told is None else Far(home, told)


async def first_open(doors: Sequence[Door], dial: Callable[[Door], Coroutine[Any, Any, T]]) -> tuple[Door, T]:
    """Return the first of *doors* for which *dial* succeeds; the next is begun when one fails, or is slow.

    Unreachable with every door's reason when all fail. What opens too late is closed.
    """
    loop = asyncio.get_running_loop()
    waiting = list(doors)
    dialling: dict[asyncio.Task[T], Door] = {}
    whys: list[str] = []
    try:
        while waiting or dialling:
            if waiting:
                door = waiting.pop(0)
                dialling[loop.create_task(dial(door), name=f"dial {door.name}")] = door
            pause_s = BESIDE_S if waiting else None
            done, _ = await asyncio.wait(dialling, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                door = dialling.pop(task)
                try:
                    return door, task.result()
                except SlumError as error:
                    whys.append(error.message)
    finally:
        for task in dialling:
            task.cancel()
        for late in await asyncio.gather(*dialling, return_exceptions=True):
            if not isinstance(late, BaseException):
                await late.close()
    raise Unreachable("; ".join(dict.fromkeys(whys)) or "no address of a member is known")
