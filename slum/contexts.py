"""Contexts: how the command line reaches control planes elsewhere, each with a key, a certificate and addresses of its own.

Under $XDG_CONFIG_HOME/slum: ``contexts/NAME/`` (0700, its files 0600: user.key, user.crt, ca.crt, context.json) and ``context``,
the name of the one in use. The key is made here and never leaves; it is on disk before the token is shown, so that a lost
answer can be asked for again. A certificate is renewed at two thirds of its life, whenever the context is used.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slum import api
from slum.errors import ConfigError, SlumError, Unreachable
from slum.frozen import Frozen
from slum.node.home import RENEW_AT, checked_url, host_name, trusting
from slum.pki.request import make_request, new_key
from slum.pki.tokens import parse

if TYPE_CHECKING:
    import ssl

LOCAL = "local"
"""The name of this machine's own control plane, where a context's could stand."""
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,38}[a-z0-9])?")
ASK_S = 5.0


class Context(Frozen):
    """context.json, and the name of its folder."""

    name: str
    servers: tuple[str, ...]
    """Where members answer, by their own word."""
    joined: tuple[str, ...]
    """Where they answered when the context was added."""
    cluster: str
    subject: str
    role: str
    not_before: float
    not_after: float

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.servers, *self.joined)))

    @property
    def renew_at(self) -> float:
        return self.not_before + (self.not_after - self.not_before) * RENEW_AT


class Contexts:
    """All contexts of one user. Every method may raise ConfigError."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def of(cls, env: Mapping[str, str], home: str) -> Contexts:
        """Return those of the user with environment *env* and home folder *home*."""
        return cls(Path(env.get("XDG_CONFIG_HOME") or f"{home}/.config") / "slum")

    def names(self) -> tuple[str, ...]:
        folder = self._root / "contexts"
        found = os.listdir(folder) if folder.is_dir() else []
        return tuple(sorted(name for name in found if (folder / name / "context.json").is_file()))

    def current(self) -> str:
        """Return the name of the context in use; "" when that is this machine's own control plane."""
        try:
            name = (self._root / "context").read_text().strip()
        except FileNotFoundError:
            return ""
        return "" if name == LOCAL else name

    def use(self, name: str) -> None:
        """Make *name* the context in use; LOCAL for this machine's own control plane."""
        if name == LOCAL:
            (self._root / "context").unlink(missing_ok=True)
            return
        self.load(name)
        _write(self._root / "context", f"{name}\n".encode())

    def load(self, name: str) -> Context:
        try:
            return msgspec.json.decode((self.folder(name) / "context.json").read_bytes(), type=Context)
        except FileNotFoundError:
            known = ", ".join((*self.names(), LOCAL))
            raise ConfigError(f"there is no context {name!r}; there is {known}", hint="`slum context add`") from None
        except (msgspec.DecodeError, OSError) as error:
            raise ConfigError(f"the context {name} cannot be read: {error}", hint="remove and add it again") from error

    def remove(self, name: str) -> Context:
        """Forget *name* and its key, and return what it was."""
        was = self.load(name)
        if self.current() == name:
            self.use(LOCAL)
        shutil.rmtree(self.folder(name))
        return was

    def add(self, name: str, urls: Sequence[str], token: str, *, wait_s: float, say: Callable[[str], None]) -> Context:
        """Join as a user by *token* and keep what comes of it. May be repeated with the same token until it succeeds."""
        from slum.node.join import answered

        if name == LOCAL:
            raise ConfigError(f"{LOCAL!r} means this machine's own control plane: choose another name")
        folder = self.folder(name)
        if (folder / "context.json").exists():
            raise ConfigError(
                f"there is a context {name!r} already", hint=f"`slum context remove {name}`, or another name"
            )
        servers = tuple(dict.fromkeys(checked_url(url) for url in urls))
        parsed = parse(token)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = self._key(folder)
        request = api.JoinRequest(secret=parsed.secret, csr=make_request(key), host=host_name())
        answer = answered(servers, parsed, request, wait_s, say)
        if answer.kind != "user":
            raise ConfigError(
                f"this token is for a {answer.kind}", hint="`slum token new user NAME` makes one for a user"
            )
        return self._keep(name, answer, servers)

    def renewed(self, context: Context, *, now: float | None = None) -> Context:
        """Return *context* with a certificate that holds; at two thirds of its life a new one is asked for.

        A control plane that cannot be asked is no harm while the old one holds.
        """
        at = time.time() if now is None else now
        if at < context.renew_at:
            return context
        with self._locked(context.name):
            context = self.load(context.name)
            if at < context.renew_at:
                return context
            try:
                return self._renew(context)
            except SlumError:
                if at < context.not_after:
                    return context
                raise

    def tls(self, context: Context) -> ssl.SSLContext:
        """Return TLS 1.3 that trusts the fleet's authority alone and shows the context's certificate."""
        import ssl

        folder = self.folder(context.name)
        made = trusting((folder / "ca.crt").read_text())
        try:
            made.load_cert_chain(folder / "user.crt", folder / "user.key")
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"the certificate of the context {context.name} is of no use: {error}", hint="remove and add it again"
            ) from error
        return made

    def folder(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name for a context: small letters, digits, dots and dashes, at most 40")
        return self._root / "contexts" / name

    def _key(self, folder: Path) -> bytes:
        path = folder / "user.key"
        if not path.exists():
            _write(path, new_key())
        return path.read_bytes()

    def _renew(self, context: Context) -> Context:
        from slum.node.front import ask

        folder = self.folder(context.name)
        request = api.RenewRequest(
            certificate=(folder / "user.crt").read_text(),
            csr=make_request((folder / "user.key").read_bytes()),
            host=host_name(),
        )
        tls = trusting((folder / "ca.crt").read_text())
        whys: list[SlumError] = []
        for url in context.urls:
            try:
                answer = ask(url, "POST", "/v1/renew", kind=api.JoinAnswer, tls=tls, timeout_s=ASK_S, body=request)
            except SlumError as error:
                whys.append(error)
            else:
                return self._keep(context.name, msgspec.structs.replace(answer, ca=""), context.joined)
        raise next((why for why in whys if not isinstance(why, Unreachable)), whys[0])

    def _keep(self, name: str, answer: api.JoinAnswer, joined: tuple[str, ...]) -> Context:
        """Have the answer on disk, context.json last; the authority only the first time."""
        folder, now = self.folder(name), time.time()
        if answer.ca:
            _write(folder / "ca.crt", answer.ca.encode())
        _write(folder / "user.crt", answer.certificate.encode())
        context = Context(
            name=name,
            servers=tuple(checked_url(url) for url in answer.servers) or joined,
            joined=joined,
            cluster=answer.cluster,
            subject=answer.subject,
            role=answer.role,
            not_before=now,
            not_after=answer.not_after,
        )
        _write(folder / "context.json", msgspec.json.format(msgspec.json.encode(context)))
        return context

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Let one process at a time renew."""
        descriptor = os.open(self.folder(name) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    """Put *data* at *path*, 0600, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
