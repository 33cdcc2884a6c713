"""`slum machines` and `slum drain`: what the operators have, and emptying one machine before work on it."""

from __future__ import annotations

import time

import click

from slum import api
from slum.cli.act import act_and_wait
from slum.cli.base import Invocation, command
from slum.cli.target import span_s
from slum.cli.views import machine_lines


@command(
    "machines",
    examples="""
    slum machines
    slum machines --json | jq -r '.[] | select(.drift != "") | .id'
    """,
)
def machines(asked: Invocation) -> None:
    """List the machines of all operators: id, age, state, and what is not as it should be.

    gone: made, but its operator does not see it (it is made again). stray: it carries our label, but was never asked for;
    slum does not touch it. left: it was destroyed, and is still there.
    """
    with asked.client() as client:
        found: tuple[api.MachineView, ...] = client.machines()
    if asked.json:
        asked.emit(found)
        return
    for line in machine_lines(found, time.time(), asked.paint):
        asked.say(line)


@command(
    "drain",
    examples="""
    slum drain workers-2
    slum drain workers-2 --undo
    """,
)
@click.argument("tenement")
@click.option("--undo", is_flag=True, help="Let it run its services again.")
@click.option("--no-wait", is_flag=True, help="Return as soon as it is committed.")
@click.option("--timeout", metavar="TIME", default="5min", show_default=True, help="How long to wait: 30s, 5m.")
def drain(asked: Invocation, tenement: str, undo: bool, no_wait: bool, timeout: str) -> int | None:
    """Stop every service on TENEMENT in an orderly way and keep it empty, over reboots and applies, until --undo.

    TENEMENT is a machine, or all machines of a [tenement.X] with a count. The machine itself stays, and its data.
    """
    verb = "undrain" if undo else "drain"
    return act_and_wait(asked, verb, "", tenement, wait_s=None if no_wait else span_s(timeout))
