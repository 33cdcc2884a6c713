"""Which operator serves which type: one explicit table.

Providers' tokens come from the control plane's environment, overlaid by the file ``<data>/state/env`` (see secret_file),
which is read anew for every operator that is made: a rotated token needs no restart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slum import model
from slum.errors import ConfigError
from slum.node import secretenv
from slum.operators.base import Operator
from slum.operators.join import Join
from slum.operators.local import Local, Site
from slum.paths import Home


def secret_file(home: Home) -> Path:
    """Return where a control plane keeps the tokens of its operators, as KEY=VALUE lines; `slum secret` writes it."""
    return home.state / "env"


def _hetzner(definition: model.HetznerOperator, site: Site) -> Operator:
    from slum.operators.hetzner import Hetzner  # imported when used: providers' libraries cost the server megabytes

    return Hetzner(definition, env=_variables(site))


def _fly(definition: model.FlyOperator, site: Site) -> Operator:
    from slum.operators.fly import Fly

    return Fly(definition, env=_variables(site))


def _ssh(definition: model.SshOperator, site: Site) -> Operator:
    from slum.operators.ssh import Ssh

    return Ssh(definition, site)


def _variables(site: Site) -> dict[str, str]:
    return {**os.environ, **secretenv.read(secret_file(site.home))}


MAKERS: dict[str, Callable[[Any, Site], Operator]] = {
    "local": lambda _, site: Local(site),
    "hetzner": _hetzner,
    "fly": _fly,
    "ssh": _ssh,
    "join": lambda _, site: Join(site),
}
"""By type, from the definition of that type and the site."""


def why_unavailable(operator: model.Operator) -> str:
    """Return why this version cannot use *operator*, or "" when it can."""
    kind = model.operator_type(operator)
    return "" if kind in MAKERS else f"operator type {kind} is not part of this version; see docs/status.md"


def make_operator(operator: model.Operator, site: Site) -> Operator:
    """Return the Operator for *operator*; ConfigError when its type is not part of this version."""
    why = why_unavailable(operator)
    if why:
        raise ConfigError(f"operators.{operator.name}: {why}")
    return MAKERS[model.operator_type(operator)](operator, site)
