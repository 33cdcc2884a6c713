"""Which hosts an ssh operator has, how they are named, and which of them a machine gets. Pure but for KeyFile.

A host holds one machine. A machine's id names its host and itself, `ssh:203.0.113.9:22/slum-<cluster>-w-1-1`, so it is
known before the call and a late destroy meets nothing that came after it. A machine keeps its host for life; a new one
gets the first in order that is free.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from slum.errors import ConfigError, OperatorError
from slum.frozen import Frozen
from slum.model import SshHost, SshOperator
from slum.operators import naming
from slum.paths import Home

PREFIX = "ssh:"


class Address(Frozen):
    """Where a host is reached. Two with the same host and port are the same host."""

    host: str
    port: int
    user: str

    @property
    def id(self) -> str:
        """Return "203.0.113.9:22"."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.user}@{self.id}"


def address_of(host: SshHost, operator: SshOperator) -> Address:
    return Address(host=host.host.lower(), port=host.port, user=host.user or operator.user)


def parse_address(text: str, user: str = "root") -> Address:
    """Return the Address that "user@host:port", "host" or "[2001:db8::7]:22" says; ConfigError when it says none."""
    name, at, rest = text.rpartition("@")
    if rest.startswith("["):
        host, closed, port = rest[1:].partition("]")
        is_good = bool(closed) and (not port or port.startswith(":"))
        port = port.removeprefix(":")
    elif rest.count(":") > 1:
        host, port, is_good = rest, "", True
    else:
        host, colon, port = rest.partition(":")
        is_good = bool(port) or not colon
    number = int(port) if port.isdecimal() and len(port) < 6 else 22 if not port else 0
    if not is_good or not host or host.startswith("-") or not 0 < number < 65536 or bool(at) != bool(name):
        raise ConfigError(f"{text!r} is no host", hint="write host, user@host:port or user@[address]:port")
    return Address(host=host.lower(), port=number, user=name or user)


def machine_id(host: str, cluster: str, key: str) -> str:
    """Return the id of the machine *key* on the host named *host*."""
    return f"{PREFIX}{host}/{naming.name_of(cluster, key)}"


def host_in(machine: str) -> tuple[str, str] | None:
    """Return (host, name) of an id that machine_id made, None for any other."""
    host, slash, name = machine.removeprefix(PREFIX).rpartition("/")
    if not machine.startswith(PREFIX) or not slash or naming.key_in(name) is None:
        return None
    return host, name


def choose_host(hosts: Iterable[str], key: str, taken: Mapping[str, str]) -> str:
    """Return the host of the machine *key*: its own in *taken* (host by key), else the first in order that is free."""
    if key in taken:
        return taken[key]
    others = set(taken.values())
    free = next((host for host in hosts if host not in others), None)
    if free is None:
        raise OperatorError(f"no host is free for {key}", hint="add one to `hosts`, or remove a tenement")
    return free


class FreeHosts:
    """Hosts where nothing of ours was found and the ledger knows of nothing: they are not looked at each time.

    It is of one leader: the next one looks at all.
    """

    def __init__(self) -> None:
        self._fence: tuple[int, ...] = ()
        self._until: dict[tuple[str, str], float] = {}

    def is_free(self, fence: tuple[int, ...], cluster: str, host: str, now: float) -> bool:
        return fence == self._fence and now < self._until.get((cluster, host), 0.0)

    def found_free(self, fence: tuple[int, ...], cluster: str, host: str, until: float) -> None:
        if fence != self._fence:
            self._fence, self._until = fence, {}
        self._until[cluster, host] = until


class KeyBook(Protocol):
    """The host keys that were seen first and are the only ones believed since."""

    def find(self, host: str) -> str | None:
        """Return the public key ("ssh-ed25519 AAAA...") of the host with this id, or None."""
        ...

    async def pin(self, host: str, key: str) -> None:
        """Remember *key*, which is the one that find() gave, or the first; OperatorError when it must not be believed."""
        ...

    def forgetting(self, host: str) -> str:
        """Return what somebody does who knows that *host* has another key now."""
        ...


class KeyFile:
    """A KeyBook in a file that OpenSSH reads too (known_hosts). Safe against being killed at any point."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, host: str) -> str | None:
        name = _known_name(host)
        for line in self._lines():
            names, _, key = line.partition(" ")
            if name in names.split(","):
                return key
        return None

    async def pin(self, host: str, key: str) -> None:
        if self.find(host) != key:
            self._add(host, key)

    def forgetting(self, host: str) -> str:
        return f"remove its line from {self.path}"

    def _add(self, host: str, key: str) -> None:
        import fcntl

        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.path.with_suffix(".lock"), "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            standing = self.find(host)
            if standing is not None:
                if standing != key:
                    raise OperatorError(
                        f"{host}: it has shown two keys just now; nothing was sent", provider_code="host_key"
                    )
                return
            temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
            with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                file.writelines(f"{line}\n" for line in (*self._lines(), f"{_known_name(host)} {key}"))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self.path)

    def _lines(self) -> list[str]:
        try:
            return [line for line in self.path.read_text().splitlines() if line and not line.startswith("#")]
        except FileNotFoundError:
            return []


def key_file(home: Home) -> KeyFile:
    """Return the keys that were first seen from this machine."""
    return KeyFile(home.state / "ssh" / "known_hosts")


class KnownKeys:
    """A KeyBook of what the control plane knows (an empty key: forgotten), and of a file for the hosts that it does not."""

    def __init__(self, known: Mapping[str, str], own: KeyFile) -> None:
        self._known = known
        self._own = own

    def find(self, host: str) -> str | None:
        return (self._known[host] or None) if host in self._known else self._own.find(host)

    async def pin(self, host: str, key: str) -> None:
        if host not in self._known:
            await self._own.pin(host, key)

    def forgetting(self, host: str) -> str:
        return f"`slum hostkey forget {host}`" if host in self._known else self._own.forgetting(host)


def _known_name(host: str) -> str:
    """Return *host* as known_hosts files write it."""
    name, _, port = host.rpartition(":")
    name = name.strip("[]")
    return name if port == "22" else f"[{name}]:{port}"
