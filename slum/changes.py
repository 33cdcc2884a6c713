"""Two versions of one struct of the model -> the fields that differ, in the files' words, as text for people. Pure.

Secrets never appear, nor do values of `env` that look like credentials.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec

from slum import credentials
from slum.actions import Change
from slum.model import EnvVar, Label, Secret, Settings, SshHost
from slum.problem import file_key, shown

TEXT_MAX = 200
"""Characters of a value that a change shows."""


def changes_of(
    old: msgspec.Struct, new: msgspec.Struct, *, skip: tuple[str, ...] = (), prefix: str = ""
) -> tuple[Change, ...]:
    """Return the fields in which two structs of one type differ, tables name by name, secrets hidden."""
    found: list[Change] = []
    for field in new.__struct_fields__:
        before, after = getattr(old, field), getattr(new, field)
        if field in skip or before == after:
            continue
        key = prefix + file_key(field).replace("routing_listen", "routing.listen")
        if isinstance(after, Settings):
            found += changes_of(before, after, prefix=f"{key}.")
        elif field in ("env", "secrets", "labels"):
            found += _table_changes(key, before, after)
        else:
            found.append(Change(key=key, before=text_of(before, field), after=text_of(after, field)))
    return tuple(found)


Pair = EnvVar | Secret | Label


def _table_changes(key: str, before: tuple[Pair, ...], after: tuple[Pair, ...]) -> Iterator[Change]:
    olds, news = {pair.name: pair for pair in before}, {pair.name: pair for pair in after}
    for name in sorted({*olds, *news}):
        old, new = olds.get(name), news.get(name)
        if old != new:
            yield Change(key=f"{key}.{name}", before=_pair_text(old), after=_pair_text(new))


def _pair_text(pair: Pair | None) -> str:
    if pair is None:
        return "none"
    if isinstance(pair, Secret) or (isinstance(pair, EnvVar) and credentials.is_credential(pair.name, pair.value)):
        return credentials.HIDDEN
    return text_of(pair.value)


def text_of(value: Any, field: str = "") -> str:
    """Return a field's value as text for people: texts quoted, commands as one would type them, nothing secret."""
    if value is None:
        return "none"
    if field == "bundle":
        return str(value)[:12]
    if isinstance(value, StrEnum):
        return str(value)
    if field == "command":
        value = shlex.join(value)
    if isinstance(value, str):
        return shown(credentials.mask(value), TEXT_MAX)
    if isinstance(value, tuple):
        return _short("[" + ", ".join(_host_text(v) if isinstance(v, SshHost) else text_of(v) for v in value) + "]")
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _host_text(host: SshHost) -> str:
    return f"{host.user}@{host.host}:{host.port}" if host.user else f"{host.host}:{host.port}"


def _short(text: str) -> str:
    return text if len(text) <= TEXT_MAX else text[:TEXT_MAX] + "..."
