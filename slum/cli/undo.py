"""`slum rollback` and `slum destroy`: an earlier revision again, or none of it."""

from __future__ import annotations

import click
import msgspec

from slum.cli.base import Invocation, command
from slum.cli.deploy import deploy, stages
from slum.cli.prepare import plan_on
from slum.cli.target import span_s
from slum.errors import ConfigError, Conflict


@command(
    "rollback",
    examples="""
    slum rollback
    slum rollback 4 --yes
    """,
)
@click.argument("revision", required=False, type=click.IntRange(1))
@click.option("--no-wait", is_flag=True, help="Return as soon as it is committed.")
@click.option("--timeout", metavar="TIME", default="10min", show_default=True, help="How long to wait: 30s, 5m.")
@click.option("--why", metavar="TEXT", help="The reason, kept with the event.  [default: rollback to REVISION]")
def rollback(asked: Invocation, revision: int | None, no_wait: bool, timeout: str, why: str | None) -> int | None:
    """Apply an earlier REVISION again (the one before the newest): shows the plan, asks, and waits, like apply.

    It becomes a new revision; nothing is forgotten. The last 20 revisions are kept, with their bundles.
    """
    wait_s = None if no_wait else span_s(timeout)
    with stages(asked) as stage, asked.client() as client:
        state = client.state()
        target = state.revision - 1 if revision is None else revision
        if target < 1:
            raise ConfigError(
                f"revision {state.revision} is the first: there is none to go back to"
                if state.revision
                else "nothing was applied yet",
                hint="`slum destroy` removes everything" if state.revision else "`slum apply`",
            )
        fleet = client.fleet(target).fleet
        return deploy(
            asked,
            client,
            state,
            plan_on(state, fleet),
            fleet,
            stage,
            why=why or f"rollback to {target}",
            question=f"Roll back to revision {target}?",
            wait_s=wait_s,
        )


@command(
    "destroy",
    examples="""
    slum destroy
    slum destroy --yes --json
    """,
)
@click.argument("file", required=False, type=click.Path())
@click.option("-f", "--file", "file_option", metavar="FILE", help="The same as FILE.")
@click.option("--no-wait", is_flag=True, help="Return as soon as it is committed.")
@click.option("--timeout", metavar="TIME", default="10min", show_default=True, help="How long to wait: 30s, 5m.")
@click.option("--why", metavar="TEXT", default="destroy", help="The reason, kept with the event.")
def destroy(
    asked: Invocation, file: str | None, file_option: str | None, no_wait: bool, timeout: str, why: str
) -> int | None:
    """Stop and remove every service and machine that the fleet declares; asks for the fleet's name.

    Revisions and events stay, so `slum rollback` brings the services back. With FILE it is refused unless the fleet is the
    one that FILE declares.
    """
    wait_s = None if no_wait else span_s(timeout)
    named = file or file_option
    with stages(asked) as stage, asked.client() as client:
        state = client.state()
        if named is not None:
            _check_name(named, state.fleet.name)
        empty = msgspec.structs.replace(state.fleet, tenements=())
        return deploy(
            asked,
            client,
            state,
            plan_on(state, empty),
            empty,
            stage,
            why=why,
            question=f"Type the fleet's name ({state.fleet.name}) to remove all of this",
            typed=state.fleet.name,
            wait_s=wait_s,
        )


def _check_name(file: str, held: str) -> None:
    from pathlib import Path

    from slum.fleetfile import load

    declared = load(Path(file)).fleet.name
    if declared != held:
        raise Conflict(
            f"this control plane holds the fleet {held!r}, {file} declares {declared!r}", hint="`slum status`"
        )
