"""`slum secret`: the `env:NAME` secrets of services on this machine, and the tokens of this control plane's operators.

Values come by stdin or a hidden prompt, never as an argument, and are shown by nothing. They lie in a 0600 file of slum's
user; nothing is sent anywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from slum.cli.base import Invocation, SlumGroup, command
from slum.errors import ConfigError
from slum.problem import nearest

EXAMPLES = """
  slum secret set STRIPE_KEY < key.txt
  slum secret set HCLOUD_TOKEN --operator
  slum secret list
"""


@click.group("secret", cls=SlumGroup, epilog=EXAMPLES.strip("\n"))
def secret() -> None:
    """Keep secrets on this machine: `env:NAME` of services that run here, or with --operator tokens of the control plane.

    They are read whenever they are needed, so a new value needs no restart of slum. With several members, each needs the
    operators' tokens; every machine needs the secrets of its own services.
    """


_operator = click.option("--operator", is_flag=True, help="A token of the control plane's operators, not of services.")


@command(
    "set",
    examples="""
    slum secret set STRIPE_KEY < key.txt
    slum secret set HCLOUD_TOKEN --operator
    """,
)
@click.argument("name")
@_operator
def set_(asked: Invocation, name: str, operator: bool) -> None:
    """Keep the value of NAME, read from stdin (without its last line end), or asked for on a terminal."""
    from slum.node import secretenv

    if not name.isidentifier() or not name.isascii():
        raise ConfigError(f"{name!r} is no name for a secret: letters, digits and _, no digit first")
    value = click.prompt(name, hide_input=True) if sys.stdin.isatty() else sys.stdin.read()
    value = value.removesuffix("\n").removesuffix("\r")
    if not value or "\n" in value or "\r" in value or "\0" in value:
        raise ConfigError(
            f"the value of {name} is {'empty' if not value else 'longer than one line'}",
            hint='a secret of several lines goes into a file: NAME = "file:/abs/path" in [service.X.secrets]',
        )
    file = _file(asked, operator)
    secretenv.write(file, {**secretenv.read(file), name: value})
    asked.say(f"kept {name} in {file}")


@command(
    "list",
    examples="""
    slum secret list
    slum secret list --operator --json
    """,
)
@_operator
def list_(asked: Invocation, operator: bool) -> None:
    """List the names, never the values."""
    from slum.node import secretenv

    names = sorted(secretenv.read(_file(asked, operator)))
    if asked.json:
        asked.emit(names)
    elif not names:
        asked.say("none are kept here; `slum secret set NAME` keeps one")
    for name in names:
        asked.say(name)


@command(
    "remove",
    examples="""
    slum secret remove STRIPE_KEY
    """,
)
@click.argument("name")
@_operator
def remove(asked: Invocation, name: str, operator: bool) -> None:
    """Forget NAME. What runs keeps the value that it was started with."""
    from slum.node import secretenv

    file = _file(asked, operator)
    held = secretenv.read(file)
    if name not in held:
        raise ConfigError(f"no secret {name} is kept here{nearest(name, held)}", hint="`slum secret list`")
    secretenv.write(file, {other: value for other, value in held.items() if other != name})
    asked.say(f"removed {name} from {file}")


for each in (set_, list_, remove):
    secret.add_command(each)


def _file(asked: Invocation, operator: bool) -> Path:
    from slum.node.secretenv import secret_file
    from slum.operators import registry

    return registry.secret_file(asked.home) if operator else secret_file(asked.home)
