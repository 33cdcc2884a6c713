"""A control plane that is open to other machines, for tests: real ledger, server and keeper, real Caddy, real TLS."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from server_support import Plane, a_plane

from slum import api
from slum.ledger.client import connect
from slum.ledger.commands import AnyCommand, NoteCertificate, Proposal, Result, new_request_id
from slum.ledger.reader import Reader
from slum.node.keeperclient import KeeperClient
from slum.pki import authority, request, tokens
from slum.pki.authority import SERVER_NAME
from slum.server import front, trust


@dataclass(frozen=True)
class Holder:
    """A key and a certificate, on disk for the TLS library."""

    key: Path
    certificate: Path
    answer: api.JoinAnswer | None = None


class Site:
    """One plane with a front on a port of 127.0.0.1; *recovery* is the recovery key."""

    def __init__(self, plane: Plane, folder: Path) -> None:
        self.plane = plane
        self.home = plane.home
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"https://127.0.0.1:{self.port}"
        asyncio.run(plane.ready())
        self.recovery = asyncio.run(self._open())
        self.ca = self.home.authority_certificate.read_text()

    async def _open(self) -> str:
        reader = Reader(self.home.state)
        keeper = await KeeperClient.connect(self.home)
        try:
            async with connect(self.home.ledger_socket) as ledger:
                key = await trust.found(ledger, reader, self.home, actor="root@test")
                await trust.certify(ledger, reader, self.home, "m1")
            await front.ensure(keeper, self.home, [f"127.0.0.1:{self.port}"])
        finally:
            await keeper.close()
            reader.close()
        return key

    @property
    def reader(self) -> Reader:
        return Reader(self.home.state)

    def tls(self, holder: Holder | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.ca)
        if holder is not None:
            context.load_cert_chain(holder.certificate, holder.key)
        return context

    @contextmanager
    def http(self, holder: Holder | None = None, address: str = "127.0.0.1") -> Iterator[httpx.Client]:
        """A client from outside, with the certificate of *holder* if any; *address* is where it calls from."""
        with httpx.Client(transport=_Transport(self.tls(holder), address), base_url=self.url, timeout=10.0) as client:
            yield client

    @contextmanager
    def local(self) -> Iterator[httpx.Client]:
        transport = httpx.HTTPTransport(uds=str(self.home.api_socket))
        with httpx.Client(transport=transport, base_url="http://slum", timeout=10.0) as client:
            yield client

    def token(self, kind: str, subject: str = "", **fields: Any) -> api.NewToken:
        with self.local() as http:
            asked = api.TokenRequest(kind=kind, subject=subject, **fields)
            answer = http.post("/v1/tokens", content=msgspec.json.encode(asked))
            assert answer.status_code == 200, answer.text
            return msgspec.json.decode(answer.content, type=api.NewToken)

    def join(self, secret: str, key: bytes, **fields: Any) -> httpx.Response:
        asked = api.JoinRequest(secret=secret, csr=request.make_request(key), **fields)
        with self.http() as http:
            return http.post("/v1/join", content=msgspec.json.encode(asked))

    def holder(self, kind: str, subject: str, **fields: Any) -> Holder:
        """Let somebody in, as they would come in."""
        key = request.new_key()
        made = self.token(kind, subject, **fields)
        answer = self.join(tokens.parse(made.token).secret, key)
        assert answer.status_code == 200, answer.text
        joined = msgspec.json.decode(answer.content, type=api.JoinAnswer)
        return self.keep(key, joined.certificate, joined)

    def keep(self, key: bytes, certificate: str, answer: api.JoinAnswer | None = None) -> Holder:
        base = self.folder / secrets.token_hex(4)
        key_file, certificate_file = base.with_suffix(".key"), base.with_suffix(".crt")
        key_file.write_bytes(key)
        certificate_file.write_text(certificate)
        return Holder(key_file, certificate_file, answer)

    def propose(self, command: AnyCommand) -> Result:
        async def ask() -> Result:
            reader = self.reader
            async with connect(self.home.ledger_socket) as ledger:
                request_id = new_request_id(reader.seq())
                reader.close()
                return await ledger.propose(
                    Proposal(command=command, request_id=request_id, actor="test"), deadline_s=10.0
                )

        return asyncio.run(ask())

    def aged(self, holder: Holder, days: float) -> Holder:
        """Return *holder* with a certificate that was given out so many days ago; the ledger knows it."""
        assert holder.answer is not None
        reader = self.reader
        row = trust.standing(reader)
        key = holder.key.read_bytes()
        signed = authority.sign(
            request.make_request(key),
            certificate=row.certificate,
            key=authority.unseal(row.box, self.home.member_age.read_text()),
            uri=authority.uri_of(reader.cluster().cluster_id, holder.answer.subject),
            now=time.time() - days * 86_400,
        )
        reader.close()
        self.propose(
            NoteCertificate(
                serial=signed.serial,
                subject=holder.answer.subject,
                role=holder.answer.role,
                key_hash=signed.key_hash,
                not_after=signed.not_after,
            )
        )
        return self.keep(key, signed.certificate, holder.answer)

    def raw(self, data: bytes) -> bytes:
        """Send *data* as it is, over TLS, and return all that comes back until the other side closes."""
        with socket.create_connection(("127.0.0.1", self.port), 10.0) as plain:
            with self.tls().wrap_socket(plain, server_hostname=SERVER_NAME) as link:
                return _exchange(link, data)

    def raw_behind(self, data: bytes) -> bytes:
        """The same on the socket behind the front, as if we were the front."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(10.0)
            link.connect(str(self.home.front_socket))
            return _exchange(link, data)


def _exchange(link: socket.socket, data: bytes) -> bytes:
    link.sendall(data)
    heard = b""
    while chunk := link.recv(65536):
        heard += chunk
    return heard


class _Transport(httpx.HTTPTransport):
    def __init__(self, tls: ssl.SSLContext, address: str) -> None:
        super().__init__(verify=tls, local_address=address)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": SERVER_NAME}
        return super().handle_request(request)


@contextmanager
def a_site() -> Iterator[Site]:
    with a_plane() as plane, tempfile.TemporaryDirectory(prefix="slum-site-") as folder:
        yield Site(plane, Path(folder))


def another_authority(folder: Path) -> tuple[str, bytes]:
    """Return (certificate, key) of an authority that has nothing to do with any fleet."""
    made = authority.make("11111111-2222-3333-4444-555555555555", time.time())
    return made.certificate, made.key
