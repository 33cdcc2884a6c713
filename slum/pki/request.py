"""A key and a certificate request, made where the key shall stay: nodes and the command line use it.

Imports nothing of slum and, besides the standard library, ``cryptography`` only, inside its functions (9 MB). Writes
nothing: see ``keep_key`` of the callers.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes


def new_key() -> bytes:
    """Return a new private key: ECDSA on P-256, PKCS #8, PEM, not encrypted."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_request(key: bytes, name: str = "slum") -> str:
    """Return a certificate request (PEM) that proves possession of *key*; *name* is for people, the signer ignores it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = serialization.load_pem_private_key(key, password=None)
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is not ECDSA")
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name[:64])])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(private, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def key_hash(public: CertificatePublicKeyTypes) -> str:
    """Return sha256 of the public key (SubjectPublicKeyInfo, DER), hex: what a token is bound to."""
    from cryptography.hazmat.primitives import serialization

    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(der).hexdigest()
