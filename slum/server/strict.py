"""Fields of a request that its type does not have: a newer client's, or a slip of the pen. Pure.

msgspec ignores them, which is right for answers and between neighbouring versions; at the API's edge a key that has no
effect must be refused, not dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import inspect

from slum.errors import ConfigError
from slum.problem import nearest

PROBLEMS_MAX = 100


def refuse_unknown(data: bytes | bytearray, kind: Any) -> None:
    """Return when *data*, JSON that decodes as *kind*, has no field that *kind* lacks; ConfigError names each one."""
    problems = tuple(_unknown(msgspec.json.decode(data), _type_of(kind), ""))
    if problems:
        raise ConfigError(
            f"{problems[0]}{'' if len(problems) == 1 else f', and {len(problems) - 1} more'}",
            hint="nothing was changed; a client that is newer than this control plane may know more: `slum version`",
            problems=problems[:PROBLEMS_MAX],
        )


def refuse_names(given: Iterable[str], kind: type[msgspec.Struct]) -> None:
    """Return when *kind* has all names of a query string; ConfigError for the first that it lacks."""
    known = set(kind.__struct_encode_fields__)
    for name in given:
        if name not in known:
            raise ConfigError(f"{name}: unknown parameter{nearest(name, known)}")


@lru_cache(maxsize=64)
def _type_of(kind: Any) -> inspect.Type:
    return inspect.type_info(kind)


def _unknown(value: Any, kind: inspect.Type, at: str) -> Iterator[str]:
    """Yield "PATH: unknown field" for each key below *value* that *kind* has no field for."""
    match kind:
        case inspect.UnionType(types=types):
            fits = (each for each in types if _fits(value, each))
            yield from _unknown(value, next(fits, inspect.AnyType()), at)
        case inspect.StructType(fields=fields, tag_field=tag) if isinstance(value, dict):
            known = {field.encode_name: field.type for field in fields}
            for name, inner in value.items():
                path = f"{at}.{name}" if at else name
                if name in known:
                    yield from _unknown(inner, known[name], path)
                elif name != tag:
                    yield f"{path[:200]}: unknown field{nearest(name[:100], known)}"
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item) if isinstance(value, list):
            for number, inner in enumerate(value):
                yield from _unknown(inner, item, f"{at}[{number}]")
        case inspect.TupleType(item_types=items) if isinstance(value, list):
            for number, (inner, item) in enumerate(zip(value, items, strict=False)):
                yield from _unknown(inner, item, f"{at}[{number}]")
        case inspect.DictType(value_type=item) if isinstance(value, dict):
            for name, inner in value.items():
                yield from _unknown(inner, item, f"{at}.{name}")


def _fits(value: Any, kind: inspect.Type) -> bool:
    """Tell whether *kind* is the one of a union that *value* was decoded as; it was, so little needs to be looked at."""
    match kind:
        case inspect.StructType(tag_field=tag, tag=name):
            return isinstance(value, dict) and (tag is None or value.get(tag) == name)
        case inspect.VarTupleType() | inspect.TupleType() | inspect.ListType():
            return isinstance(value, list)
        case inspect.DictType():
            return isinstance(value, dict)
    return False
