"""Which operator serves which type: one explicit table."""

from __future__ import annotations

from collections.abc import Callable

from slum import model
from slum.errors import ConfigError
from slum.operators.base import Operator
from slum.operators.local import Local, Site

MAKERS: dict[str, Callable[[Site], Operator]] = {"local": Local}


def why_unavailable(operator: model.Operator) -> str:
    """Return why this version cannot use *operator*, or "" when it can."""
    kind = model.operator_type(operator)
    return "" if kind in MAKERS else f"operator type {kind} is not part of this version; see docs/status.md"


def make_operator(operator: model.Operator, site: Site) -> Operator:
    """Return the Operator for *operator*; ConfigError when its type is not part of this version."""
    why = why_unavailable(operator)
    if why:
        raise ConfigError(f"operators.{operator.name}: {why}")
    return MAKERS[model.operator_type(operator)](site)
