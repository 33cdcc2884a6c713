"""Members behind TLS, as nodes of other machines see them: a real authority signs, real TLS 1.3 checks, tokens bind keys.

A FakeFleet has the authority and the tokens; each FakeFront is one member's address, which can be closed and opened again.
``lose_answers`` signs and hangs up; ``shows`` overrides what /v1/ca answers. Every byte that a caller sent is in *heard*.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import msgspec
from fakes.member import Member

from slum import api
from slum.pki import authority, tokens
from slum.pki.request import make_request, new_key

CLUSTER = "c1"


class FakeFleet:
    """What all members of one control plane know."""

    def __init__(self) -> None:
        self.made = authority.make(CLUSTER, time.time())
        self.secrets: dict[str, str] = {}
        """By secret: the node's key ("machine.incarnation")."""
        self.bound: dict[str, str] = {}
        """By secret: the hash of the key that used it first."""
        self.servers: tuple[str, ...] = ()
        self.revoked: set[str] = set()
        self.renewals = 0
        self.now = time.time
        """What the authority's clock says when it signs."""

    @property
    def ca(self) -> str:
        return self.made.certificate

    def token(self, key: str = "here.1") -> str:
        secret = tokens.new_secret()
        self.secrets[secret] = key
        return tokens.token_text(authority.digest_of(self.ca), secret)

    def sign(self, csr: str, subject: str, *, server: bool = False, now: float | None = None) -> authority.Signed:
        uri = authority.uri_of(CLUSTER, subject)
        at = self.now() if now is None else now
        return authority.sign(csr, certificate=self.ca, key=self.made.key, uri=uri, now=at, server=server)

    def join(self, request: api.JoinRequest) -> api.JoinAnswer | api.Problem:
        key = self.secrets.get(request.secret)
        bound = sha256(authority.read_request(request.csr).public_numbers().x.to_bytes(32)).hexdigest()
        if key is None or self.bound.setdefault(request.secret, bound) != bound:
            return api.Problem(code="bad_input", message="this token is not valid", hint="make a new one")
        return self.answer(request.csr, key)

    def renew(self, request: api.RenewRequest) -> api.JoinAnswer | api.Problem:
        shown = authority.read_certificate(request.certificate, self.ca)
        if not shown.is_ours or shown.serial in self.revoked:
            return api.Problem(code="bad_input", message="this certificate was revoked")
        self.renewals += 1
        return self.answer(request.csr, shown.uri.rpartition("/")[2])

    def answer(self, csr: str, key: str) -> api.JoinAnswer:
        machine = key.rpartition(".")[0]
        subject = f"node/{machine}/{key}"
        signed = self.sign(csr, subject)
        return api.JoinAnswer(
            kind="node",
            subject=subject,
            cluster=CLUSTER,
            certificate=signed.certificate,
            ca=self.ca,
            not_after=signed.not_after,
            servers=self.servers,
            machine=machine,
            key=key,
            tenement=machine,
            fleet="test",
        )


class FakeFront(Member):
    """One member of *fleet* at *url*."""

    def __init__(self, fleet: FakeFleet, name: str = "m1", host: str = "127.0.0.1") -> None:
        super().__init__(Path(name))
        self.fleet = fleet
        self.name = name
        self.host = host
        self.port = 0
        self.heard = bytearray()
        self.lose_answers = 0
        self.shows: str | None = None
        self.peers: list[str] = []
        """The URI of each certificate that an agent's line was opened with."""
        self._tls = self._context()

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self.host, self.port, ssl=self._tls, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    def _context(self) -> ssl.SSLContext:
        key = new_key()
        signed = self.fleet.sign(make_request(key), f"member/{self.name}", server=True, now=time.time())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_verify_locations(cadata=self.fleet.ca)
        with tempfile.NamedTemporaryFile() as file:
            os.chmod(file.name, 0o600)
            Path(file.name).write_bytes(key + signed.certificate.encode())
            context.load_cert_chain(file.name)
        return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            writer.close()
            return
        self.heard += head
        path = head.split()[1].decode()
        if path in ("/v1/ca", "/v1/join", "/v1/renew"):
            await self._trust(path, head, reader, writer)
            return
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        if der is None:
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()
            return
        self.peers.append(authority.read_certificate(ssl.DER_cert_to_PEM_cert(der), self.fleet.ca).uri)
        whole = asyncio.StreamReader()
        whole.feed_data(head)
        feeding = asyncio.get_running_loop().create_task(_feed(reader, whole))
        try:
            await super()._serve(whole, writer)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _trust(self, path: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = next(
            (int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line), 0
        )
        body = await reader.readexactly(length)
        self.heard += body
        said: object
        if path == "/v1/ca":
            said = api.Authority(certificate=self.shows or self.fleet.ca, cluster=CLUSTER)
        elif path == "/v1/join":
            said = self.fleet.join(msgspec.json.decode(body, type=api.JoinRequest))
        else:
            said = self.fleet.renew(msgspec.json.decode(body, type=api.RenewRequest))
        if path != "/v1/ca" and self.lose_answers:
            self.lose_answers -= 1
        else:
            refused = isinstance(said, api.Problem)
            data = msgspec.json.encode({"error": said} if refused else said)
            status = b"400 Bad Request" if refused else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(data))
            writer.write(data)
        writer.close()


async def _feed(reader: asyncio.StreamReader, whole: asyncio.StreamReader) -> None:
    try:
        while data := await reader.read(65536):
            whole.feed_data(data)
    except (ConnectionError, ssl.SSLError):
        pass
    whole.feed_eof()
