"""Who a member is to the others: an Ed25519 key and a self-signed certificate, pinned as a whole in the members list.

Trust is the list and nothing else: TLS 1.3 with certificates on both sides, the other's certificate must be, byte for byte,
the one of the member that it says it is, whatever its dates say (a control plane that was off for a month must elect a
leader). Making keys needs the ``cryptography`` package, which is imported only there: it takes 9 MB.
"""

from __future__ import annotations

import base64
import os
import secrets
import ssl
from collections.abc import Iterable
from pathlib import Path

import msgspec

from slum.frozen import Frozen
from slum.ledger import journal
from slum.ledger.commands import Member
from slum.ledger.refusal import Refusal

KEY, CERTIFICATE, ME = "member.key", "member.crt", "member.json"
_NO_CHECK_TIME = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL, which Python does not name."""


class Me(Frozen):
    """Which member this folder belongs to; *incarnation* dies with the disk."""

    id: str
    incarnation: str
    listen: str
    """host:port to listen on."""
    address: str
    """host:port where the others find it."""
    api: str = ""
    recipient: str = ""
    """As in the members list."""


def make(folder: Path, *, id: str, listen: str, address: str, api: str = "", recipient: str = "") -> Member:
    """Give *folder* an identity and return its row for the members list; Refusal when it has one."""
    if (folder / ME).exists():
        raise Refusal(f"{folder} belongs to a member already", hint=f"look into {folder / ME}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key, certificate = make_certificate(id)
    _write(folder / KEY, key)
    _write(folder / CERTIFICATE, certificate)
    me = Me(
        id=id,
        incarnation=secrets.token_hex(8),
        listen=listen,
        address=address,
        api=api,
        recipient=recipient,
    )
    _write(folder / ME, msgspec.json.encode(me))
    journal.sync_folder(folder)
    return row(folder, me)


def forget(folder: Path) -> None:
    """Take from *folder* the identity of a member that nobody has taken in, if it has one."""
    (folder / ME).unlink(missing_ok=True)


def load(folder: Path) -> Me | None:
    """Return who *folder* says it is; None for a ledger that was never more than one member."""
    try:
        return msgspec.json.decode((folder / ME).read_bytes(), type=Me)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise Refusal(f"{folder / ME} cannot be read: {error}", hint="put it back, or join as a new member") from error


def row(folder: Path, me: Me) -> Member:
    der = ssl.PEM_cert_to_DER_cert((folder / CERTIFICATE).read_text())
    return Member(
        id=me.id,
        incarnation=me.incarnation,
        public_key=base64.b64encode(der).decode(),
        address=me.address,
        api=me.api,
        recipient=me.recipient,
    )


def certificate_of(member: Member) -> bytes:
    """Return the DER certificate that *member* must show; empty when it has none."""
    return base64.b64decode(member.public_key)


def context(folder: Path, members: Iterable[Member], *, server: bool) -> ssl.SSLContext:
    """Return a TLS 1.3 context that shows our certificate and takes only those of *members*."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME) | ssl.VERIFY_X509_PARTIAL_CHAIN
    made.load_cert_chain(folder / CERTIFICATE, folder / KEY)
    trusted = b"".join(certificate_of(member) for member in members)
    if trusted:
        made.load_verify_locations(cadata=trusted)
    if server:
        made.num_tickets = 0
    return made


def make_certificate(id: str, *, days: int = 36500) -> tuple[bytes, bytes]:
    """Return a new private key and its certificate, as PEM. Nobody looks at the dates."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, id)])
    began = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began)
        .not_valid_after(began + datetime.timedelta(days=days))
        .sign(key, None)
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
