"""What one account at a provider comes down to: a token, a budget of calls, and errors said once in our own words.

All operators of one account in this process share one Budget: what the provider says about its limits is kept there, and
while it asks to be left alone every call fails at once with the seconds left, none is sent. Nothing is retried here. A
token is read when it is needed, never kept longer than a verb, and no repr, message or traceback line shows it.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from itertools import chain, repeat
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

from slum.errors import ConfigError, OperatorError

CALL_S = 20.0
"""How long one request may take; after that what came of it is unknown."""
SETTLE_S = 12.0
"""How long a provider's list may lag behind what was done; what it does not show after that is not there."""
PAUSES_S = (1.0, 1.0, 2.0, 3.0, 5.0)
RESET_S_MAX = 60.0
"""RateLimit-Reset tells when the whole quota is back; some of it is back long before."""
RETRY_S = 5.0
"""After a refusal that does not say how long."""
TEXT_MAX = 300
_TOKEN = re.compile(r"[\x21-\x7e]+(?: [\x21-\x7e]+)?")

HINTS: Mapping[str | int, str] = {
    "locked": "another action still works on it; it is tried again by itself",
    "conflict": "it changed meanwhile; it is tried again by itself",
    "resource_unavailable": "there is no room for it now; it is tried again, or name another type or location",
    "placement_error": "there is no room for it now; it is tried again, or name another type or location",
    "resource_limit_exceeded": "the account's limit is reached; ask the provider for more, or remove something",
    "uniqueness_error": "something else in the account has this name; remove or rename it",
    "rate_limit_exceeded": "too many calls in this account; it goes on by itself when the provider allows it",
    "unauthorized": "the token is not valid: look at the variable or file that it is taken from",
    "forbidden": "the token may not do this: it needs to read and write",
    "protected": "it is protected against deletion at the provider: take that off there, if you mean it",
    "invalid_input": "the provider does not take a value; `slum plan` checks the operator's settings",
    "invalid_server_type": "the location or image does not go with this type; `slum plan` checks the operator's settings",
    "maintenance": "the provider is being maintained; it is tried again by itself",
    401: "the token is not valid: look at the variable or file that it is taken from",
    403: "the token may not do this, or not in this organisation",
    404: "it is not there, or this token may not see it",
    408: "it took too long; it is tried again by itself",
    409: "it changed meanwhile, or its name is taken; it is tried again by itself",
    412: "its state does not allow it now; it is tried again by itself",
    422: "the provider does not take a value; look at the operator's settings",
    423: "another action still works on it; it is tried again by itself",
    429: "too many calls in this account; it goes on by itself when the provider allows it",
}
BROKEN_HINT = "the provider has a trouble of its own; what came of the call is looked for, then it is tried again"


class Clock(Protocol):
    def now(self) -> float:
        """Return seconds that only grow."""
        ...

    def wall(self) -> float:
        """Return the seconds since 1970."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class RealClock:
    now = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


REAL = RealClock()


class Token:
    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the token, for the header of a request and nothing else."""
        return self._value

    def __repr__(self) -> str:
        return "Token(hidden)"


class Hidden(str):
    """A text with a secret in it, on its way to a provider."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "(hidden)"


class Variables:
    """The environment, to look names up in. Unlike the mapping itself it shows nothing to whoever prints it."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def get(self, name: str) -> str:
        return self._values.get(name, "")


def read_token(name: str, token_env: str, secrets_ref: str | None, variables: Variables) -> Token:
    """Return the token of operator *name*, from *secrets_ref* ("file:/abs", "env:NAME") or else the variable *token_env*."""
    kind, _, rest = (secrets_ref or f"env:{token_env}").partition(":")
    if kind not in ("env", "file"):
        raise ConfigError(
            f"operators.{name}.secrets_ref: {kind}: is not supported", hint='use "file:/abs" or "env:NAME"'
        )
    where = f"the variable {rest}" if kind == "env" else f"the file {rest}"
    try:
        token = Token(variables.get(rest).strip() if kind == "env" else Path(rest).read_text(errors="replace").strip())
    except OSError as error:
        raise ConfigError(f"operators.{name}: {where} cannot be read: {error.strerror}") from error
    if not token.reveal():
        raise ConfigError(
            f"operators.{name}: {where} holds no token",
            hint="the control plane reads it, not your shell: `slum secret set NAME --operator` gives it one",
        )
    if not _TOKEN.fullmatch(token.reveal()):  # a library that refuses it in a header would show it
        raise ConfigError(f"operators.{name}: what {where} holds is no token: it has blanks or other odd characters")
    return token


def checked_endpoint(url: str) -> str:
    """Return *url* without its last slash; ConfigError when a token would travel in the clear."""
    parts = urlsplit(url)
    inside = parts.hostname in ("127.0.0.1", "::1", "localhost") or (parts.hostname or "").endswith(".internal")
    if parts.scheme != "https" and not (parts.scheme == "http" and inside):
        raise ConfigError(f"{url!r} is no https address, and tokens go nowhere else")
    return url.rstrip("/")


class Budget:
    """What an account may still ask for."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until = 0.0
        self.calls = 0

    def spend(self, provider: str) -> None:
        """Count one call, or raise OperatorError while the provider wants none."""
        left = self._until - self._clock.now()
        if left > 0:
            raise OperatorError(
                f"{provider} takes no more calls of this account for {left:.0f} s",
                hint=HINTS["rate_limit_exceeded"],
                status=429,
                provider_code="rate_limit_exceeded",
                retry_after_s=left,
            )
        self.calls += 1

    def note(self, status: int, headers: Mapping[str, str]) -> float | None:
        """Take in what an answer says about limits; return how many seconds to stay away, None when nothing is said."""
        wait = _retry_after(headers, self._clock.wall())
        if status == 429 and wait is None:
            wait = _until_reset(headers, self._clock.wall())
        if status == 429:
            self._until = max(self._until, self._clock.now() + (RETRY_S if wait is None else wait))
            return RETRY_S if wait is None else wait
        return wait


def pauses(clock: Clock, provider: str, longest_s: float) -> Iterator[float]:
    """Yield how long to wait before each look at something unfinished, first not at all; raise after *longest_s*."""
    end = clock.now() + longest_s
    for pause in chain((0.0,), PAUSES_S, repeat(PAUSES_S[-1])):
        if clock.now() > end:
            raise refusal(provider, "wait", "it does not come to an end", status=408)
        yield pause


_BUDGETS: WeakKeyDictionary[Clock, dict[tuple[str, bytes], Budget]] = WeakKeyDictionary()


def budget_of(endpoint: str, token: Token, clock: Clock) -> Budget:
    """Return the one budget in this process of the account that *token* is for."""
    account = (endpoint, hashlib.sha256(token.reveal().encode()).digest())
    return _BUDGETS.setdefault(clock, {}).setdefault(account, Budget(clock))


def refusal(
    provider: str,
    what: str,
    why: str,
    *,
    status: int | None = None,
    code: str | None = None,
    request_id: str | None = None,
    retry_after_s: float | None = None,
    token: Token | None = None,
) -> OperatorError:
    """Return the one error for a call that failed: *what* was asked, *why* it was not done, with a hint by code."""
    hint = HINTS.get(code or "") or HINTS.get(status or 0) or BROKEN_HINT
    said = why if token is None else why.replace(token.reveal(), "(hidden)")
    named = ", ".join(str(part) for part in (status, code) if part)
    return OperatorError(
        f"{provider}: {what}: {said[:TEXT_MAX]}{f' ({named})' if named else ''}",
        hint=hint,
        status=status,
        provider_code=code,
        request_id=request_id,
        retry_after_s=retry_after_s,
    )


def _retry_after(headers: Mapping[str, str], wall: float) -> float | None:
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - wall) if value else None
    except ValueError:
        return None


def _until_reset(headers: Mapping[str, str], wall: float) -> float | None:
    value = headers.get("RateLimit-Reset", "").strip()
    return min(max(float(value) - wall, 1.0), RESET_S_MAX) if value.isdecimal() else None
