"""Put a fleet together from instances that an import found one by one.

An import sees containers or apps, each with all its texts filled in; a fleet has services with ids. Instances of one
service become one again, with ``{id}`` where they differ. Whatever comes out keeps slum's own rules for names, since a
stranger's file knows none of them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from slum.exports.base import Losses
from slum.exports.container import as_one
from slum.model import DEFAULT_ID, EnvVar, Label, Listen, Secret, Service, Settings, Tenement

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
RESERVED = re.compile(r"SLUM_.*|LISTEN_(FDS|PID|FDNAMES)|SOCKET_PATH|PORT")


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One instance as an import read it; *service* has its texts as slum.toml writes them, and this id alone."""

    tenement: str
    id: str
    service: Service


def name_of(text: str, taken: Sequence[str] = (), length: int = 32) -> str:
    """Return the nearest name to *text* that slum allows and that is not *taken*."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-") or "x"
    name, number = plain, 2
    while name in taken:
        end = f"-{number}"
        name, number = plain[: length - len(end)].strip("-") + end, number + 1
    return name


def services_of(found: Sequence[Found], losses: Losses) -> tuple[Service, ...]:
    """Return the services of one tenement, sorted by name; instances that cannot be one service are kept apart."""
    by_name: dict[str, list[Found]] = {}
    for item in found:
        by_name.setdefault(item.service.name, []).append(item)
    services: list[Service] = []
    for name, items in by_name.items():
        one = _merged(items)
        if one is not None:
            services.append(one)
            continue
        for item in items:
            apart = name_of(f"{name}-{item.id}", [*by_name, *(s.name for s in services)])
            services.append(msgspec.structs.replace(item.service, name=apart, instances=(DEFAULT_ID,)))
            losses.add(f"{name}.{item.id}", f"service {apart}", "its instances differ in more than their id")
    return tuple(sorted(services, key=lambda service: service.name))


def _merged(items: Sequence[Found]) -> Service | None:
    first = items[0].service
    ids = [item.id for item in items]
    if len(items) == 1:
        return msgspec.structs.replace(first, instances=tuple(ids))
    if len(set(ids)) != len(ids):
        return None
    body = msgspec.structs.replace(first, command=(), env=(), workdir=None, socket=None, instances=())
    for item in items:
        other = msgspec.structs.replace(item.service, command=(), env=(), workdir=None, socket=None, instances=())
        if other != body or len(item.service.command) != len(first.command):
            return None
        if [v.name for v in item.service.env] != [v.name for v in first.env]:
            return None
    command = [_one(ids, [item.service.command[n] for item in items]) for n in range(len(first.command))]
    env = [_one(ids, [item.service.env[n].value for item in items]) for n in range(len(first.env))]
    workdir, socket = (_one(ids, [getattr(item.service, key) for item in items]) for key in ("workdir", "socket"))
    if _LOST in (*command, *env, workdir, socket):
        return None
    return msgspec.structs.replace(
        first,
        command=tuple(str(word) for word in command),
        env=tuple(EnvVar(name=v.name, value=str(value)) for v, value in zip(first.env, env, strict=True)),
        workdir=workdir,
        socket=socket,
        instances=tuple(ids),
    )


_LOST = "\0"
"""No text of a fleet holds it."""


def _one(ids: Sequence[str], texts: Sequence[str | None]) -> str | None:
    """Return the template of *texts*, None when there are none, _LOST when no template gives them all."""
    known = [(one, text) for one, text in zip(ids, texts, strict=True) if text is not None]
    if not known:
        return None
    made = as_one(known) if len(known) == len(texts) else None
    return _LOST if made is None else made


def free_port(services: Sequence[Service]) -> int:
    """Return the port nearest to 8080 that no service has, for the router."""
    taken = {service.port for service in services if service.listen is Listen.PORT}
    return next(port for port in range(8080, 65536) if port not in taken)


def tenement_of(
    name: str,
    operator: str,
    found: Sequence[Found],
    losses: Losses,
    *,
    settings: Settings,
    labels: Mapping[str, str],
    routing: Sequence[str] = (),
) -> Tenement:
    """Return the tenement of *found*; without *routing* its router gets a port that no service has."""
    services = services_of(found, losses)
    port = free_port(services)
    return Tenement(
        name=name,
        operator=operator,
        settings=settings,
        labels=tuple(Label(name=key, value=value) for key, value in sorted(labels.items())),
        services=services,
        routing_listen=tuple(routing) or (f"127.0.0.1:{port}", f"[::1]:{port}"),
    )


def variables(env: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, Any]:
    """Return the model's *env* and *secrets*, sorted, as keyword arguments."""
    return {
        "env": tuple(EnvVar(name=name, value=value) for name, value in sorted(env.items())),
        "secrets": tuple(Secret(name=name, source=source) for name, source in sorted(secrets.items())),
    }
