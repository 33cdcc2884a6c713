"""`slum hostkey`: the keys by which hosts with SSH are known, and forgetting that of one that was installed anew."""

from __future__ import annotations

import time

import click

from slum.cli.base import Invocation, SlumGroup, command, consent
from slum.errors import ConfigError
from slum.render import clock


@click.group("hostkey", cls=SlumGroup, epilog="  slum hostkey list\n  slum hostkey forget 203.0.113.9")
def hostkey() -> None:
    """The keys of hosts with SSH that were believed when first seen."""


@command(
    "list",
    examples="""
    slum hostkey list
    slum hostkey list --json
    """,
)
def list_(asked: Invocation) -> None:
    """List the keys that hosts are known by, to be compared with `ssh-keygen -lf` there."""
    with asked.client() as client:
        found = client.host_keys()
    if asked.json:
        asked.emit(found)
        return
    now = time.time()
    rows = [(one.host, one.fingerprint or "the next one", clock(one.at, now), one.actor) for one in found]
    none = "no key of a host is known; the first that a host shows is, where `host_key` is accept-new"
    asked.say_table(("HOST", "KEY", "SINCE", "BY"), rows, none=none)


@command(
    "forget",
    examples="""
    slum hostkey forget 203.0.113.9
    slum hostkey forget box.example:2222 --yes
    """,
)
@click.argument("host")
def forget(asked: Invocation, host: str) -> None:
    """Believe the next key that HOST shows, on every member. For a host that was installed anew.

    Compare the new one afterwards with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there.
    """
    from slum.operators.ssh_hosts import parse_address

    name = parse_address(host).id
    if not consent(asked, f"believe whatever key {name} shows next?"):
        raise ConfigError("not agreed; nothing was changed")
    with asked.client() as client:
        done = client.forget_host_key(name)
    if asked.json:
        asked.emit(done)
    else:
        asked.say(f"the next key that {name} shows is believed; `slum hostkey list` tells which one it was")


for _command in (list_, forget):
    hostkey.add_command(_command)
