"""The router's configuration: a pure function from a few facts to the JSON that Caddy reads, once, when it starts.

One static wildcard: the labels of the Host header name a symlink below <run>/r, and that symlink is the upstream. So
publishing, flipping and withdrawing a route never touches Caddy. A `listen = "port"` service's link leads to a second
server of the same Caddy, which finds the port as a file's name beside the link. There is nothing to reload: a reload loses
requests (net/http drops what was accepted and not yet read), and Caddy's admin API, which any service could otherwise
reach by planting a link to it as its socket, is off. Inputs are plain values; nothing here opens, starts or reads anything,
and nothing that a service controls (a path, an environment) ever enters the configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from slum.frozen import Frozen
from slum.model import ID_PATTERN, NAME_PATTERN

Json = dict[str, Any]

RETRY_FOR = "500ms"
"""How long a request waits for a socket that is missing or refuses, before it is answered 503: a crashed service that
is started again in that time, or a full backlog that drains, costs nobody an error. Only failed dials are tried again."""
ACCESS_LOG_MB = 4
ACCESS_LOGS_ROTATED = 1
SAMPLE_S = 1
LOGGED_A_SAMPLE = 200
LOGGED_AFTER = 100
"""Of the requests of one second, each of the first 200 is logged, then one in 100, for errors (5xx) and the rest apart:
logging all would cost a tenth of the router's requests/s. node/traffic.py counts with these weights."""


class Issuer(Frozen):
    """Who signs public names' certificates: ACME, or (*internal*) Caddy's own CA, for tests and private networks."""

    internal: bool = False
    email: str | None = None


class RouterFacts(Frozen):
    """All that the configuration depends on. *plain*, *tls*, *redirect* and *ports* are inherited descriptors.

    Requests on *plain* are served as they come, on *tls* after a handshake (one certificate a published name, made on
    demand), and those on *redirect* are sent to https. *ports* takes what links of port services lead to.
    """

    domain: str
    routes: Path
    access_log: Path
    ports: int
    plain: tuple[int, ...] = ()
    tls: tuple[int, ...] = ()
    redirect: tuple[int, ...] = ()
    issuer: Issuer = Issuer()


def is_public(domain: str) -> bool:
    """Return whether certificates can be had for names under *domain*: not for localhost and its like."""
    last = domain.rpartition(".")[2]
    return "." in domain and last not in {"localhost", "local", "test", "internal", "lan", "home", "invalid", "example"}


def caddy_config(facts: RouterFacts) -> Json:
    """Return the whole configuration; equal for equal facts."""
    servers: Json = {"ports": _ports_server(facts)}
    routes = [*_socket_routes(facts), _no_such_name()]
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
        "admin": {"disabled": True, "config": {"persist": False}},
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
    return [
        {"match": [_host(facts, pattern)], "handle": [_proxy(f"unix/{facts.routes}/{name}.sock")], "terminal": True}
        for pattern, name in _names(facts)
    ]


def _names(facts: RouterFacts) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return (pattern of the host's labels, path below <run>/r) for SERVICE.DOMAIN and for ID.SERVICE.DOMAIN.

    Caddy lower-cases these labels and counts them from the right.
    """
    depth = facts.domain.count(".") + 1
    service, instance = (f"{{http.request.host.labels.{depth + more}}}" for more in (0, 1))
    return (NAME_PATTERN, service), (f"{ID_PATTERN}\\.{NAME_PATTERN}", f"{service}/{instance}")


def _host(facts: RouterFacts, pattern: str) -> Json:
    return {"vars_regexp": {"{http.request.host}": {"pattern": f"(?i)^{pattern}\\.{_ending(facts)}$"}}}


def _ending(facts: RouterFacts) -> str:
    return facts.domain.replace(".", r"\.")


def _ports_server(facts: RouterFacts) -> Json:
    """The second stop of requests to port services: the one file in NAME.port/ is named after the port."""
    number = {"vars_regexp": {"{http.matchers.file.relative}": {"name": "port", "pattern": "/([0-9]{1,5})$"}}}
    proxy = _chosen(number, _proxy("127.0.0.1:{http.regexp.port.1}", first=False), _unanswered())
    routes = [
        {
            "match": [_host(facts, pattern)],
            "handle": [_chosen(_file(facts, f"/{name}.port/*"), proxy, _unanswered())],
            "terminal": True,
        }
        for pattern, name in _names(facts)
    ]
    return {
        "listen": [f"fd/{facts.ports}"],
        **_NOT_AUTOMATIC,
        # What comes here passed the first stop, whose X-Forwarded-* are right.
        "trusted_proxies_unix": True,
        "routes": [*routes, _no_such_name()],
        "errors": {"routes": _error_routes()},
    }


def _file(facts: RouterFacts, pattern: str) -> Json:
    """Match when a file's name fits *pattern*, which must have a wildcard: such names are looked up without opening them.

    Caddy opens a file to see whether it is there, which sockets refuse; not so with this policy.
    """
    return {"file": {"root": str(facts.routes), "try_files": [pattern], "try_policy": "first_exist_fallback"}}


def _chosen(match: Json, handler: Json, otherwise: Json) -> Json:
    """Return a handler that is *handler* where *match* holds, else *otherwise*; matched after what is around it."""
    routes = [{"match": [match], "handle": [handler], "terminal": True}, {"handle": [otherwise]}]
    return {"handler": "subroute", "routes": routes}


def _proxy(upstream: str, *, first: bool = True) -> Json:
    """Return the handler that passes a request on. X-Forwarded-* are Caddy's own, and a client's are not believed.

    The transport keeps no connection: an idle one would hold the old generation's socket after a flip, so that it
    never drains, and the next request would reach a process that is about to stop.
    """
    identifier = {"set": {"X-Request-Id": ["{http.request.uuid}"]}}
    return {
        "handler": "reverse_proxy",
        "transport": {"protocol": "http", "keep_alive": {"enabled": False}, "compression": False},
        "upstreams": [{"dial": upstream}],
        "load_balancing": {
            "try_duration": RETRY_FOR,
            "try_interval": "25ms",
            "retry_match": [{"method": ["NONE-ONCE-THE-REQUEST-WAS-SENT"]}],
        },
        **({"headers": {"request": identifier, "response": identifier}} if first else {}),
    }


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
    dialled = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial "}}}
    full = {"vars_regexp": {"{http.error.message}": {"pattern": "^dial .*temporarily unavailable"}}}
    host = "{http.request.host}"
    return [
        {"match": [full], "handle": [_text(503, f"slum: {host} has more requests than it takes")], "terminal": True},
        {"match": [dialled], "handle": [_unanswered()], "terminal": True},
        {"handle": [_text("{http.error.status_code}", f"slum: {host} ended the connection without an answer")]},
    ]


def _unanswered() -> Json:
    return _text(503, "slum: {http.request.host} has no instance that answers")


def _text(status: int | str, line: str) -> Json:
    headers = {"Content-Type": ["text/plain; charset=utf-8"], "Cache-Control": ["no-store"]}
    if status == 503:
        headers["Retry-After"] = ["1"]
    return {"handler": "static_response", "status_code": status, "headers": headers, "body": f"{line}\n"}


def _ask_routes(facts: RouterFacts) -> list[Json]:
    """200 for a name that is published now, 403 for all others, so that strangers cannot make us ask for certificates."""
    yes, no = ({"handler": "static_response", "status_code": status} for status in (200, 403))
    routes: list[Json] = []
    for pattern, name in (
        (f"({NAME_PATTERN})", "/{http.regexp.asked.1}.soc[k]"),
        (f"({ID_PATTERN})\\.({NAME_PATTERN})", "/{http.regexp.asked.2}/{http.regexp.asked.1}.soc[k]"),
    ):
        asked = {"name": "asked", "pattern": f"^{pattern}\\.{_ending(facts)}$"}
        match = {"vars_regexp": {"{http.request.uri.query.domain}": asked}}
        routes.append({"match": [match], "handle": [_chosen(_file(facts, name), yes, no)], "terminal": True})
    return [*routes, {"handle": [no]}]


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
