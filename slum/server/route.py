"""One row of the route table, and how a request becomes a call of its handler and an answer.

A handler is given a Call whose query and body are decoded already, and returns a document (or a whole Response). Problems
become ``{"error": Problem}``; an unknown exception is logged with its traceback and answered with a generic 500.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast, get_origin, get_type_hints

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.routing import Route as HttpRoute
from starlette.websockets import WebSocket

from slum import log
from slum.errors import ConfigError, SlumError, Unreachable, invariant
from slum.frozen import Frozen
from slum.server.control import Control
from slum.server.guard import Guard
from slum.server.peer import Access, Peer
from slum.server.problems import BUG, Missing, TooLarge, json_response, problem_response
from slum.server.streams import refuse
from slum.server.strict import refuse_names, refuse_unknown

DEADLINE_S = 20.0
BODY_BYTES_MAX = 64 << 10


class Kind(StrEnum):
    JSON = "application/json"
    EVENTS = "text/event-stream"
    BYTES = "application/octet-stream"
    WEBSOCKET = "websocket"


class NoQuery(Frozen, forbid_unknown_fields=True):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, decoded; *connection* is at hand for streams and headers."""

    control: Control
    connection: HTTPConnection
    query: Any = None
    body: Any = None

    @property
    def peer(self) -> Peer:
        peer: Peer = self.connection.state.peer
        return peer

    @property
    def request(self) -> Request:
        invariant(isinstance(self.connection, Request), "this route is no plain HTTP request")
        return cast(Request, self.connection)

    @property
    def websocket(self) -> WebSocket:
        invariant(isinstance(self.connection, WebSocket), "this route is no WebSocket")
        return cast(WebSocket, self.connection)


Handler = Callable[[Call], Awaitable[object]]
"""Returns the document to answer with, a whole Response, or (a WebSocket's) None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Method, path, handler, types and summary: all that Starlette's routes and the OpenAPI page are made from."""

    method: str
    path: str
    handler: Handler
    summary: str
    response: Any = None
    request: Any = None
    query: type[Frozen] = NoQuery
    access: Access = Access.ADMIN
    """Whom it is open to; the guard checks it before the handler hears of the request."""
    kind: Kind = Kind.JSON
    body_bytes_max: int = BODY_BYTES_MAX
    deadline_s: float | None = DEADLINE_S

    @property
    def changes(self) -> bool:
        return self.method not in ("GET", "HEAD")

    @property
    def name(self) -> str:
        return str(getattr(self.handler, "__name__", self.path))


def mount(route: Route, control: Control) -> BaseRoute:
    """Return the Starlette route that serves *route* to those it is open to."""
    mounted: WebSocketRoute | HttpRoute
    if route.kind is Kind.WEBSOCKET:
        mounted = WebSocketRoute(route.path, _websocket(route, control), name=route.name)
    else:
        name = f"{route.method} {route.name}"
        mounted = HttpRoute(route.path, _http(route, control), methods=[route.method], name=name)
    mounted.app = Guard(mounted.app, route.access, control)
    return mounted


def _http(route: Route, control: Control) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        try:
            async with asyncio.timeout(route.deadline_s):
                call = Call(
                    control=control,
                    connection=request,
                    query=decode_query(request.query_params, route.query),
                    body=await _body(request, route) if route.request else None,
                )
                if route.changes:
                    await control.require_majority()
                answer = await route.handler(call)
        except TimeoutError:
            return problem_response(Unreachable(f"{route.method} {route.path} took longer than {route.deadline_s:g} s"))
        except SlumError as error:
            return problem_response(error)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:  # noqa: BLE001  the edge: a bug is answered as one, with its traceback in the log
            log.get().exception("request_failed", method=route.method, path=request.url.path)
            return json_response({"error": BUG}, 500)
        return answer if isinstance(answer, Response) else json_response(answer)

    return endpoint


def _websocket(route: Route, control: Control) -> Callable[[WebSocket], Awaitable[None]]:
    async def endpoint(websocket: WebSocket) -> None:
        try:
            query = decode_query(websocket.query_params, route.query)
            await route.handler(Call(control=control, connection=websocket, query=query))
        except SlumError as error:
            await refuse(websocket, error)

    return endpoint


async def _body(request: Request, route: Route) -> Any:
    """Return the body decoded as the route's type; TooLarge beyond its cap, ConfigError when it does not fit."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > route.body_bytes_max:
            raise TooLarge(f"the body is larger than {route.body_bytes_max:,} bytes")
    try:
        asked = msgspec.json.decode(data, type=route.request)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"the body is not {route.request.__name__}: {error}") from error
    refuse_unknown(data, route.request)
    return asked


def decode_query(given: QueryParams, kind: type[Frozen]) -> Any:
    """Return the query string as *kind*; a field that is a tuple takes every value, others the last one."""
    refuse_names(given, kind)
    hints = get_type_hints(kind)
    values = {name: given.getlist(name) if get_origin(hints.get(name)) is tuple else given[name] for name in set(given)}
    try:
        return msgspec.convert(values, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the query is not understood: {error}") from error


async def not_found(request: Request, _error: Exception) -> Response:
    return problem_response(Missing(f"no {request.method} {request.url.path}", hint="GET /openapi.json lists all"))


async def wrong_method(request: Request, _error: Exception) -> Response:
    return problem_response(ConfigError(f"{request.url.path} has no {request.method}"), 405)
