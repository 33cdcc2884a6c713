"""The Caddyfile of a tenement: the same host names to the same instances. Pure; names and numbers only, no free text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

PRIVATE = frozenset({"localhost", "local", "test", "internal", "lan", "home", "invalid", "example"})


class Upstream(msgspec.Struct, frozen=True, kw_only=True):
    """Where an instance answers: *to* is a Caddy upstream address; *first* also serves the service's own name."""

    service: str
    id: str
    first: bool
    to: str
    timeout_s: float | None = None


def is_public(domain: str) -> bool:
    """Tell whether certificates can be had for names under *domain*."""
    return "." in domain and domain.rpartition(".")[2] not in PRIVATE


def caddyfile(domain: str, listen: Sequence[str], upstreams: Sequence[Upstream]) -> str:
    """Return a Caddyfile that serves SERVICE.DOMAIN and ID.SERVICE.DOMAIN; $DOMAIN is set beside it.

    Port 443 means TLS, with Caddy's own authority where a *domain* is not a public one.
    """
    ports = sorted({int(address.rpartition(":")[2]) for address in listen})
    tls = 443 in ports
    certificates = "auto_https off" if not tls else "" if is_public(domain) else "local_certs"
    lines = ["{", "\tadmin off", *([f"\t{certificates}"] if certificates else []), "}"]
    for upstream in upstreams:
        names = [f"{upstream.id}.{upstream.service}"]
        if upstream.first:
            names.insert(0, upstream.service)
        sites = [_site(name, port, tls=tls) for name in names for port in ports if not (tls and port == 80)]
        lines += ["", ", ".join(sites) + " {"]
        if upstream.timeout_s is None:
            lines.append(f"\treverse_proxy {upstream.to}")
        else:
            span = f"{upstream.timeout_s:.9f}".rstrip("0").rstrip(".")
            lines += [f"\treverse_proxy {upstream.to} {{", "\t\ttransport http {"]
            lines += [f"\t\t\tresponse_header_timeout {span}s", "\t\t}", "\t}"]
        lines.append("}")
    return "\n".join(lines) + "\n"


def read_timeouts(text: str) -> dict[str, float]:
    """Return upstream -> seconds, for those that a caddyfile() limits."""
    pattern = r"^\treverse_proxy (\S+) \{\n\t\ttransport http \{\n\t\t\tresponse_header_timeout ([0-9.]+)s$"
    return {to: float(span) for to, span in re.findall(pattern, text, re.MULTILINE)}


def _site(name: str, port: int, *, tls: bool) -> str:
    """With certificates Caddy answers on 443 by itself and sends port 80 there."""
    host = f"{name}.{{$DOMAIN}}"
    return host if tls and port == 443 else f"http://{host}:{port}"
