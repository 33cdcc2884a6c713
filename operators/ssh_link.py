"""Connections to hosts: keys of hosts are judged before anything of ours is sent, jumps are nested connections.

Public keys are the only way in: no password is asked for or sent, ~/.ssh/config is not read. What asyncssh raises
is translated here, once, into OperatorError with a code (*provider_code*): unreachable, host_key, refused, key. Must
never go on past a host key that is not the expected one.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncssh

from slum.errors import OperatorError
from slum.model import HostKeyPolicy, SshHost, SshOperator
from slum.operators.ssh_hosts import Address, KeyBook, address_of, parse_address

CONNECT_S = 10.0
LOGIN_S = 15.0
KEEPALIVE_S, KEEPALIVES = 5, 3
ED25519 = ("ssh-ed25519",)
ECDSA = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
RSA = ("rsa-sha2-512", "rsa-sha2-256")
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes256-ctr")
"""The quickest first: wheels are megabytes."""

Believes = Callable[[asyncssh.SSHKey], bool]


class Dialer:
    """Connects to the hosts of one operator; use it in an async with statement. The jump host is connected to once."""

    def __init__(self, operator: SshOperator, book: KeyBook) -> None:
        self._operator = operator
        self._book = book
        self._stack = AsyncExitStack()
        self._jumping = asyncio.Lock()
        self._jump: asyncssh.SSHClientConnection | None = None

    async def __aenter__(self) -> Dialer:
        await self._stack.__aenter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        await self._stack.__aexit__(*details)

    @asynccontextmanager
    async def to(self, host: SshHost) -> AsyncIterator[asyncssh.SSHClientConnection]:
        """Yield a connection to *host*; OperatorError when it cannot be had or breaks."""
        address = address_of(host, self._operator)
        connection = await self._connect(address, host.fingerprint, await self._through())
        try:
            async with connection:
                yield connection
        except (asyncssh.Error, ConnectionError) as error:
            raise refusal(address, error) from error

    async def _through(self) -> asyncssh.SSHClientConnection | None:
        """Return the connection to the jump host, when there is one."""
        if self._operator.jump is None:
            return None
        async with self._jumping:
            if self._jump is None or self._jump.is_closed():
                address = parse_address(self._operator.jump, self._operator.user)
                made = await self._connect(address, self._operator.jump_fingerprint, None)
                self._jump = await self._stack.enter_async_context(made)
            return self._jump

    async def _connect(
        self, address: Address, fingerprint: str | None, through: asyncssh.SSHClientConnection | None
    ) -> asyncssh.SSHClientConnection:
        policy = HostKeyPolicy.PINNED if fingerprint else self._operator.host_key
        if policy is HostKeyPolicy.PINNED:
            return await self._pinned(address, fingerprint, through)
        if policy is HostKeyPolicy.KNOWN_HOSTS:
            known = self._operator.known_hosts or str(Path.home() / ".ssh/known_hosts")
            if not os.path.isfile(known):  # noqa: ASYNC240
                raise OperatorError(f"{address}: there is no {known} to know its key from", provider_code="host_key")
            return await self._dial(address, through, lambda key: False, known_hosts=known)
        return await self._first(address, through)

    async def _first(
        self, address: Address, through: asyncssh.SSHClientConnection | None
    ) -> asyncssh.SSHClientConnection:
        """Connect to a host that shows the key that it showed first; that one is written down before the host is used."""
        pinned = self._book.find(address.id)
        algorithms = _algorithms(pinned) if pinned else (*ED25519, *ECDSA, *RSA)
        try:
            connection = await self._dial(
                address, through, lambda key: pinned in (None, _text(key)), algorithms=algorithms, expected=pinned
            )
        except OperatorError as error:
            if error.provider_code == "host_key":
                error.hint = f"{error.hint}; then {self._book.forgetting(address.id)}"
            raise
        try:
            key = connection.get_server_host_key()
            if key is None:
                raise OperatorError(f"{address}: it shows no key", provider_code="host_key")
            await self._book.pin(address.id, _text(key))
        except BaseException:
            connection.abort()
            await connection.wait_closed()
            raise
        return connection

    async def _pinned(
        self, address: Address, fingerprint: str | None, through: asyncssh.SSHClientConnection | None
    ) -> asyncssh.SSHClientConnection:
        """Connect to a host that shows the key of *fingerprint*, of whichever kind that one is."""
        if fingerprint is None:
            raise OperatorError(f"{address}: no fingerprint is given for it", provider_code="host_key")
        wanted, mismatch = fingerprint.rstrip("="), None
        families = [(*ED25519, *ECDSA, *RSA), ED25519, ECDSA, RSA]
        while families:
            judged: list[asyncssh.SSHKey] = []

            def believes(key: asyncssh.SSHKey, judged: list[asyncssh.SSHKey] = judged) -> bool:
                judged.append(key)
                return key.get_fingerprint() == wanted

            try:
                return await self._dial(address, through, believes, algorithms=families.pop(0), expected=wanted)
            except OperatorError as error:
                if mismatch is None and error.provider_code != "host_key":
                    raise
                # Asked for a kind of key that it has not, a host may just hang up: the mismatch is what is to be told.
                mismatch = mismatch or error
                if judged:
                    families = [family for family in families if not _shows(judged[0], family)]
        raise mismatch or OperatorError(f"{address}: it shows no key", provider_code="host_key")

    async def _dial(
        self,
        address: Address,
        through: asyncssh.SSHClientConnection | None,
        believes: Believes,
        *,
        known_hosts: str | bytes = b"",
        algorithms: tuple[str, ...] = (),
        expected: str | None = None,
    ) -> asyncssh.SSHClientConnection:
        judges: list[_Judge] = []

        def judge() -> _Judge:
            judges.append(_Judge(believes))
            return judges[-1]

        key = self._operator.key
        try:
            async with asyncio.timeout(CONNECT_S + LOGIN_S):
                return await asyncssh.connect(
                    address.host,
                    address.port,
                    username=address.user,
                    client_factory=judge,
                    known_hosts=known_hosts,
                    server_host_key_algs=algorithms,
                    client_keys=[key] if key else (),
                    agent_path=None if key else (),
                    preferred_auth="publickey",
                    encryption_algs=CIPHERS,
                    compression_algs=("none",),
                    config=None,
                    tunnel=through or (),
                    connect_timeout=CONNECT_S,
                    login_timeout=LOGIN_S,
                    keepalive_interval=KEEPALIVE_S,
                    keepalive_count_max=KEEPALIVES,
                )
        except asyncssh.HostKeyNotVerifiable as error:
            seen = judges[-1].seen if judges else None
            raise _wrong_key(address, seen, expected) from error
        except asyncssh.KeyExchangeFailed as error:
            raise OperatorError(f"{address}: {error.reason}", provider_code="no_such_key") from error
        except (asyncssh.Error, asyncssh.KeyImportError, OSError, TimeoutError) as error:
            raise refusal(address, error, key) from error


class _Judge(asyncssh.SSHClient):
    """Decides on a host's key, and keeps what it was shown. The key's owner has still to prove that it is theirs."""

    def __init__(self, believes: Believes) -> None:
        self._believes = believes
        self.seen: asyncssh.SSHKey | None = None
        self._connection: asyncssh.SSHClientConnection | None = None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self._connection = conn

    def debug_msg_received(self, msg: str, lang: str, always_display: bool) -> None:
        """Acknowledge at once what sshd says after the login: it holds its next, small packet back until then (40 ms)."""
        line = self._connection.get_extra_info("socket") if self._connection is not None else None
        if line is not None and hasattr(socket, "TCP_QUICKACK"):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self.seen = key
        return self._believes(key)


def refusal(address: Address, error: Exception, key: str | None = None) -> OperatorError:
    """Return what asyncssh or the system said, in our words."""
    if isinstance(error, asyncssh.PermissionDenied):
        how = f"the key {key}" if key else "an agent's key, or one in ~/.ssh,"
        return OperatorError(
            f"{address}: it lets {address.user!r} in with no key that was offered",
            hint=f"add the public half of {how} to that user's ~/.ssh/authorized_keys there",
            provider_code="refused",
        )
    if isinstance(error, asyncssh.KeyImportError | FileNotFoundError | PermissionError) and key:
        why = "needs a passphrase" if isinstance(error, asyncssh.KeyEncryptionError) else str(error)
        return OperatorError(
            f"{address}: the key {key} cannot be used: {why}",
            hint="it must be a private key without a passphrase, or one in an agent",
            provider_code="key",
        )
    why = "it does not answer" if isinstance(error, TimeoutError) else _reason(error)
    return OperatorError(
        f"{address}: {why}",
        hint="is the host up, and does sshd listen there? the others go on without it",
        provider_code="unreachable",
    )


def _reason(error: Exception) -> str:
    if isinstance(error, asyncssh.Error):
        return error.reason or type(error).__name__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _wrong_key(address: Address, seen: asyncssh.SSHKey | None, expected: str | None) -> OperatorError:
    shown = seen.get_fingerprint() if seen else "no key"
    if expected is None:
        return OperatorError(
            f"{address}: its host key {shown} is not in known_hosts; nothing was sent",
            hint="compare it with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there, then add it",
            provider_code="host_key",
        )
    known = expected if expected.startswith("SHA256:") else asyncssh.import_public_key(expected).get_fingerprint()
    return OperatorError(
        f"{address}: its host key is {shown}, not {known} as expected; nothing was sent",
        hint="somebody may be between you and the host. If it was installed anew, compare its key there (docs/bootstrap.md, Host keys)",
        provider_code="host_key",
    )


def _text(key: asyncssh.SSHKey) -> str:
    """Return "ssh-ed25519 AAAA..." without a comment."""
    return " ".join(key.export_public_key().decode().split()[:2])


def _shows(key: asyncssh.SSHKey, family: tuple[str, ...]) -> bool:
    """Tell whether *family* is *key*'s kind."""
    return any(name in _algorithms(_text(key)) for name in family)


def _algorithms(pinned: str) -> tuple[str, ...]:
    kind = pinned.split()[0]
    return RSA if kind == "ssh-rsa" else (kind,)
