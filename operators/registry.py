"""Which operator serves which type: one explicit table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from slum import model
from slum.errors import ConfigError
from slum.operators.base import Operator
from slum.operators.local import Local, Site


def _hetzner(definition: model.HetznerOperator, _site: Site) -> Operator:
    from slum.operators.hetzner import Hetzner  # imported when used: providers' libraries cost the server megabytes

    return Hetzner(definition)


def _fly(definition: model.FlyOperator, _site: Site) -> Operator:
    from slum.operators.fly import Fly

    return Fly(definition)


MAKERS: dict[str, Callable[[Any, Site], Operator]] = {
    "local": lambda _, site: Local(site),
    "hetzner": _hetzner,
    "fly": _fly,
}
"""By type, from the definition of that type and the site."""

WAITING = frozenset({"fly", "hetzner"})
"""Types whose machines join with a token, which the control plane does not give out yet; nothing else is missing."""


def why_unavailable(operator: model.Operator) -> str:
    """Return why this version cannot use *operator*, or "" when it can."""
    kind = model.operator_type(operator)
    return (
        ""
        if kind in MAKERS.keys() - WAITING
        else f"operator type {kind} is not part of this version; see docs/status.md"
    )


def make_operator(operator: model.Operator, site: Site) -> Operator:
    """Return the Operator for *operator*; ConfigError when its type is not part of this version."""
    why = why_unavailable(operator)
    if why:
        raise ConfigError(f"operators.{operator.name}: {why}")
    return MAKERS[model.operator_type(operator)](operator, site)
