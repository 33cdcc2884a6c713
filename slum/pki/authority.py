"""The fleet's certificate authority: made once, its key locked in a box that every member can open, and what it signs.

The box is the private key, age-encrypted (https://age-encryption.org/v1) to each member's recipient and to the recovery
key, which no machine of the fleet holds. A request's key is all that is taken from it: names, uses and dates are ours.
The key is never written anywhere in clear and appears in no error.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from slum.errors import ConfigError
from slum.frozen import Frozen
from slum.pki.request import key_hash

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SERVER_NAME = "slum.internal"
"""What every member's front is called, whatever address it is dialled at."""
AUTHORITY_DAYS = 7300
LEAF_DAYS = 90
SKEW_S = 3600.0
"""Certificates begin so long ago, for machines whose clocks are behind."""
REQUEST_CHARS_MAX = 8192


class Made(Frozen):
    """A new authority. *key* (PEM) is for sealing at once, and nothing else."""

    certificate: str
    key: bytes


class Signed(Frozen):
    certificate: str
    serial: str
    """Hex."""
    key_hash: str
    not_after: float


class Shown(Frozen):
    """What a certificate says of its holder; *is_ours* when our authority signed it, whatever its dates."""

    serial: str
    uri: str
    key_hash: str
    not_after: float
    is_ours: bool


def new_identity() -> tuple[str, str]:
    """Return (identity, recipient) of a new age X25519 key: a member's own, or the recovery key."""
    from pyrage import x25519

    identity = x25519.Identity.generate()
    return str(identity), str(identity.to_public())


def recipient_of(identity: str) -> str:
    """Return the recipient of *identity* (``AGE-SECRET-KEY-1...``); ConfigError, which does not repeat it, if none."""
    return str(_identity(identity).to_public())


def make(cluster: str, now: float) -> Made:
    """Return a new authority for *cluster*: ECDSA P-256, valid for 20 years, signs leaves only."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"slum {cluster}"[:64])])
    began = _moment(now - SKEW_S)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(began)
        .not_valid_after(began + datetime.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Made(certificate=certificate.public_bytes(serialization.Encoding.PEM).decode(), key=private)


def seal(key: bytes, recipients: Iterable[str]) -> bytes:
    """Return *key* in a box that each of *recipients* can open; ConfigError for one that is no age recipient."""
    import pyrage

    try:
        parsed = [pyrage.x25519.Recipient.from_str(text) for text in sorted(set(recipients))]
    except pyrage.RecipientError as error:
        raise ConfigError(f"not an age recipient: {error}") from error
    return bytes(pyrage.encrypt(key, parsed))


def unseal(box: bytes, identity: str) -> bytes:
    """Return the key in *box*; ConfigError when it is not sealed to *identity*."""
    import pyrage

    try:
        return bytes(pyrage.decrypt(box, [_identity(identity)]))
    except pyrage.DecryptError:
        raise ConfigError(
            "the authority's key is not sealed to this member",
            hint="another member can sign meanwhile; `slum server recover` or a new join puts it right",
        ) from None


def reseal(box: bytes, identity: str, recipients: Iterable[str]) -> bytes:
    """Return a box with the same key for other *recipients* (the recovery recipient among them, by the caller)."""
    return seal(unseal(box, identity), recipients)


def sign(
    request: str,
    *,
    certificate: str,
    key: bytes,
    uri: str,
    now: float,
    days: float = LEAF_DAYS,
    server: bool = False,
) -> Signed:
    """Return a certificate for the key of *request* and the name *uri*; with *server* also to serve as SERVER_NAME.

    ConfigError when the request is malformed, not signed by its own key, or its key is not ECDSA on P-256.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    public = read_request(request)
    authority = x509.load_pem_x509_certificate(certificate.encode())
    private = serialization.load_pem_private_key(key, password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError("the authority's key is not ECDSA")
    ends = min(_moment(now) + datetime.timedelta(days=days), authority.not_valid_after_utc)
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)]
    if server:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names.append(x509.DNSName(SERVER_NAME))
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, uri.split("/", 3)[-1][:64])]))
        .issuer_name(authority.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now - SKEW_S))
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()),
            critical=False,
        )
        .sign(private, hashes.SHA256())
    )
    return Signed(
        certificate=made.public_bytes(serialization.Encoding.PEM).decode(),
        serial=f"{made.serial_number:x}",
        key_hash=key_hash(public),
        not_after=made.not_valid_after_utc.timestamp(),
    )


def read_request(request: str) -> EllipticCurvePublicKey:
    """Return the public key of *request*, which it proves to hold; ConfigError if not."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        if len(request) > REQUEST_CHARS_MAX:
            raise ValueError("too long")
        parsed = x509.load_pem_x509_csr(request.encode())
        public = parsed.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise ValueError("its key is not ECDSA on P-256")
        if not parsed.is_signature_valid:
            raise ValueError("it is not signed by its own key")
    except Exception as error:  # noqa: BLE001  the parser's errors are of many kinds, all of them the request's fault
        raise ConfigError(f"not a certificate request: {error}") from None
    return public


def read_certificate(certificate: str, authority: str) -> Shown:
    """Return what *certificate* says, and whether *authority* signed it; ConfigError when it is none."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        if len(certificate) > REQUEST_CHARS_MAX:
            raise ValueError("too long")
        parsed = x509.load_pem_x509_certificate(certificate.encode())
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        hashed = key_hash(parsed.public_key())
    except Exception as error:  # noqa: BLE001  as above
        raise ConfigError(f"not a certificate of this fleet: {error}") from None
    try:
        parsed.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
        is_ours = True
    except (InvalidSignature, ValueError, TypeError):
        is_ours = False
    return Shown(
        serial=f"{parsed.serial_number:x}",
        uri=uris[0] if len(uris) == 1 else "",
        key_hash=hashed,
        not_after=parsed.not_valid_after_utc.timestamp(),
        is_ours=is_ours,
    )


def digest_of(certificate: str) -> str:
    """Return sha256 of the DER of *certificate* (PEM), hex: the first part of every token. ValueError when it is not one alone.

    What stands after the padding of the base64 is not decoded, so it would not be in the hash, but be believed: whoever could
    add an authority there would pass for the fleet.
    """
    import ssl

    der = ssl.PEM_cert_to_DER_cert(certificate.strip() + "\n")
    if ssl.DER_cert_to_PEM_cert(der).split() != certificate.split():
        raise ValueError("it is more than one certificate, or not in the usual form")
    return sha256(der).hexdigest()


def uri_of(cluster: str, subject: str) -> str:
    """Return the URI of *subject* ("user/ana", "node/MACHINE/KEY", "member/ID") in *cluster*."""
    return f"spiffe://{cluster}/{subject}"


def _identity(text: str) -> Any:
    import pyrage

    try:
        return pyrage.x25519.Identity.from_str(text.strip())
    except pyrage.IdentityError:
        raise ConfigError("this is no age identity: a line that begins with AGE-SECRET-KEY-1") from None


def _usage(*, signs: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _moment(at: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(at), datetime.UTC)
