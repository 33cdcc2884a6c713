"""`slum user`: who may use this control plane from elsewhere, and ending that."""

from __future__ import annotations

import time

import click

from slum.cli.base import Invocation, SlumGroup, command, consent
from slum.errors import ConfigError
from slum.render import clock, quantity


@click.group("user", cls=SlumGroup, epilog="  slum user list\n  slum user remove ana")
def user() -> None:
    """Users with certificates; `slum token new user` makes one."""


@command(
    "list",
    examples="""
    slum user list
    slum user list --all
    slum user list --json
    """,
)
@click.option("--all", "everybody", is_flag=True, help="The certificates of nodes and members too.")
def list_(asked: Invocation, everybody: bool) -> None:
    """List users and their certificates, one a row."""
    with asked.client() as client:
        users = () if everybody else client.users()
        found = client.certificates() if everybody else tuple(one for each in users for one in each.certificates)
    if asked.json:
        asked.emit(found if everybody else users)
        return
    now = time.time()
    rows = [
        (
            one.subject if everybody else one.subject.partition("/")[2],
            one.role,
            one.state,
            clock(one.made_at, now),
            clock(one.not_after, now),
            one.serial,
        )
        for one in found
    ]
    none = "there are no users; `slum token new user NAME --role ROLE` lets one in"
    asked.say_table(("WHO" if everybody else "USER", "ROLE", "STATE", "SINCE", "ENDS", "SERIAL"), rows, none=none)


@command(
    "remove",
    examples="""
    slum user remove ana
    """,
)
@click.argument("name")
def remove(asked: Invocation, name: str) -> None:
    """Revoke all certificates and tokens of NAME; what is open ends within a second."""
    if not consent(asked, f"revoke all that {name} has?"):
        raise ConfigError("not agreed; nothing was changed")
    with asked.client() as client:
        done = client.remove_user(name)
    if asked.json:
        asked.emit(done)
    else:
        asked.say(f"{name} is out: revoked {quantity(done.certificates, 'certificate')}")


for _command in (list_, remove):
    user.add_command(_command)
