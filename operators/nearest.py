"""What to say of a name that a provider does not know: what it has that is nearest. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

SHOWN_MAX = 5


def missing(key: str, name: str, there: Sequence[str], why: str = "is not known") -> str:
    """Return "KEY: NAME WHY; nearest: ...", the most alike first, else the first few of all."""
    near = get_close_matches(name, there, n=SHOWN_MAX, cutoff=0.5) or sorted(there)[:SHOWN_MAX]
    return f'{key}: "{name}" {why}; ' + (f"nearest: {', '.join(near)}" if near else "the account has none")
