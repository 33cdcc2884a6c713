"""`slum events`: the audit trail, listed, followed or verified. Changes nothing."""

from __future__ import annotations

import time

import click

from slum import api
from slum.cli.base import Invocation, command
from slum.cli.target import moment
from slum.cli.views import event_lines
from slum.client import Client
from slum.errors import SlumError

PAGE = 1000


@command(
    "events",
    examples="""
    slum events
    slum events --service notes --since 1h
    slum events --kind fleet_applied -n 5
    slum events -f --json
    slum events --verify
    """,
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new ones until interrupted.")
@click.option(
    "-n", "--last", metavar="N", type=click.IntRange(0), help="The last N.  [default: 50, or all with --since]"
)
@click.option("--since", metavar="WHEN", help="From then on: 10m, 2h, 2026-11-22T12:00.")
@click.option("--service", metavar="NAME", help="Only of this service and its instances.")
@click.option("--kind", metavar="KIND", help="Only of this kind, e.g. service_changed.")
@click.option("--actor", metavar="WHO", help="Only by this actor, e.g. root@laptop.")
@click.option("--verify", is_flag=True, help="Check the hash chain of all events instead.")
def events(
    asked: Invocation,
    follow: bool,
    last: int | None,
    since: str | None,
    service: str | None,
    kind: str | None,
    actor: str | None,
    verify: bool,
) -> int | None:
    """List what happened, oldest first: when, number, kind, about what, by whom, and the change.

    Every entry carries a hash over itself and the one before; --verify proves that none was changed or left out
    (exit 1 if one was).
    """
    start = None if since is None else moment(since, time.time())
    with asked.client() as client:
        if verify:
            return _verify(asked, client)
        if start is not None:
            found = tuple(e for e in _all(client, service, kind, actor) if e.at >= start)[-(last or 0) :]
        else:
            wanted = 50 if last is None else last
            found = client.events(limit=wanted, kind=kind, service=service, actor=actor, newest=True) if wanted else ()
        if asked.json and not follow:
            asked.emit(found)
            return None
        _show(asked, found)
        if not found and not follow and last != 0:
            asked.note(_none_found(client, kind))
        if follow:
            after = (
                found[-1].number if found else max((e.number for e in client.events(limit=1, newest=True)), default=0)
            )
            for event in client.follow_events(after=after, kind=kind, service=service, actor=actor):
                _show(asked, (event,))
    return None


def _none_found(client: Client, kind: str | None) -> str:
    """Return what to say instead of an empty page; a kind that nobody ever wrote is likely mistyped."""
    from slum.problem import nearest

    kinds = {event.kind for event in client.events(limit=PAGE, newest=True)}
    near = nearest(kind, kinds) if kind is not None and kind not in kinds else ""
    return f"no event matches{near}"


def _all(client: Client, service: str | None, kind: str | None, actor: str | None) -> list[api.Event]:
    found: list[api.Event] = []
    while page := client.events(
        after=found[-1].number if found else 0, limit=PAGE, kind=kind, service=service, actor=actor
    ):
        found += page
    return found


def _show(asked: Invocation, found: tuple[api.Event, ...]) -> None:
    if asked.json:
        for event in found:
            asked.emit_line(event)
        return
    for line in event_lines(found, time.time(), asked.paint):
        asked.say(line)


def _verify(asked: Invocation, client: Client) -> int:
    found = client.verify()
    if asked.json:
        asked.emit(found)
    elif found.ok:
        asked.say(f"{found.events} events up to sequence {found.seq}: {asked.paint('the chain holds', 'good')}")
    else:
        asked.say(
            f"event {found.first_bad} of {found.events}: {asked.paint('the chain is broken', 'bad')}: {found.why}"
        )
        asked.say("  next: compare with a backup or another member; what came before it is intact")
    return 0 if found.ok else SlumError.exit_code
