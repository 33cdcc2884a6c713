"""Hetzner's own client, kept to one request a call: no retries and no waits of its own, every error turned into ours.

It is the official hcloud package, imported when it is first used. It knows no asyncio, so a call runs in a thread; one that
is cancelled goes on there to its end, at most CALL_S. Its exceptions are not kept: their frames hold the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from slum import __version__
from slum.errors import OperatorError, invariant
from slum.operators.account import CALL_S, Budget, Token, refusal

if TYPE_CHECKING:
    from hcloud import Client

T = TypeVar("T")


class Project:
    """The client of one verb: each call is one request, and its errors are ours."""

    def __init__(self, endpoint: str, token: Token, budget: Budget) -> None:
        from hcloud import Client

        self._token = token
        self._budget = budget
        self._client: Client = Client(token.reveal(), endpoint, "slum", __version__, timeout=CALL_S)
        inner = self._client._client
        # It would repeat a create by itself and sleep up to a minute in its thread; both are the reconciler's to decide.
        inside = ("_retry_max_retries", "_session", "_headers")
        invariant(all(hasattr(inner, name) for name in inside), "another hcloud inside")
        inner._retry_max_retries = 0
        # On a connection that is used again, an answer that arrives twice would be taken for the next call's.
        inner._headers["Connection"] = "close"
        inner._session.trust_env = False
        inner._session.hooks["response"].append(self._note)
        self._session = inner._session
        self._status: int | None = None
        self._retry_after_s: float | None = None

    def close(self) -> None:
        self._session.close()

    async def call(self, what: str, ask: Callable[[Client], T]) -> T:
        """Return what *ask* returns, which makes one request; OperatorError when the project refuses or fails."""
        import requests
        from hcloud import APIException

        self._budget.spend("Hetzner")
        self._status = self._retry_after_s = None
        try:
            return await asyncio.to_thread(ask, self._client)
        except APIException as error:
            code = str(error.code) if isinstance(error.code, str) else None
            refused = self._refusal(what, error.message or "refused", code, error.correlation_id)
        except requests.exceptions.Timeout:
            refused = self._refusal(what, f"no answer within {CALL_S:g} s")
        except requests.exceptions.RequestException as error:
            refused = self._refusal(what, f"no whole answer ({type(error).__name__})")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            refused = self._refusal(what, f"an answer that is none of its API ({type(error).__name__})")
        raise refused  # here, so that nothing leads back to the library's frames

    async def all(self, what: str, page_of: Callable[..., Any]) -> Sequence[Any]:
        """Return what all pages hold."""
        found: list[Any] = []
        page = 1
        while True:
            items, meta = await self.call(what, partial(page_of, page=page))
            found += items
            after = meta.pagination.next_page if meta.pagination else None
            if after is None:
                return found
            if after <= page:
                raise self._refusal(what, "pages that do not end")
            page = after

    def _note(self, response: Any, *_: Any, **__: Any) -> None:
        self._status = response.status_code
        self._retry_after_s = self._budget.note(response.status_code, response.headers)

    def _refusal(self, what: str, why: str, code: str | None = None, request_id: str | None = None) -> OperatorError:
        return refusal(
            "Hetzner",
            what,
            why,
            status=self._status,
            code=code,
            request_id=request_id,
            retry_after_s=self._retry_after_s,
            token=self._token,
        )
