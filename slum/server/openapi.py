"""The API described as OpenAPI 3.1, made from the route table and the types it names. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from slum import __version__, api
from slum.server.examples import EXAMPLES
from slum.server.route import Kind, Route

REF = "#/components/schemas/{name}"


def openapi_document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the whole document; https://spec.openapis.org/oas/v3.1.0."""
    routes = tuple(routes)
    types = [t for route in routes for t in (route.response, route.request, route.query) if t is not None]
    schemas, components = msgspec.json.schema_components([*types, api.Problem], ref_template=REF)
    schema_of = {id(t): schema for t, schema in zip([*types, api.Problem], schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of, components)
    problem = {"type": "object", "required": ["error"], "properties": {"error": schema_of[id(api.Problem)]}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "slum",
            "version": __version__,
            "description": 'The control plane\'s API. x-access names whom a route is open to. Errors are {"error": Problem}.',
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": {
                "Problem": {
                    "description": "What went wrong, where, and what next",
                    "content": _content(Kind.JSON, problem),
                }
            },
        },
    }


def _operation(route: Route, schema_of: dict[int, Any], components: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{route.method.lower()}_{route.name.partition('_')[2]}",
        "summary": route.summary,
        "x-access": [str(access.name).lower() for access in route.access],
        "parameters": [*_path_parameters(route), *_query_parameters(route, components)],
        "responses": {**_responses(route, schema_of), "default": {"$ref": "#/components/responses/Problem"}},
    }
    doc = (route.handler.__doc__ or "").strip()
    if doc:
        operation["description"] = re.sub(r"\s+", " ", doc)
    if route.request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": _content(Kind.JSON, schema_of[id(route.request)], EXAMPLES.get(route.request)),
        }
    elif route.method == "PUT":
        operation["requestBody"] = {"required": True, "content": _content(Kind.BYTES, {})}
    return operation


def _responses(route: Route, schema_of: dict[int, Any]) -> dict[str, Any]:
    if route.kind is Kind.WEBSOCKET:
        return {"101": {"description": "A WebSocket of msgpack frames, see slum/wire.py"}}
    if route.response is None:
        content = {} if route.method != "GET" else _content(route.kind, {})
        return {"200": {"description": "Done", **({"content": content} if content else {})}}
    schema = schema_of[id(route.response)]
    return {
        "200": {"description": route.summary, "content": _content(route.kind, schema, EXAMPLES.get(route.response))}
    }


def _content(kind: Kind, schema: Any, example: object = None) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": schema}
    if example is not None:
        media["example"] = msgspec.to_builtins(example)
    return {str(kind): media}


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]


def _query_parameters(route: Route, components: dict[str, Any]) -> list[dict[str, Any]]:
    described = components[route.query.__name__]
    return [
        {"name": name, "in": "query", "required": name in described.get("required", ()), "schema": schema}
        for name, schema in described["properties"].items()
    ]
