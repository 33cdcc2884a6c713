"""The shape of what is read of a Compose file: each key's kind, so that a wrong one is one clear error. Pure.

Source: the compose-spec JSON schema, for the keys that an import looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slum.errors import ConfigError
from slum.exports.interpolation import fill

SCALAR = "a text or number"
TEXTS = [SCALAR]
TABLE: Mapping[str, Any] = {"*": SCALAR}
ANY = "anything"

Shape = Any
"""SCALAR, ANY, [shape of the items], {key: shape, "*": shape of the others}, or (alternatives)."""

LIMITS = {"memory": SCALAR, "pids": SCALAR, "cpus": SCALAR, "*": ANY}
SERVICE: Mapping[str, Shape] = {
    "image": SCALAR,
    "build": (
        SCALAR,
        {
            "context": SCALAR,
            "dockerfile": SCALAR,
            "dockerfile_inline": SCALAR,
            "additional_contexts": (TABLE, TEXTS),
            "*": ANY,
        },
    ),
    "command": (SCALAR, TEXTS),
    "entrypoint": (SCALAR, TEXTS),
    "environment": (TABLE, TEXTS),
    "ports": [(SCALAR, {"*": ANY})],
    "expose": TEXTS,
    "volumes": [(SCALAR, {"*": ANY})],
    "depends_on": (TEXTS, {"*": ANY}),
    "restart": SCALAR,
    "healthcheck": {
        "test": (SCALAR, TEXTS),
        "interval": SCALAR,
        "start_period": SCALAR,
        "*": ANY,
    },
    "deploy": {"replicas": SCALAR, "resources": {"limits": LIMITS, "*": ANY}, "*": ANY},
    "secrets": [(SCALAR, {"source": SCALAR, "target": SCALAR, "*": ANY})],
    "labels": (TABLE, TEXTS),
    **dict.fromkeys(("mem_limit", "cpus", "cpu_shares", "pids_limit", "scale", "working_dir", "runtime"), SCALAR),
    "stop_grace_period": SCALAR,
    "*": ANY,
}
SECRETS: Shape = {"*": {"file": SCALAR, "environment": SCALAR, "*": ANY}}


def shaped(value: object, shape: Shape, at: str) -> Any:
    """Return *value* without keys that hold nothing; ConfigError that names *at* when its shape is another one.

    Below a table of scalars a key may hold nothing: in `environment` that means something.
    """
    if shape is ANY:
        return value
    if isinstance(shape, tuple):
        for kind in shape:
            if _is(value, kind):
                return shaped(value, kind, at)
        raise ConfigError(f"{at}: {_shown(value)} does not stand here in a Compose file")
    if not _is(value, shape):
        raise ConfigError(f"{at}: {_shown(value)} does not stand here in a Compose file")
    if isinstance(shape, Mapping):
        table: dict[Any, Any] = value if isinstance(value, dict) else {}
        kept = {str(key): item for key, item in table.items() if item is not None or shape is TABLE}
        rest = shape.get("*")
        return {
            key: item if item is None else shaped(item, shape.get(key, rest), f"{at}.{key}")
            for key, item in kept.items()
        }
    if isinstance(shape, list):
        items: list[Any] = value if isinstance(value, list) else []
        return [shaped(item, shape[0], f"{at}.{number}") for number, item in enumerate(items)]
    return value


def whole(value: object, at: str) -> int:
    """Return a whole number that may be a text with variables; ConfigError that names *at* when it is none."""
    return int(number(value, at))


def number(value: object, at: str) -> float:
    text = fill(str(value)).text
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if not abs(found) < 1e15:
        raise ConfigError(f"{at}: {text[:40]!r} is not a number", hint="give its variable a default")
    return found


def _is(value: object, shape: Shape) -> bool:
    if shape is SCALAR:
        return isinstance(value, str | int | float | bool)
    if isinstance(shape, Mapping):
        return isinstance(value, dict)
    return isinstance(value, list) if isinstance(shape, list) else True


def _shown(value: object) -> str:
    return {dict: "a table", list: "a list", type(None): "nothing"}.get(type(value), repr(value)[:40])
