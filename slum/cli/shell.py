"""`slum exec` and `slum run`: a command inside an instance's wall, or behind a new one like it."""

from __future__ import annotations

import sys

import click

from slum import api
from slum.cli.base import Invocation, TrailingCommand, command
from slum.cli.look import chosen
from slum.cli.target import service_argument, split_target, tenement_option
from slum.errors import ConfigError
from slum.render import instance_name
from slum.wire import Phase

RUNNING = frozenset({Phase.HEALTHY, Phase.RUNNING, Phase.DEGRADED, Phase.STARTING, Phase.UNHEALTHY})


@command(
    "exec",
    examples="""
    slum exec notes -- ls -la
    slum exec notes/acme
    slum exec notes -- sqlite3 notes.db .dump > backup.sql
    """,
    cls=TrailingCommand,
)
@click.option("-T", "--no-tty", is_flag=True, help="No terminal for the command, also when this is one.")
@tenement_option
@service_argument()
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def exec_(asked: Invocation, service: str, command: tuple[str, ...], no_tty: bool, tenement: str | None) -> int:
    """Run COMMAND inside the wall of a running instance; on a terminal without COMMAND: a shell.

    Ends with the command's exit status, 128 + n when signal n ended it. Words after SERVICE are
    the command's, options of slum stand before it (or before `--`).
    """
    terminal = _terminal(no_tty)
    if not command and not terminal:
        raise ConfigError("no command was given", hint=f"slum exec {service} -- COMMAND")
    return _attach(asked, "exec", service, command or ("sh",), terminal=terminal, tenement=tenement)


@command(
    "run",
    examples="""
    slum run notes -- python3 migrate.py
    slum run notes/acme -- sh -c 'ls "$SLUM_INSTANCE"'
    """,
    cls=TrailingCommand,
)
@click.option("-T", "--no-tty", is_flag=True, help="No terminal for the command, also when this is one.")
@tenement_option
@service_argument()
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(asked: Invocation, service: str, command: tuple[str, ...], no_tty: bool, tenement: str | None) -> int:
    """Run a one-off COMMAND behind a new wall like the service's: its files, data, environment and secrets.

    Ends with the command's exit status, 128 + n when signal n ended it. Words after SERVICE are
    the command's, options of slum stand before it (or before `--`).
    """
    return _attach(asked, "run", service, command, terminal=_terminal(no_tty), tenement=tenement)


def _attach(
    asked: Invocation, verb: str, target: str, words: tuple[str, ...], *, terminal: bool, tenement: str | None
) -> int:
    from slum.cli.terminal import attach
    from slum.client import Client

    service, instance = split_target(target)
    reach = asked.reach()
    with Client(reach) as client:
        view = _pick(chosen(client.instances(), service, instance, tenement), needs_running=verb == "exec")
    query = [("service", service), ("id", view.report.id), ("tenement", view.tenement)]
    return attach(reach, verb, [*query, *(("command", word) for word in words)], terminal=terminal)


def _pick(views: tuple[api.InstanceView, ...], *, needs_running: bool) -> api.InstanceView:
    """Return the first instance that runs; ConfigError when none does and one must."""
    running = next((view for view in views if view.report.phase in RUNNING), None)
    if running is None and needs_running:
        report = views[0].report
        name = instance_name(report.service, report.id, alone=report.id == "main")
        verb = "start" if report.phase is Phase.STOPPED else "restart"
        raise ConfigError(
            f"{name} is {report.phase}: there is nothing to run a command in",
            hint=f"`slum {verb} {name}`, or `slum run {name} -- COMMAND` behind a new wall",
        )
    return running or views[0]


def _terminal(no_tty: bool) -> bool:
    return not no_tty and sys.stdin.isatty() and sys.stdout.isatty()
