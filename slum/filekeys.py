"""Every key that slum.toml and tenement.toml may hold: what it is called in the model, and how its value is read.

Tables of data, so that the loader, the did-you-mean and the test of docs/configuration.md share one truth. A reader
takes a TOML value and returns the model's, or raises Wrong with what is wrong; whether a good value makes sense is
validate's to judge. Pure.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from slum.model import (
    Deploy,
    EnvVar,
    FlyOperator,
    HetznerOperator,
    HostKeyPolicy,
    JoinOperator,
    Label,
    Level,
    Listen,
    LocalOperator,
    Restart,
    Secret,
    SshHost,
    SshOperator,
)
from slum.problem import shown

T = TypeVar("T")


class Wrong(Exception):
    """A value that a key cannot hold. *inside* names the part of it, when it is a table or a list.

    *more* are further faults of the same value, *rest* is what could be read of it, None when nothing could.
    """

    def __init__(self, message: str, *inside: str | int, more: tuple[Wrong, ...] = (), rest: object = None) -> None:
        super().__init__(message)
        self.message = message
        self.inside = inside
        self.more = more
        self.rest = rest

    @property
    def faults(self) -> tuple[Wrong, ...]:
        return (self, *self.more)


class KeySpec(NamedTuple):
    """*field* of the model gets what *read* returns. *stand_in* is set for a required key: used when it is missing."""

    field: str
    read: Callable[[Any], object]
    stand_in: object = None


def text(value: object) -> str:
    if isinstance(value, str):
        return value
    quoted = f"; write {shown(shown(value))}" if isinstance(value, bool | int | float) else ""
    raise Wrong(f"{shown(value)} is not text{quoted}")


def whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Wrong(f"{shown(value)} is not a whole number")
    return value


def number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"{shown(value)} is not a number")
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def number_or_none(value: object) -> float | None:
    """Zero means the same as leaving the key out."""
    return number(value) or None


def choice(kind: type[StrEnum]) -> Callable[[object], StrEnum]:
    def read(value: object) -> StrEnum:
        if isinstance(value, str) and value in {str(member) for member in kind}:
            return kind(value)
        raise Wrong(f"{shown(value)} is none of {', '.join(kind)}")

    return read


def texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise Wrong(f"{shown(value)} is not a list of texts")
    for position, item in enumerate(value):
        if not isinstance(item, str):
            raise Wrong(f"{shown(item)} is not text", position)
    return tuple(value)


def names(value: object) -> tuple[str, ...]:
    """A list whose order means nothing."""
    return tuple(sorted(texts(value)))


def text_or_texts(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else texts(value)


def words(value: object) -> tuple[str, ...]:
    """A command: a list as it stands, or one text split as a shell would, without running one."""
    if not isinstance(value, str):
        return texts(value)
    try:
        return tuple(shlex.split(value))
    except ValueError as error:
        raise Wrong(f"{shown(value)}: {str(error).lower()}") from error


def variables(value: object) -> tuple[EnvVar, ...]:
    return _pairs(value, lambda name, item: EnvVar(name=name, value=text(item)))


def secrets(value: object) -> tuple[Secret, ...]:
    return _pairs(value, _secret)


def labels(value: object) -> tuple[Label, ...]:
    return _pairs(value, lambda name, item: Label(name=name, value=text(item)))


def _secret(name: str, value: object) -> Secret:
    if not isinstance(value, str):  # never show what may be the secret itself
        raise Wrong('is neither "file:/absolute/path" nor "env:NAME"')
    return Secret(name=name, source=value)


def _pairs(value: object, make: Callable[[str, object], T]) -> tuple[T, ...]:
    """Read a table of texts, all of it, whatever is wrong with one of them."""
    if not isinstance(value, dict):
        raise Wrong(f"{shown(value)} is not a table of texts")
    found, faults = [], []
    for name, item in sorted(value.items()):
        try:
            found.append(make(name, item))
        except Wrong as wrong:
            faults.append(Wrong(wrong.message, name))
    if faults:
        raise Wrong(faults[0].message, *faults[0].inside, more=tuple(faults[1:]), rest=tuple(found))
    return tuple(found)


def hosts(value: object) -> tuple[SshHost, ...]:
    """``"user@host:port"`` texts, or tables with the fields of SSH_HOST."""
    if not isinstance(value, list):
        raise Wrong(f'{shown(value)} is not a list of hosts such as "root@203.0.113.7"')
    found, faults = [], []
    for position, item in enumerate(value):
        try:
            found.append(_host_of_table(item) if isinstance(item, dict) else _host_of_text(text(item)))
        except Wrong as wrong:
            faults.append(Wrong(wrong.message, position, *wrong.inside))
    if faults:
        raise Wrong(faults[0].message, *faults[0].inside, more=tuple(faults[1:]))
    return tuple(found)


def _host_of_text(value: str) -> SshHost:
    user, at, rest = value.rpartition("@")
    if at and not user:
        raise Wrong(f"{shown(value)} is not user@host:port")
    if rest.startswith("["):  # [IPv6] or [IPv6]:port
        host, closed, port = rest[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise Wrong(f"{shown(value)} is not user@[address]:port")
        port = port[1:] if port else "22"
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    else:
        host, port = rest, "22"
    if not (port.isascii() and port.isdigit() and len(port) <= 5):
        raise Wrong(f"{shown(value)} is not user@host:port")
    return SshHost(host=host, user=user or None, port=int(port))


def _host_of_table(value: dict[str, object]) -> SshHost:
    fields: dict[str, Any] = {}
    for key, item in value.items():
        if key not in SSH_HOST:
            raise Wrong(f"unknown key; known are {', '.join(SSH_HOST)}", key)
        try:
            fields[SSH_HOST[key].field] = SSH_HOST[key].read(item)
        except Wrong as wrong:
            raise Wrong(wrong.message, key, *wrong.inside) from wrong
    if "host" not in fields:
        raise Wrong("has no `host`")
    return SshHost(**fields)


def _plain(read: Callable[[Any], object], *keys: str) -> dict[str, KeySpec]:
    """Keys that have the same name in the model."""
    return {key: KeySpec(key, read) for key in keys}


def _seconds(*keys: str) -> dict[str, KeySpec]:
    return {key: KeySpec(f"{key}_s", number) for key in keys}


def _need(key: str, read: Callable[[Any], object] = text, stand_in: object = "x") -> dict[str, KeySpec]:
    return {key: KeySpec(key, read, stand_in)}


FLEET: Mapping[str, KeySpec] = _plain(text, "name", "domain")

SSH_HOST: Mapping[str, KeySpec] = {
    **_plain(text, "host", "user", "fingerprint"),
    **_plain(whole, "port"),
    **_plain(labels, "labels"),
}

_TOKENS = _plain(text, "token_env", "secrets_ref")
OPERATORS: Mapping[str, tuple[type[Any], Mapping[str, KeySpec]]] = {
    "local": (LocalOperator, _plain(text, "member")),
    "ssh": (
        SshOperator,
        {
            **_need("hosts", hosts, (SshHost(host="x"),)),
            **_plain(text, "user", "key", "jump", "jump_fingerprint"),
            **_plain(choice(HostKeyPolicy), "host_key"),
            **_plain(text, "known_hosts"),
        },
    ),
    "fly": (
        FlyOperator,
        {
            **_need("org"),
            **_need("region", text, "xxx"),
            **_plain(text, "image", "cpu_kind"),
            **_plain(whole, "cpus", "memory_mb", "volume_gb"),
            **_TOKENS,
        },
    ),
    "hetzner": (
        HetznerOperator,
        {
            **_need("location"),
            **_need("server_type"),
            **_plain(text, "image"),
            **_plain(texts, "ssh_keys"),
            **_TOKENS,
        },
    ),
    "join": (JoinOperator, {}),
}

TENEMENT: Mapping[str, KeySpec] = {
    **_need("operator"),
    **_plain(text, "config"),
    **_plain(whole, "count"),
    **_plain(labels, "labels"),
}

SETTINGS: Mapping[str, KeySpec] = {
    **_plain(text, "data_dir"),
    **_seconds("health_check_interval"),
    **_plain(whole, "max_restarts"),
    **_seconds("restart_window"),
    **_plain(whole, "backoff_base_ms", "backoff_max_ms"),
}

SERVICE: Mapping[str, KeySpec] = {
    **_need("command", words, ("x",)),
    "args": KeySpec("args", texts),
    **_plain(text, "workdir", "source", "build", "pre_deploy"),
    **_plain(variables, "env"),
    **_plain(secrets, "secrets"),
    **_plain(choice(Listen), "listen"),
    **_plain(text, "socket"),
    **_plain(whole, "port"),
    **_plain(text, "health"),
    **_plain(names, "depends_on"),
    **_plain(choice(Deploy), "deploy"),
    **_seconds("drain_timeout"),
    **_plain(choice(Restart), "restart"),
    **_seconds("startup_timeout", "stop_timeout"),
    "request_timeout": KeySpec("request_timeout_s", number_or_none),
    "idle_timeout": KeySpec("idle_timeout_s", number_or_none),
    **_plain(choice(Level), "isolation"),
    **_plain(whole, "memory_limit_mb", "cpu_shares", "pids_limit", "storage_quota_mb"),
    **_plain(text, "image", "rootfs", "kernel"),
    **_plain(whole, "memory_mb", "vcpus"),
}
"""*args* is not in the model: it is appended to *command*."""

ROUTING: Mapping[str, KeySpec] = {"listen": KeySpec("routing_listen", text_or_texts)}

SLUM_TABLES = ("fleet", "operators", "tenement")
TENEMENT_TABLES = ("settings", "service", "process", "instances", "routing")
"""The tables of a tenement.toml, which may stand inline below [tenement.X] as well."""
SERVICE_ALIASES: Mapping[str, str] = {"runtime": "isolation"}
"""Old key -> key; the table ``process`` is likewise an old word for ``service``."""
