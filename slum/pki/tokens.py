"""Join tokens: ``<sha256 of the authority's certificate>::<secret>``. Pure, but for the dice of ``new_secret``.

The first part lets the joiner know the authority before it says a word; the second is 160 random bits, told to that
authority only and once. The fleet keeps sha256 of the secret.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

from slum.errors import ConfigError
from slum.frozen import Frozen

SECRET_BYTES = 20
_TOKEN = re.compile(r"([0-9a-f]{64})::([a-z2-7]{32})")


class Token(Frozen):
    """Never printed whole by accident: its repr leaves the secret out."""

    authority: str
    """sha256 of the authority's certificate (DER), hex."""
    secret: str

    def __repr__(self) -> str:
        return f"Token({self.authority[:12]}...)"


def new_secret() -> str:
    return base64.b32encode(secrets.token_bytes(SECRET_BYTES)).decode().lower()


def token_text(authority: str, secret: str) -> str:
    return f"{authority}::{secret}"


def hash_of(secret: str) -> bytes:
    """Return what the ledger keeps of *secret*."""
    return hashlib.sha256(secret.encode()).digest()


def parse(text: str) -> Token:
    """Return the token that *text* is, white space around it aside; ConfigError, which does not repeat it, if none."""
    found = _TOKEN.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            "this is not a join token: 64 hex digits, `::`, and 32 letters and digits",
            hint="copy all of what `slum token new` printed",
        )
    return Token(authority=found[1], secret=found[2])
