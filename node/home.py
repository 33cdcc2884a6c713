"""Where home is, for a machine that is not the control plane's: what `slum join` leaves in the agent's folder.

node.key, node.crt and ca.crt make the machine's side of TLS; home.json says where members answer and how old the certificate
is. home.json is written last: with it a machine has joined. Must never import ssl unless TLS is wanted: an agent beside its
own control plane lives without those megabytes.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from slum.errors import ConfigError, SlumError
from slum.frozen import Sparse
from slum.node.store import Identity, write_atomically
from slum.paths import Home

if TYPE_CHECKING:
    import ssl

PORT = 7443
NAME = "slum.internal"
"""What every member's certificate is for, whatever address was dialled."""
SERVERS_MAX = 32
ELSEWHERE = "do it where the control plane is, or from anywhere: `slum context add NAME URL --token-file FILE`"
RENEW_AT = 2 / 3
"""Of a certificate's life."""


class HomeFile(Sparse):
    """home.json."""

    cluster: str
    servers: tuple[str, ...]
    """Where members answer, by their own word."""
    joined: tuple[str, ...] = ()
    """Where they answered when this machine joined: tried when none of the others does."""
    token: str = ""
    """sha256 of the token: with the same one again this machine has joined already."""
    fleet: str = ""
    not_before: float = 0.0
    not_after: float = 0.0

    @property
    def renew_at(self) -> float:
        return self.not_before + (self.not_after - self.not_before) * RENEW_AT


class Line(Sparse):
    """How the agent's line is; its own word, in the run folder."""

    pid: int
    at: float
    server: str = ""
    """The member that it is connected to, empty while it is to none."""
    why: str = ""
    """Why it is not."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of *folder*, all 0600 in a 0700 folder."""

    folder: Path

    @property
    def key(self) -> Path:
        return self.folder / "node.key"

    @property
    def certificate(self) -> Path:
        return self.folder / "node.crt"

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def home(self) -> Path:
        return self.folder / "home.json"


def files(home: Home) -> Files:
    return Files(home.agent)


def has_joined(home: Home) -> bool:
    """Tell whether this machine is a node of a control plane elsewhere."""
    return os.path.exists(files(home).home)  # False also where we may not look: that is another user's


def refuse_node(home: Home) -> None:
    """Return unless this machine is a node of a control plane elsewhere; ConfigError then: it gets none of its own."""
    said = elsewhere(home)
    if said:
        raise ConfigError(said, hint=ELSEWHERE)


def elsewhere(home: Home) -> str:
    """Return in words where this node's control plane is; "" for a machine that is no node."""
    told = read_home(home)
    if told is None:
        return ""
    return f"this machine is a node of fleet {told.fleet or told.cluster}, whose control plane is at {told.servers[0]}"


def read_home(home: Home) -> HomeFile | None:
    """Return what home.json says, None without one; SlumError when it cannot be understood."""
    path = files(home).home
    try:
        return msgspec.json.decode(path.read_bytes(), type=HomeFile)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError) as error:
        raise SlumError(f"{path} cannot be read: {error}", hint="join again: `slum join` with a new token") from error


def write_home(home: Home, told: HomeFile) -> None:
    write_atomically(files(home).home, msgspec.json.format(msgspec.json.encode(told)), sync=True)


def read_identity(home: Home) -> Identity | None:
    try:
        return msgspec.json.decode(home.identity.read_bytes(), type=Identity)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def read_line(home: Home) -> Line | None:
    """Return what the living agent says of its line; None when there is no such agent."""
    try:
        line = msgspec.json.decode((home.private / "line.json").read_bytes(), type=Line)
        os.kill(line.pid, 0)
    except (OSError, msgspec.DecodeError):
        return None
    return line


def forget_line(home: Home) -> None:
    """Take away what an agent said that is about to be replaced."""
    (home.private / "line.json").unlink(missing_ok=True)


def write_line(home: Home, *, server: str = "", why: str = "") -> None:
    line = Line(pid=os.getpid(), at=time.time(), server=server, why=why)
    write_atomically(home.private / "line.json", msgspec.json.encode(line), sync=False)


def checked_url(url: str) -> str:
    """Return *url* as https://HOST:PORT; ConfigError when it is no such thing."""
    given = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(given)
        host, port = parts.hostname, parts.port or PORT
    except ValueError:
        host, parts, port = None, urlsplit(""), 0
    if not host or parts.scheme != "https" or parts.path not in ("", "/") or parts.query or parts.username:
        raise ConfigError(f"{url!r} is no address of a control plane", hint=f"say https://HOST or https://HOST:{PORT}")
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def address_of(url: str) -> tuple[str, int]:
    """Return host and port of a checked URL."""
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or PORT


def host_name() -> str:
    """Return what this machine calls itself."""
    return os.uname().nodename


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tls(home: Home) -> ssl.SSLContext:
    """Return TLS 1.3 that trusts the fleet's authority alone and shows this machine's certificate."""
    import ssl

    of = files(home)
    context = trusting(of.authority.read_text())
    try:
        context.load_cert_chain(of.certificate, of.key)
    except (ssl.SSLError, OSError) as error:
        raise SlumError(f"{of.certificate} is of no use: {error}", hint="join again with a new token") from error
    return context


def trusting(authority: str) -> ssl.SSLContext:
    """Return TLS 1.3 that trusts *authority* (PEM) alone, and shows nothing."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authority)
    except ssl.SSLError as error:
        raise SlumError(f"the authority's certificate cannot be read: {error}") from error
    return context
