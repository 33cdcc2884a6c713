"""What looks like a credential, judged by its name and its shape: warned about in files, hidden where shown. Pure.

A guess by design: it must never decide whether something runs, only what is shown and warned about.
"""

from __future__ import annotations

import re

HIDDEN = "(hidden)"

_NAME = re.compile(
    r"PASSW(OR)?D|PASSPHRASE|SECRET|TOKEN|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNING_?KEY|ENCRYPTION_?KEY|CREDENTIAL",
    re.IGNORECASE,
)
_NAME_OF_PLACE = re.compile(r"_(FILE|PATH|DIR|URL|NAME|TTL|HEADER|BYTES|SECONDS|COUNT|MAX|ENV)$", re.IGNORECASE)
_IN_URL = re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@]{0,200}:)([^\s/@]{1,500})(?=@)", re.IGNORECASE)
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{30,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{30,}|\bglpat-[A-Za-z0-9_-]{20}|\b[sr]k_(live|test)_[A-Za-z0-9]{16,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abprs]-[A-Za-z0-9-]{10,}|\bFlyV1 [A-Za-z0-9_]{8,}|\bAIza[A-Za-z0-9_-]{35}"
    r"|\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\."
)
_OPTION = re.compile(
    r"(--?[a-z-]{0,40}(?:password|passwd|secret|token|api-?key)(?:=|\s+))('[^']*'|\"[^\"]*\"|[^\s'\"]+)", re.IGNORECASE
)


def is_credential(name: str, value: str) -> bool:
    """Tell whether the variable *name* with *value* is likely to hold a secret."""
    if not value:
        return False
    if _NAME.search(name) and not _NAME_OF_PLACE.search(name):
        return True
    return bool(_IN_URL.search(value) or _SHAPES.search(value))


def mask(text: str) -> str:
    """Return *text* for showing: passwords in URLs and options, and well-known keys, are hidden."""
    if _SHAPES.search(text):
        return HIDDEN
    return _OPTION.sub(rf"\1{HIDDEN}", _IN_URL.sub(rf"\1{HIDDEN}", text))
