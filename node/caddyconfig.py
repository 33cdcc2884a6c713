"""The router's configuration: a pure function from a few facts to the JSON that Caddy reads.

One static wildcard: the labels of the Host header name a symlink below <run>/r, and that symlink is the upstream. So
publishing, flipping and withdrawing a route never touches Caddy. Only `listen = "port"` services, whose port says
nothing in a file name, are listed here one by one. Inputs are plain values; nothing here opens, starts or reads
anything, and nothing that a service controls (a path, an environment) ever enters the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from slum.frozen import Frozen
from slum.model import ID_PATTERN, NAME_PATTERN, host_name

Json = dict[str, Any]

RETRY_FOR = "500ms"
"""How long a request waits for a socket that is missing or refuses, before it is answered 503: a crashed service that
is started again in that time, or a full backlog that drains, costs nobody an error. Only failed dials are tried again."""
STREAMS_OUTLIVE_RELOAD = "24h"
ACCESS_LOG_MB = 4
ACCESS_LOGS_ROTATED = 1
SAMPLE_S = 1
LOGGED_A_SAMPLE = 200
LOGGED_AFTER = 100
"""Of the requests of one second, each of the first 200 is logged, then one in 100, for errors (5xx) and the rest apart:
logging all would cost a tenth of the router's requests/s. node/traffic.py counts with these weights."""


class PortRoute(Frozen):
    """A service that listens on a TCP port of its own; *first*: it also answers for the service's own name."""

    service: str
    id: str
    port: int
    first: bool = True


class Issuer(Frozen):
    """Who signs public names' certificates: ACME, or (*internal*) Caddy's own CA, for tests and private networks."""

    internal: bool = False
    email: str | None = None


class RouterFacts(Frozen):
    """All that the configuration depends on. *plain*, *tls*, *redirect* and *admin* are inherited descriptors.

    Requests on *plain* are served as they come, on *tls* after a handshake (one certificate a published name, made on
    demand), and those on *redirect* are sent to https.
    """

    domain: str
    routes: Path
    access_log: Path
    admin: int
    plain: tuple[int, ...] = ()
    tls: tuple[int, ...] = ()
    redirect: tuple[int, ...] = ()
    port_routes: tuple[PortRoute, ...] = ()
    issuer: Issuer = Issuer()


def is_public(domain: str) -> bool:
    """Return whether certificates can be had for names under *domain*: not for localhost and its like."""
    last = domain.rpartition(".")[2]
    return "." in domain and last not in {"localhost", "local", "test", "internal", "lan", "home", "invalid", "example"}


def caddy_config(facts: RouterFacts) -> Json:
    """Return the whole configuration; equal for equal facts."""
    servers: Json = {}
    routes = [*_port_routes(facts), *_socket_routes(facts), _no_such_name()]
    if facts.plain:
        servers["plain"] = _server(facts.plain, routes)
    if facts.redirect:
        servers["redirect"] = _server(facts.redirect, [_to_https()])
    apps: Json = {}
    if facts.issuer.internal:
        # Else Caddy runs sudo to add its own authority to the machine's trusted ones.
        apps["pki"] = {"certificate_authorities": {"local": {"install_trust": False}}}
    if facts.tls:
        servers["tls"] = {**_server(facts.tls, routes), "tls_connection_policies": [{}]}
        servers["ask"] = {"listen": [ask_address(facts.routes)], **_NOT_AUTOMATIC, "routes": _ask_routes(facts)}
        apps["tls"] = _certificates(facts)
    return {
        "admin": {"listen": f"fd/{facts.admin}", "config": {"persist": False}},
        "logging": _logging(facts.access_log),
        "apps": {**apps, "http": {"servers": servers}},
    }


def ask_address(routes: Path) -> str:
    """Return the loopback address where Caddy answers its own question whether a name is published.

    Caddy asks over TCP only. Every address of 127.0.0.0/8 is this machine, so one derived from the folder's name is as
    good as reserved; whoever else asks there learns what any request to the router would tell.
    """
    a, b, c = sha256(str(routes).encode()).digest()[:3]
    return f"127.{a}.{b}.{1 + c % 254}:8153"


_NOT_AUTOMATIC: Json = {"automatic_https": {"disable": True}}


def _server(descriptors: Sequence[int], routes: list[Json]) -> Json:
    return {
        "listen": [f"fd/{number}" for number in descriptors],
        "protocols": ["h1", "h2", "h2c"],
        **_NOT_AUTOMATIC,
        "read_header_timeout": "30s",
        "idle_timeout": "5m",
        "max_header_bytes": 65536,
        "routes": routes,
        "errors": {"routes": _error_routes()},
        "logs": {"default_logger_name": "router"},
    }


def _socket_routes(facts: RouterFacts) -> list[Json]:
    """Two routes: SERVICE.DOMAIN and ID.SERVICE.DOMAIN. Caddy lower-cases labels and counts them from the right."""
    depth = facts.domain.count(".") + 1
    service, instance = f"{{http.request.host.labels.{depth}}}", f"{{http.request.host.labels.{depth + 1}}}"
    ending = facts.domain.replace(".", r"\.")
    return [
        {
            "match": [{"vars_regexp": {"{http.request.host}": {"pattern": f"(?i)^{name}\\.{ending}$"}}}],
            "handle": _proxy(f"unix/{facts.routes}/{socket}.sock"),
            "terminal": True,
        }
        for name, socket in (
            (NAME_PATTERN, service),
            (f"{ID_PATTERN}\\.{NAME_PATTERN}", f"{service}/{instance}"),
        )
    ]


def _port_routes(facts: RouterFacts) -> list[Json]:
    return [
        {
            "match": [{"host": _hosts(route, facts.domain)}],
            "handle": _proxy(f"127.0.0.1:{route.port}"),
            "terminal": True,
        }
        for route in facts.port_routes
    ]


def _hosts(route: PortRoute, domain: str) -> list[str]:
    names = [host_name(route.service, route.id, domain)]
    return [host_name(route.service, None, domain), *names] if route.first else names


def _proxy(upstream: str) -> list[Json]:
    """Return the handlers that pass a request on. X-Forwarded-* are Caddy's own, and a client's are not believed.

    The transport keeps no connection: an idle one would hold the old generation's socket after a flip, so that it
    never drains, and the next request would reach a process that is about to stop.
    """
    identifier = {"X-Request-Id": ["{http.request.uuid}"]}
    return [
        {
            "handler": "reverse_proxy",
            "transport": {"protocol": "http", "keep_alive": {"enabled": False}, "compression": False},
            "upstreams": [{"dial": upstream}],
            "headers": {"request": {"set": identifier}, "response": {"set": identifier}},
            "load_balancing": {
                "try_duration": RETRY_FOR,
                "try_interval": "25ms",
                "retry_match": [{"method": ["NONE-ONCE-THE-REQUEST-WAS-SENT"]}],
            },
            "stream_close_delay": STREAMS_OUTLIVE_RELOAD,
        }
    ]


def _no_such_name() -> Json:
    """The last route: without it Caddy answers 200 and nothing. Not logged: strangers choose these names."""
    return {
        "handle": [
            {"handler": "vars", "log_skip": True},
            _text(404, "slum: no service has this name here"),
        ]
    }


def _to_https() -> Json:
    location = {"Location": ["https://{http.request.host}{http.request.uri}"]}
    return {"handle": [{"handler": "static_response", "status_code": 308, "headers": location}]}


def _error_routes() -> list[Json]:
    """What a client reads when the upstream cannot be reached, or went away before it answered."""
    dial = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial "}}}
    full = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial .*temporarily unavailable"}}}
    host = "{http.request.host}"
    return [
        {"match": [full], "handle": [_text(503, f"slum: {host} has more requests than it takes")], "terminal": True},
        {"match": [dial], "handle": [_text(503, f"slum: {host} has no instance that answers")], "terminal": True},
        {"handle": [_text("{http.error.status_code}", f"slum: {host} ended the connection without an answer")]},
    ]


def _text(status: int | str, line: str) -> Json:
    headers = {"Content-Type": ["text/plain; charset=utf-8"], "Cache-Control": ["no-store"]}
    if status == 503:
        headers["Retry-After"] = ["1"]
    return {"handler": "static_response", "status_code": status, "headers": headers, "body": f"{line}\n"}


def _ask_routes(facts: RouterFacts) -> list[Json]:
    """200 for a name that is published now, 403 for all others, so that strangers cannot make us ask for certificates."""
    asked = "{http.request.uri.query.domain}"
    ending = facts.domain.replace(".", r"\.")
    pattern = f"^(?:(?P<id>{ID_PATTERN})\\.)?(?P<service>{NAME_PATTERN})\\.{ending}$"
    service, instance = "{http.regexp.asked.service}", "{http.regexp.asked.id}"
    named = {"vars_regexp": {asked: {"name": "asked", "pattern": pattern}}}
    yes = {"handler": "static_response", "status_code": 200}
    files = [f"/{service}/{instance}.sock", f"/{service}.sock"]
    ports = [host for route in facts.port_routes for host in _hosts(route, facts.domain)]
    return [
        {"match": [{"vars": {asked: ports}}], "handle": [yes], "terminal": True},
        {
            "match": [named],
            "handle": [
                {
                    "handler": "subroute",
                    "routes": [
                        {
                            "match": [
                                {
                                    "vars": {instance: [""]},
                                    "file": {"root": str(facts.routes), "try_files": files[1:]},
                                },
                                {
                                    "not": [{"vars": {instance: [""]}}],
                                    "file": {"root": str(facts.routes), "try_files": files[:1]},
                                },
                            ],
                            "handle": [yes],
                            "terminal": True,
                        },
                        {"handle": [{"handler": "static_response", "status_code": 403}]},
                    ],
                }
            ],
            "terminal": True,
        },
        {"handle": [{"handler": "static_response", "status_code": 403}]},
    ]


def _certificates(facts: RouterFacts) -> Json:
    issuer: Json = {"module": "internal"} if facts.issuer.internal else {"module": "acme"}
    if facts.issuer.email and not facts.issuer.internal:
        issuer["email"] = facts.issuer.email
    permission = {"module": "http", "endpoint": f"http://{ask_address(facts.routes)}/"}
    return {
        "automation": {
            "policies": [{"on_demand": True, "issuers": [issuer]}],
            "on_demand": {"permission": permission},
        }
    }


def _logging(access_log: Path) -> Json:
    """Caddy's own words go to stderr, requests to a bounded file without headers: those hold cookies and tokens."""
    access: Json = {
        "writer": {
            "output": "file",
            "filename": str(access_log),
            "mode": "0640",
            "roll_size_mb": ACCESS_LOG_MB,
            "roll_keep": ACCESS_LOGS_ROTATED,
            "roll_compression": "none",
        },
        "include": ["http.log.access"],
        "sampling": {"interval": SAMPLE_S * 10**9, "first": LOGGED_A_SAMPLE, "thereafter": LOGGED_AFTER},
        "encoder": {
            "format": "filter",
            "wrap": {"format": "json"},
            "fields": {
                "request>headers": {"filter": "delete"},
                "request>tls": {"filter": "delete"},
                "resp_headers": {"filter": "delete"},
            },
        },
    }
    own = {"level": "WARN", "exclude": ["http.log.access", "http.log.error", "http.handlers.reverse_proxy"]}
    return {"logs": {"default": own, "access": access}}
