"""`slum apply`: from a file to a fleet that runs. Read it top to bottom; each step is one call."""

from __future__ import annotations

import click

from slum.cli.base import Invocation, can_consent, command, consent, file_of, file_option
from slum.cli.deploy import deploy, nothing_to_do, show, stages
from slum.cli.machine import start
from slum.cli.prepare import ask_providers, never_had_one, packed, plan_on, read_fleet, state_without
from slum.cli.target import span_s


@command(
    "apply",
    examples="""
    slum apply
    slum apply examples/quickstart/slum.toml --yes
    slum apply --yes --why "memory for the import" --timeout 5m
    slum apply --yes --json | jq .ok
    """,
)
@file_option
@click.option("--no-wait", is_flag=True, help="Return as soon as it is committed.")
@click.option("--timeout", metavar="TIME", default="10min", show_default=True, help="How long to wait: 30s, 5m.")
@click.option("--why", metavar="TEXT", default="apply", help="The reason, kept with the event.")
def apply(
    asked: Invocation, file: str | None, file_option: str | None, no_wait: bool, timeout: str, why: str
) -> int | None:
    """Make the fleet what FILE (./slum.toml) says: show the plan, ask, commit, and wait until all is healthy.

    Starts a control plane on this machine when there is none. Ends with 8 when a service does not come up; its old
    generation goes on serving where there is one.
    """
    wait_s = None if no_wait else span_s(timeout)
    asked.reach().check()
    with stages(asked) as stage:
        loaded = read_fleet(asked, file_of(file, file_option))
        with packed(asked, loaded) as prepared, asked.client() as client:
            if not client.present():
                if not can_consent(asked) or never_had_one(asked.home):
                    first = plan_on(state_without(asked.home), prepared.fleet)
                    if not first.actions:
                        nothing_to_do(asked, first)
                        return None
                    if not can_consent(asked):
                        show(asked, first)
                        consent(asked, "")
                start(asked)
            ask_providers(asked, client, prepared.fleet)
            state = client.state()
            made = plan_on(state, prepared.fleet)
            return deploy(
                asked, client, state, made, prepared.fleet, stage, why=why, bundles=prepared.bundles, wait_s=wait_s
            )
