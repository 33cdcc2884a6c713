"""How a client reaches a control plane: the unix socket of this machine, or TLS to any member of one elsewhere.

Inputs are a Home, or a Context with its Contexts. A Reach opens connections and explains why there is none; when to try again
is the client's. Elsewhere every connection is verified as slum.internal by the fleet's own authority, whatever the address.
"""

from __future__ import annotations

import socket
import ssl
import time
from typing import TYPE_CHECKING, Protocol

import httpx
import msgspec

from slum.errors import ConfigError, SlumError, Unreachable
from slum.node.home import ELSEWHERE, NAME, address_of, elsewhere
from slum.paths import Home

if TYPE_CHECKING:
    from slum.contexts import Context, Contexts

DEADLINE_S = 15.0
"""How long a control plane that restarts is waited for."""
KEEPER_S = 2.0
RESTART_S = 10.0
RESTART_AFTER_END_S = 1.0
CONNECT_S = 3.0
"""To one member elsewhere, before the next one is tried."""
ELSEWHERE_S = 5.0
_BEFORE_SERVER = "serveq"
"""The keeper lists by name: what comes right after this."""


class Link(Protocol):
    """A connected socket, plain or TLS: as much of socket.socket as the terminal needs."""

    def fileno(self) -> int: ...
    def recv(self, size: int, /) -> bytes: ...
    def send(self, data: bytes | bytearray, /) -> int: ...
    def sendall(self, data: bytes | bytearray, /) -> None: ...
    def setblocking(self, flag: bool, /) -> None: ...
    def close(self) -> None: ...


class Reach(Protocol):
    where: str
    """For people."""
    is_here: bool
    members: int
    """How many addresses there are to try."""

    def transport(self) -> httpx.BaseTransport: ...

    def check(self) -> None:
        """Raise Unreachable when we are not permitted to ask."""
        ...

    def knock(self) -> None:
        """Raise httpx.ConnectError when it is known at once that nobody listens."""
        ...

    def next(self) -> None:
        """Try another address from now on."""
        ...

    def patience_s(self) -> float:
        """Return how long one that has never answered is worth waiting for."""
        ...

    def lost(self, error: httpx.TransportError, answered: bool) -> SlumError:
        """Return the error that says why nobody answers; *answered*: somebody did before."""
        ...

    def dial(self, timeout_s: float) -> Link:
        """Return a connection for a WebSocket; Unreachable when there is none."""
        ...


class Here:
    """The control plane of this machine."""

    is_here = True
    members = 1

    def __init__(self, home: Home) -> None:
        self._path = str(home.api_socket)
        self._home = home
        self.where = "this machine"

    def transport(self) -> httpx.BaseTransport:
        return httpx.HTTPTransport(uds=self._path)

    def check(self) -> None:
        try:
            self._home.api_socket.stat()
        except PermissionError as error:
            raise Unreachable(
                f"no permission to use the control plane at {self._path}",
                hint="it belongs to another user: use sudo, or your own with --data-dir and --run-dir",
            ) from error
        except OSError:
            return

    def knock(self) -> None:
        """httpcore 1.0.9 leaks the socket of a connect that fails: ask first."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(self._path)
            except OSError as error:
                raise httpx.ConnectError(str(error)) from error

    def next(self) -> None:
        """There is no other."""

    def patience_s(self) -> float:
        """As long as a keeper will start it again.

        One that ended by itself or by `slum down` looks the same for the moment that a restart takes.
        """
        import signal

        from slum.node.keeperclient import Child, KeeperError, call

        try:
            page = call(self._home, "list", after=_BEFORE_SERVER, timeout_s=KEEPER_S)["children"]
        except (KeeperError, Unreachable):
            return 0.0
        server = next((msgspec.convert(child, Child) for child in page if child["name"] == "server"), None)
        if server is None or (server.exited_at is not None and time.time() - server.exited_at > RESTART_S):
            return 0.0
        return RESTART_AFTER_END_S if server.status in (0, -signal.SIGTERM) else DEADLINE_S

    def lost(self, error: httpx.TransportError, answered: bool) -> SlumError:
        if not answered and self.patience_s() < DEADLINE_S:
            if said := elsewhere(self._home):
                return Unreachable(said, hint=ELSEWHERE)
            return Unreachable(
                f"no control plane runs on this machine ({self._path})",
                hint="`slum apply` starts one, or `slum up`; --run-dir or SLUM_RUN_DIR name another place",
            )
        what = "does not answer in time" if isinstance(error, httpx.TimeoutException) else f"does not answer ({error})"
        return Unreachable(f"the control plane {what}", hint="`slum up` starts it again; services go on meanwhile")

    def dial(self, timeout_s: float) -> Link:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(timeout_s)
        try:
            link.connect(self._path)
        except OSError as error:
            link.close()
            raise Unreachable(
                f"the control plane does not answer: {error.strerror}", hint="`slum up` starts it"
            ) from error
        return link


class Elsewhere:
    """A control plane that a context leads to: any of its members, the last one that answered first."""

    is_here = False

    def __init__(self, contexts: Contexts, context: Context) -> None:
        self._context = contexts.renewed(context)
        self._tls = contexts.tls(self._context)
        self._urls = list(self._context.urls)
        self.where = f"the context {context.name}"
        self.members = len(self._urls)

    @property
    def url(self) -> str:
        return self._urls[0]

    def transport(self) -> httpx.BaseTransport:
        return _ToMember(self, self._tls)

    def check(self) -> None:
        """Whoever holds the context's key is permitted."""

    def knock(self) -> None:
        """Only a connection tells."""

    def next(self) -> None:
        self._urls.append(self._urls.pop(0))

    def patience_s(self) -> float:
        return ELSEWHERE_S

    def lost(self, error: Exception, answered: bool) -> SlumError:
        cause = _tls_cause(error)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ConfigError(
                f"{self.url} is no member of the fleet of {self.where}: {cause.verify_message}",
                hint="it was told nothing; look at the address (`slum context list`) and at both clocks",
            )
        if cause is not None and "alert" in str(cause):
            return ConfigError(
                f"{self.url} does not accept the certificate of {self.where}: {cause.reason or cause}",
                hint="remove the context and add it again with a new token (`slum token new user`); look at both clocks",
            )
        what = "in time" if isinstance(error, (httpx.TimeoutException, TimeoutError)) else f"({error})"
        return Unreachable(
            f"no member of {self.where} answers {what}; tried {', '.join(self._urls)}",
            hint="services go on meanwhile; `slum context list` shows the addresses",
        )

    def dial(self, timeout_s: float) -> Link:
        failed: SlumError | None = None
        for _ in self._urls:
            try:
                return self._dial_one(timeout_s)
            except OSError as error:
                failed = self.lost(error, answered=False)
                self.next()
        raise failed or Unreachable(f"{self.where} has no address")

    def _dial_one(self, timeout_s: float) -> Link:
        plain = socket.create_connection(address_of(self.url), CONNECT_S)
        try:
            made = self._tls.wrap_socket(plain, server_hostname=NAME)
        except BaseException:
            plain.close()
            raise
        made.settimeout(timeout_s)
        return _TlsLink(made)


class _ToMember(httpx.BaseTransport):
    """Sends each request to the member that *at* names at that moment."""

    def __init__(self, at: Elsewhere, tls: ssl.SSLContext) -> None:
        self._at = at
        self._inner = httpx.HTTPTransport(verify=tls)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        host, port = address_of(self._at.url)
        request.url = request.url.copy_with(scheme="https", host=host, port=port)
        timeout = {**request.extensions.get("timeout", {}), "connect": CONNECT_S}
        request.extensions = {**request.extensions, "sni_hostname": NAME, "timeout": timeout}
        return self._inner.handle_request(request)

    def close(self) -> None:
        self._inner.close()


class _TlsLink:
    """A TLS socket that says BlockingIOError like a plain one; a record that is not complete yet is nothing to read."""

    def __init__(self, made: ssl.SSLSocket) -> None:
        self._made = made

    def fileno(self) -> int:
        return self._made.fileno()

    def recv(self, size: int, /) -> bytes:
        try:
            return self._made.recv(size)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def send(self, data: bytes | bytearray, /) -> int:
        try:
            return self._made.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def sendall(self, data: bytes | bytearray, /) -> None:
        self._made.sendall(data)

    def setblocking(self, flag: bool, /) -> None:
        self._made.setblocking(flag)

    def close(self) -> None:
        self._made.close()


def _tls_cause(error: BaseException | None) -> ssl.SSLError | None:
    """Return the TLS library's error that *error* came of, if one did."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error
