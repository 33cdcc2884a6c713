"""Placeholders in a service's texts: ``{name} {id} {data_dir} {socket} {port}``, with ``{{`` and ``}}`` for braces.

They stay in the model as written, since their values differ from instance to instance; the agent fills them in. Pure.
"""

from __future__ import annotations

import re

from slum.errors import ConfigError

PLACEHOLDERS = ("name", "id", "data_dir", "socket", "port")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def placeholders(text: str) -> frozenset[str]:
    """Return the names of the known placeholders that *text* uses."""
    return frozenset(found[1] for found in _BRACES.finditer(text) if found[1] in PLACEHOLDERS)


def unknown(text: str) -> tuple[str, ...]:
    """Return the parts of *text* that look like placeholders and are none, in order: ``{ID}``, ``{``."""
    parts = (found for found in _BRACES.finditer(text) if found[0] not in ("{{", "}}"))
    return tuple(found[0] for found in parts if found[1] not in PLACEHOLDERS)


def interpolate(text: str, *, name: str, id: str, data_dir: str, socket: str, port: int | None) -> str:
    """Return *text* with its placeholders filled in; ConfigError for one that is unknown or has no value.

    *name* is the service's, *data_dir* the instance's own folder, *socket* the path of its generation's socket.
    """
    values = {
        "name": name,
        "id": id,
        "data_dir": data_dir,
        "socket": socket,
        "port": None if port is None else str(port),
    }

    def fill(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        value = values.get(found[1] or "")
        if value is None:
            raise ConfigError(f"{found[0]} in {text!r} has no value here", hint="write {{ and }} for braces")
        return value

    return _BRACES.sub(fill, text)
