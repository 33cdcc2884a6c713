"""`slum context`: which control plane the command line speaks to, here or elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from slum.cli.base import Invocation, SlumGroup, command
from slum.cli.target import span_s
from slum.errors import ConfigError
from slum.render import clock

TOKEN_CHARS_MAX = 4096


@click.group(
    "context",
    cls=SlumGroup,
    epilog="  slum context add prod https://cp.example.com --token-file token\n  slum context use prod\n  slum context use local",
)
def context() -> None:
    """Control planes elsewhere: add, use, list, remove."""


@command(
    "add",
    examples="""
    slum context add prod https://cp.example.com --token-file token
    slum context add prod https://m1.example.com https://m2.example.com --token-file -
    """,
)
@click.argument("name")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option(
    "--token-file",
    required=True,
    metavar="FILE",
    help="The token of `slum token new user`; - reads standard input.",
)
@click.option("--timeout", metavar="TIME", default="15s", show_default=True, help="How long to wait for an answer.")
def add(asked: Invocation, name: str, urls: tuple[str, ...], token_file: str, timeout: str) -> None:
    """Become a user of the control plane at URL, and keep key and certificate as NAME.

    The key is made here and stays. The token is told only to the authority that it names. The first context is taken into
    use. What was interrupted is finished by the same command with the same token.
    """
    contexts = asked.contexts()
    is_first = not contexts.names() and not contexts.current()
    made = contexts.add(name, urls, _read(token_file), wait_s=span_s(timeout), say=asked.note)
    if is_first:
        contexts.use(name)
    if asked.json:
        asked.emit(_document(made, current=is_first))
        return
    who = made.subject.partition("/")[2]
    asked.say(f"{name}: you are {who} ({made.role}) at {', '.join(made.servers)}")
    asked.say(
        f"every command now speaks to {name}; `slum context use local` goes back"
        if is_first
        else f"next: `slum context use {name}`, or --context {name}"
    )


@command(
    "use",
    examples="""
    slum context use prod
    slum context use local
    """,
)
@click.argument("name")
def use(asked: Invocation, name: str) -> None:
    """Speak to NAME from now on; `local` is this machine's own control plane."""
    contexts = asked.contexts()
    contexts.use(name)
    if asked.json:
        asked.emit({"context": name})
    else:
        asked.say("every command speaks to this machine" if name == "local" else f"every command speaks to {name}")


@command(
    "list",
    examples="""
    slum context list
    slum context list --json
    """,
)
def list_(asked: Invocation) -> None:
    """List the contexts; the one in use has a star."""
    contexts = asked.contexts()
    current = contexts.current()
    found = [contexts.load(name) for name in contexts.names()]
    if asked.json:
        asked.emit([_document(one, current=one.name == current) for one in found])
        return
    now = time.time()
    rows = [
        (
            "*" if one.name == current else "",
            one.name,
            one.subject.partition("/")[2],
            one.role,
            clock(one.not_after, now),
            " ".join(one.urls),
        )
        for one in found
    ]
    rows.append(("" if current else "*", "local", "", "", "", "this machine"))
    asked.say_table(("", "NAME", "USER", "ROLE", "ENDS", "WHERE"), rows)


@command(
    "remove",
    examples="""
    slum context remove prod
    """,
)
@click.argument("name")
def remove(asked: Invocation, name: str) -> None:
    """Forget NAME and its key. The certificate holds until it ends: `slum user remove` revokes it."""
    contexts = asked.contexts()
    was = contexts.remove(name)
    if asked.json:
        asked.emit({"removed": name})
    else:
        who = was.subject.partition("/")[2]
        asked.say(
            f"forgot {name}; its key is gone from here, and `slum user remove {who}` there revokes its certificate"
        )


for _command in (add, use, list_, remove):
    context.add_command(_command)


def _read(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read(TOKEN_CHARS_MAX)
        with Path(file).open(encoding="utf-8") as given:
            return given.read(TOKEN_CHARS_MAX)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {file} cannot be read: {error}") from error


def _document(one: Any, *, current: bool) -> dict[str, Any]:
    return {
        "name": one.name,
        "current": current,
        "user": one.subject.partition("/")[2],
        "role": one.role,
        "cluster": one.cluster,
        "servers": one.servers,
        "joined": one.joined,
        "not_after": one.not_after,
    }
