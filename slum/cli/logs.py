"""`slum logs`: the output of a service's instances, as it was written. Changes nothing."""

from __future__ import annotations

import re
import sys
import time

import click

from slum.cli.base import Invocation, command
from slum.cli.look import chosen
from slum.cli.target import moment, service_argument, split_target, tenement_option
from slum.errors import ConfigError
from slum.render import clean, clock


@command(
    "logs",
    examples="""
    slum logs notes
    slum logs notes -f --tail 20
    slum logs notes/acme --since 10m --grep 'error|warn'
    slum logs notes --json | jq -r .text
    """,
)
@service_argument()
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until interrupted.")
@click.option("--since", metavar="WHEN", help="From then on: 10m, 2h, 2026-11-22T12:00.")
@click.option("--tail", "-n", metavar="N", type=click.IntRange(0), help="The last N lines of each instance.")
@click.option("--grep", metavar="REGEX", help="Only lines where this regular expression (Python's) is found.")
@tenement_option
@click.option("-t", "--timestamps", is_flag=True, help="The local time before each line.")
def logs(
    asked: Invocation,
    service: str,
    follow: bool,
    since: str | None,
    tail: int | None,
    grep: str | None,
    tenement: str | None,
    timestamps: bool,
) -> None:
    """Print what a service wrote to stdout and stderr, in order.

    With several instances each line begins with the id. On a terminal only colours pass, no other control sequences; a pipe
    gets the bytes of the service.
    """
    name, instance = split_target(service)
    now = time.time()
    start = None if since is None else moment(since, now)
    if grep is not None:
        try:
            re.compile(grep)
        except re.error as error:
            raise ConfigError(f"--grep {grep!r} is no regular expression: {error}") from error
    terminal = sys.stdout.isatty()
    with asked.client() as client:
        views = chosen(client.instances(), name, instance, tenement)
        several, machines = len(views) > 1, len({view.tenement for view in views}) > 1
        lines = client.logs(
            name, instance=instance, tenement=tenement, since=start, tail=tail, grep=grep, follow=follow
        )
        for line in lines:
            if asked.json:
                asked.emit_line(line)
                continue
            text = clean(line.text, keep_color=asked.color) if terminal else line.text
            source = f"{line.tenement}/{line.id}" if machines else line.id
            prefix = f"{asked.paint(source, 'dim')} | " if several else ""
            stamp = f"{asked.paint(clock(line.at, now), 'dim')}  " if timestamps else ""
            asked.say(f"{stamp}{prefix}{text}")
