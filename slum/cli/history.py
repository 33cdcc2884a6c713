"""`slum at` and `slum diff`: the fleet as it was at a point of the ledger, and what changed between two. Change nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from slum.cli.backup import settings_of, store_options
from slum.cli.base import Invocation, command
from slum.cli.target import moment
from slum.errors import ConfigError

if TYPE_CHECKING:
    from slum.backup.history import Then


@contextmanager
def _history(asked: Invocation, *options: str | None) -> Iterator[Any]:
    """Yield what answers for points: the ledger of this machine for what it keeps, else the backup."""
    from slum.backup.history import History

    def store() -> Any:
        return settings_of(asked, *options)

    history = History(asked.home, store, tell=asked.note, backup_only=options[0] is not None)
    try:
        yield history
    finally:
        history.close()


@command(
    "at",
    examples="""
    slum at --seq 48211
    slum at --time 2h
    slum at --time 2026-11-22T12:00 --json
    slum at --seq 48211 --from s3://backups/fleet
    """,
)
@click.option("--seq", metavar="N", type=click.IntRange(0), help="At this sequence of the ledger.")
@click.option("--time", "when", metavar="WHEN", help="At that moment: 10m, 2h, 2026-11-22T12:00.")
@click.option("--from", "url", metavar="URL", help="Of this backup, instead of this machine's ledger.")
@store_options
def at(asked: Invocation, seq: int | None, when: str | None, url: str | None, **options: str | None) -> None:
    """Show the fleet as it was: revision, machines, services, and what was stopped.

    What the ledger here does not keep any more is fetched from the backup.
    """
    if (seq is None) == (when is None):
        raise ConfigError("which point? neither or both of --seq and --time were given", hint="give one")
    with _history(asked, url, options["endpoint"], options["region"], options["secrets_ref"]) as history:
        then = history.at(seq=seq, at=None if when is None else moment(when, time.time()))
    if asked.json:
        asked.emit(then)
        return
    for line in _then_lines(asked, then):
        asked.say(line)


@command(
    "diff",
    examples="""
    slum diff 48211 48300
    slum diff 2h now
    slum diff 2026-11-21 2026-11-22 --json
    """,
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--from", "url", metavar="URL", help="Of this backup, instead of this machine's ledger.")
@store_options
def diff(asked: Invocation, a: str, b: str, url: str | None, **options: str | None) -> None:
    """Show what changed in the fleet between two points.

    A point is a sequence of the ledger (48211), a moment (2h, 2026-11-22T12:00) or `now`.
    """
    from slum.cli.planview import plan_lines
    from slum.plan import plan

    now = time.time()
    with _history(asked, url, options["endpoint"], options["region"], options["secrets_ref"]) as history:
        before, after = (history.at(**_point(word, now)) for word in (a, b))
    found = plan(after.fleet, before.fleet, revision=before.revision)
    stopped, started = (_not_in(x.stopped, y.stopped) for x, y in ((after, before), (before, after)))
    if asked.json:
        points = [{"seq": p.seq, "at": p.at, "revision": p.revision} for p in (before, after)]
        asked.emit({"from": points[0], "to": points[1], "plan": found, "stopped": stopped, "started": started})
        return
    asked.say(f"from {_point_text(before)}\n  to {_point_text(after)}")
    if found.actions:
        for line in plan_lines(found, asked.paint):
            asked.say(line)
    for name in stopped:
        asked.say(f"  stopped {name}")
    for name in started:
        asked.say(f"  started {name}")
    if not found.actions and not stopped and not started:
        asked.say("nothing changed in the fleet")


def _point(word: str, now: float) -> dict[str, Any]:
    if word.isdecimal():
        return {"seq": int(word)}
    return {"at": now if word == "now" else moment(word, now)}


def _not_in(these: tuple[str, ...], those: tuple[str, ...]) -> list[str]:
    return sorted(set(these) - set(those))


def _point_text(then: Then) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(then.at))
    return f"sequence {then.seq}, {when}, revision {then.revision}"


def _then_lines(asked: Invocation, then: Then) -> Iterator[str]:
    from slum.render import quantity

    yield f"{_point_text(then)} (from the {then.source})"
    if then.revision == 0:
        yield "  nothing was declared yet"
        return
    yield f"fleet {then.fleet.name}, applied by {then.actor}"
    for tenement in then.fleet.tenements:
        machines = ", ".join(tenement.machine_names)
        yield f"  tenement {asked.paint(tenement.name, 'strong')}  {tenement.operator}  {machines}"
        for service in tenement.services:
            ids = quantity(len(service.instances), "instance", "instances")
            bundle = f"  bundle {service.bundle[:12]}" if service.bundle else ""
            yield f"    service {service.name:<20} {service.isolation:<10} {ids}{bundle}"
    for name in then.stopped:
        yield f"  stopped  {name}"
    for machine in then.machines:
        yield f"  machine  {machine.machine}  {machine.state}  {machine.machine_id}"
