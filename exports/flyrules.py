"""What Fly allows, and what an export to it and the import share: limits, stand-ins, names. Pure."""

from __future__ import annotations

import math

from slum.model import DEFAULT_ID, FlyOperator, Service

OPERATOR = "fly"
ORG = "personal"
APP_NAME_MAX = 63
STEP_MB = 256
KILL_TIMEOUT_MAX_S = 300
CHECK_TIMEOUT = "5s"
VOLUME = "data"
CHDIR = ("/bin/sh", "-c", 'cd "$0" && exec "$@"')
"""What stands before a command that starts elsewhere: fly.toml has no key for it. The folder follows as $0."""

USUAL = FlyOperator(name=OPERATOR, org=ORG, region="iad")
"""Stands for what a fly.toml leaves open."""


def internal_port(service: Service) -> int:
    """Return the port that the image serves on; the service's own port stays free for it."""
    return 8081 if service.port == 8080 else 8080


def within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def memory_mb_of(service: Service) -> int | None:
    wanted = service.memory_limit_mb if service.memory_limit_mb is not None else service.memory_mb
    return None if wanted is None else math.ceil(wanted / STEP_MB) * STEP_MB


def fleet_of(app: str, tenement: str, service: str, instance: str) -> str:
    """Return the fleet that an app's name tells, given the first of its services; "" when it tells none."""
    plain = f"-{tenement}-{service}"
    for end in (f"{plain}-{instance}", *((plain,) if instance == DEFAULT_ID else ())):
        if app.endswith(end):
            return app.removesuffix(end)
    return ""
