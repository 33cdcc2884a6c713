"""Which runner stands for which isolation level: one explicit table, nothing registers itself.

A level that has no runner, or whose runner's probe fails, is Unavailable with the reason and the remedy; there is
never a fallback to another level.
"""

from __future__ import annotations

from collections.abc import Mapping

from slum.model import Level
from slum.node.runners.namespace import NamespaceRunner
from slum.node.runners.process import ProcessRunner
from slum.node.types import Available, Runner, Unavailable
from slum.paths import Home


def runners(home: Home) -> dict[Level, Runner]:
    """Return this build's runners, for services below *home*."""
    return {
        Level.PROCESS: ProcessRunner(home),
        Level.NAMESPACE: NamespaceRunner(home),
    }


def probe_levels(table: Mapping[Level, Runner]) -> dict[Level, Available | Unavailable]:
    """Prove every level, in the order of Level; takes some milliseconds each, seconds when one hangs."""
    return {level: table[level].probe() if level in table else missing(level) for level in Level}


def missing(level: Level) -> Unavailable:
    return Unavailable(
        why=f"this build of slum has no runner for {level} yet",
        fix='use isolation = "namespace" or "process"; docs/isolation.md says what each level means',
    )
