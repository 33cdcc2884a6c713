"""Fly's Machines API, one request a call: what its answers look like, and every error turned into ours.

Exceptions of the HTTP library are not kept: their frames hold the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeVar

import httpx
import msgspec

from slum.errors import OperatorError
from slum.frozen import Sparse
from slum.operators.account import CALL_S, Budget, Token, refusal

NONCE = "fly-machine-lease-nonce"
T = TypeVar("T")


class ListedApp(Sparse):
    name: str


class Apps(Sparse):
    apps: tuple[ListedApp, ...] = ()


class Organization(Sparse):
    slug: str = ""


class App(Sparse):
    name: str
    organization: Organization = Organization()


class Config(Sparse):
    metadata: dict[str, str] = {}


class FlyMachine(Sparse):
    id: str
    name: str = ""
    state: str = ""
    instance_id: str = ""
    nonce: str = ""
    created_at: datetime | None = None
    config: Config = Config()


class Volume(Sparse):
    id: str
    name: str = ""
    region: str = ""
    state: str = ""
    attached_machine_id: str | None = None


class Lease(Sparse):
    """The service wraps it as *data*; its description does not."""

    nonce: str = ""
    data: Lease | None = None


class Error(Sparse):
    error: str = ""


class Account:
    """The client of one verb: each call is one request, and its errors are ours."""

    def __init__(self, http: httpx.AsyncClient, token: Token, budget: Budget) -> None:
        self._http = http
        self._token = token
        self._budget = budget

    async def ask(self, what: str, method: str, path: str, answer: type[T], body: Mapping[str, Any] | None = None) -> T:
        """Make one request and return its answer as *answer*; OperatorError when Fly refuses or fails."""
        response = await self._send(what, method, path, body)
        try:
            return msgspec.json.decode(response.content, type=answer)
        except msgspec.DecodeError:
            raise self._refusal(what, "an answer that is none of its API", response) from None

    async def tell(
        self,
        what: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        nonce: str = "",
        timeout_s: float = CALL_S,
    ) -> None:
        """Make one request whose answer says nothing; OperatorError when Fly refuses or fails."""
        await self._send(what, method, path, body, nonce=nonce, timeout_s=timeout_s)

    async def gone(self, what: str, path: str, *, nonce: str = "") -> None:
        """Delete what is at *path*; absent is success."""
        try:
            await self.tell(what, "DELETE", path, nonce=nonce)
        except OperatorError as error:
            if error.status != 404:
                raise

    async def _send(
        self,
        what: str,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        nonce: str = "",
        timeout_s: float = CALL_S,
    ) -> httpx.Response:
        self._budget.spend("Fly")
        headers = {NONCE: nonce} if nonce else {}
        response, why = None, ""
        try:
            response = await self._http.request(method, path, json=body, headers=headers, timeout=timeout_s)
        except httpx.TimeoutException:
            why = "no answer in time"
        except httpx.HTTPError as error:
            why = f"no whole answer ({type(error).__name__})"
        if response is None:
            raise self._refusal(what, why)  # here, so that nothing leads back to the library's frames
        wait = self._budget.note(response.status_code, response.headers)
        if not response.is_success:
            raise self._refusal(what, _why(response), response, wait)
        return response

    def _refusal(
        self, what: str, why: str, response: httpx.Response | None = None, retry_after_s: float | None = None
    ) -> OperatorError:
        status = response.status_code if response is not None else None
        return refusal(
            "Fly",
            what,
            why,
            status=status,
            request_id=response.headers.get("fly-request-id") if response is not None else None,
            retry_after_s=retry_after_s,
            token=self._token,
        )


def _why(response: httpx.Response) -> str:
    try:
        return msgspec.json.decode(response.content, type=Error).error or response.reason_phrase
    except msgspec.DecodeError:
        return response.reason_phrase
