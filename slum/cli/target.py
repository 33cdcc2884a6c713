"""How commands name what they act on: SERVICE or SERVICE/ID, moments and spans of time. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, tzinfo
from typing import Any, TypeVar

import click

from slum.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|min|m|s|h|d|w)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
COMPLETION_DEADLINE_S = 0.5


def service_argument(*, required: bool = True) -> Callable[[F], F]:
    """Add SERVICE[/ID], completed from what runs."""
    return click.argument("service", metavar="SERVICE[/ID]", required=required, shell_complete=_services)


tenement_option = click.option("--tenement", metavar="NAME", help="Only on this machine.")


def split_target(target: str) -> tuple[str, str | None]:
    """Return (service, id or None) of "SERVICE" or "SERVICE/ID"; ConfigError otherwise."""
    service, slash, instance = target.partition("/")
    if not service or (slash and not instance) or "/" in instance:
        raise ConfigError(f"{target!r} is not SERVICE or SERVICE/ID", hint="`slum ps` lists both")
    return service, instance or None


def span_s(text: str) -> float:
    """Return the seconds of "90s", "10m", "1h30m", "2d" or a plain number; ConfigError otherwise."""
    compact = text.strip()
    if re.fullmatch(r"\d+(?:\.\d+)?", compact):
        return float(compact)
    found = _SPAN.findall(compact)
    if not found or _SPAN.sub("", compact).strip():
        raise ConfigError(f"{text!r} is not a span of time", hint="write it like 30s, 10m, 2h or 1d")
    return sum(float(amount) * _UNIT_S[unit] for amount, unit in found)


def moment(text: str, now: float, zone: tzinfo | None = None) -> float:
    """Return the unix time that *text* means: a span before *now* ("10m"), or an ISO 8601 time (local without a zone)."""
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        pass
    else:
        return (at.replace(tzinfo=zone) if at.tzinfo is None and zone is not None else at).timestamp()
    try:
        return now - span_s(text)
    except ConfigError as error:
        raise ConfigError(
            f"{text!r} is neither a span nor a time", hint="write it like 10m, 2h, 2026-11-22 or 2026-11-22T12:04:31"
        ) from error


def _services(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from slum.cli.base import invocation
    from slum.client import Client
    from slum.errors import SlumError

    try:
        with Client(invocation(ctx.find_root().obj or {}).reach(), deadline_s=COMPLETION_DEADLINE_S) as client:
            found = client.instances()
    except SlumError:
        return []
    names = {view.report.service for view in found}
    names |= {f"{view.report.service}/{view.report.id}" for view in found if "/" in incomplete}
    return sorted(name for name in names if name.startswith(incomplete))
