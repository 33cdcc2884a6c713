"""From a slum.toml to a fleet that can be sent: read, judged against this machine, its sources packed.

What `plan` and `apply` have in common. Bundles go to a temporary folder that is gone afterwards; nothing else is written,
and the control plane is only read.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click

from slum import api
from slum.cli.base import Invocation
from slum.client import Client
from slum.errors import ConfigError, Conflict, Unreachable
from slum.fleetfile import Loaded, load
from slum.model import Fleet, LocalOperator
from slum.pack import attach, pack
from slum.paths import Home
from slum.plan import Plan, observed_of, plan
from slum.render import quantity
from slum.validate import check_capabilities
from slum.wire import LevelStatus

EMPTY = api.State(revision=0, fleet=Fleet(), seq=0)


class Prepared(NamedTuple):
    """A fleet with its bundles' digests, and where these lie: digest -> file."""

    fleet: Fleet
    bundles: Mapping[str, Path]


def read_fleet(asked: Invocation, file: str) -> Loaded:
    """Return what *file* declares; warnings are noted, problems raised all at once, with those of this machine."""
    loaded = load(Path(file))
    if not asked.json:
        for warning in loaded.warnings:
            asked.note(f"{warning} (warning)")
    local = not asked.context
    problems = tuple(str(problem) for problem in machine_problems(asked.home, loaded.fleet)) if local else ()
    if problems:
        raise ConfigError(
            f"{quantity(len(problems), 'problem')} with this machine",
            problems=problems,
            hint="`slum doctor` shows what works here and how to get the rest",
        )
    return loaded


@contextmanager
def packed(asked: Invocation, loaded: Loaded) -> Iterator[Prepared]:
    """Give the fleet with every source packed, each folder once."""
    with tempfile.TemporaryDirectory(prefix="slum-pack-") as temporary:
        by_folder: dict[Path, str] = {}
        bundles: dict[str, Path] = {}
        for number, folder in enumerate(sorted(set(loaded.sources.values()))):
            with passing(asked, f"packing {folder}"):
                out = Path(temporary) / str(number)
                done = pack(folder, out)
            by_folder[folder] = done.digest
            bundles[done.digest] = out
        digests = {key: by_folder[folder] for key, folder in loaded.sources.items()}
        yield Prepared(fleet=attach(loaded.fleet, digests), bundles=bundles)


def state_without(home: Home) -> api.State:
    """Return the state of a machine that never had a control plane; Unreachable when it had one, which is stopped."""
    if not never_had_one(home):
        raise Unreachable(
            f"the control plane of this machine is stopped (data {home.data})", hint="`slum up` starts it again"
        )
    return EMPTY


def never_had_one(home: Home) -> bool:
    """Tell whether this machine never had a control plane, not even one that is stopped now."""
    return not (home.state / "CURRENT").exists()


def ask_providers(asked: Invocation, client: Client, fleet: Fleet) -> None:
    """Let the operators' providers judge *fleet*; ConfigError with all that they would refuse, what is doubtful is noted."""
    used = {tenement.operator for tenement in fleet.tenements}
    if all(isinstance(operator, LocalOperator) or operator.name not in used for operator in fleet.operators):
        return
    with passing(asked, "asking the providers"):
        found = client.check(fleet)
    for warning in found.warnings:
        asked.note(f"{warning} (warning)")
    if found.problems:
        raise ConfigError(
            f"{quantity(len(found.problems), 'problem')} with what the providers offer",
            problems=found.problems,
            hint="nothing was changed; correct the file and try again",
        )


def plan_on(state: api.State, fleet: Fleet) -> Plan:
    """Return what turns *state* into *fleet*; Conflict when the control plane holds a fleet of another name."""
    if state.revision and state.fleet.name != fleet.name:
        raise Conflict(
            f"this control plane holds the fleet {state.fleet.name!r}, the file declares {fleet.name!r}",
            hint="one control plane holds one fleet: `slum destroy` it, or use another --data-dir and --run-dir",
        )
    return plan(fleet, state.fleet, observed_of(state), revision=state.revision)


def machine_problems(home: Home, fleet: Fleet) -> Iterator[object]:
    """Yield what services on this machine ask that this machine cannot do; levels are proven by trying them."""
    local = {operator.name for operator in fleet.operators if isinstance(operator, LocalOperator)}
    tenements = [tenement for tenement in fleet.tenements if tenement.operator in local and tenement.services]
    if not tenements:
        return
    levels, limits = _abilities(home, {str(s.isolation) for t in tenements for s in t.services})
    for tenement in tenements:
        yield from check_capabilities(fleet, tenement.machine_names[0], levels, limits)


def _abilities(home: Home, wanted: set[str]) -> tuple[dict[str, LevelStatus], str]:
    from slum.node.limits.detect import detect
    from slum.node.runners.registry import probe_levels, runners
    from slum.node.types import Available

    table = {level: runner for level, runner in runners(home).items() if level in wanted}
    found = {
        str(level): LevelStatus(level=level, available=True, detail=probed.how)
        if isinstance(probed, Available)
        else LevelStatus(level=level, available=False, detail=probed.why, fix=probed.fix)
        for level, probed in probe_levels(table).items()
    }
    limits = detect(home, name=f"slum-check-{os.getpid()}")
    try:
        return found, limits.how
    finally:
        limits.clear()


@contextmanager
def passing(asked: Invocation, text: str) -> Iterator[Callable[[str], None]]:
    """Show *text* while something runs, on a terminal only, and take it away after; what is given changes it."""
    shown = asked.color and not asked.quiet and not asked.json and sys.stderr.isatty()

    def say(words: str) -> None:
        if shown:
            click.echo(f"\r\x1b[K  {words}", err=True, nl=False, color=True)

    say(f"{text} ...")
    try:
        yield say
    finally:
        if shown:
            click.echo("\r\x1b[K", err=True, nl=False, color=True)
