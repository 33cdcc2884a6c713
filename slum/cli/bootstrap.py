"""`slum bootstrap`: make hosts with SSH ready for slum, or let machines there go on under this version of it.

The work is the ssh operator's own, done from here without a control plane: `slum apply` then has only to join. Hosts are
done at the same time, each with a line and a log; one that fails is told with its log, and the others finish.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from slum.cli.base import Invocation, command
from slum.errors import ConfigError, OperatorError, SlumError
from slum.frozen import Frozen

if TYPE_CHECKING:
    from slum.model import SshOperator
    from slum.operators.ssh import Ssh

AT_ONCE = 16
Tell = Callable[[str, str, str], None]


class HostResult(Frozen):
    """What became of one host."""

    host: str
    ok: bool
    detail: str
    hint: str
    code: str
    log: str
    took_s: float
    steps: tuple[str, ...] = ()
    """With --dry-run: what would be done."""
    files: tuple[str, ...] = ()
    """With --dry-run: what that does to the host's files, as lines of a diff."""


@command(
    "bootstrap",
    examples="""
    slum bootstrap root@203.0.113.9 deploy@box.example:2222
    slum bootstrap --operator vps --dry-run
    slum bootstrap --operator vps 203.0.113.9
    slum bootstrap --operator vps --upgrade
    """,
)
@click.argument("host", nargs=-1)
@click.option(
    "--operator", metavar="NAME", help="Hosts and access of [operators.NAME]; HOST then chooses some of them."
)
@click.option("-f", "--file", metavar="FILE", help="Where NAME is declared; without it ask the control plane.")
@click.option("--key", metavar="FILE", help="The private key, without --operator. Else an agent and the usual keys.")
@click.option("--jump", metavar="HOST", help="The host to go through, without --operator.")
@click.option("--dry-run", is_flag=True, help="Show steps and files, change nothing.")
@click.option("--upgrade", is_flag=True, help="Then let the machines there run this version, one after the other.")
def bootstrap(
    asked: Invocation,
    host: tuple[str, ...],
    operator: str | None,
    file: str | None,
    key: str | None,
    jump: str | None,
    dry_run: bool,
    upgrade: bool,
) -> int | None:
    """Install slum on hosts with SSH: what it needs is uploaded, so a host needs no internet. May be repeated.

    It goes on where an earlier one was broken off. The hosts then join by `slum apply`, as tenements of an operator of
    type ssh. With --upgrade machines that run an older slum go on under this one; their services do not notice.
    """
    definition, names = _definition(asked, host, operator, file, key, jump)
    with _shown(asked, names) as tell:
        made = operator_of(asked, definition, tell, alone=operator is None or file is not None)
        results = asyncio.run(_all(made, names, tell, dry_run=dry_run, upgrade=upgrade))
    failed = [result for result in results if not result.ok]
    if asked.json:
        asked.emit(results)
        return OperatorError.exit_code if failed else None
    for result in results:
        for line in (*(f"would {step}" for step in result.steps), *(f"  {line}" for line in result.files)):
            asked.say(f"  {result.host:<24}  {line}")
    for result in failed:
        asked.say(f"{asked.paint('failed', 'bad')}  {result.detail}")
        asked.say(f"          {result.hint}; log: {result.log}" if result.hint else f"          log: {result.log}")
    asked.say(_last_line(results, failed, dry_run=dry_run, upgrade=upgrade))
    return OperatorError.exit_code if failed else None


def _definition(
    asked: Invocation, host: tuple[str, ...], operator: str | None, file: str | None, key: str | None, jump: str | None
) -> tuple[SshOperator, tuple[str, ...]]:
    """Return the operator that is meant and the names of its hosts that are."""
    import os

    from slum import model
    from slum.operators.ssh_hosts import address_of, parse_address

    if operator is None:
        if not host:
            raise ConfigError("which hosts?", hint="slum bootstrap HOST... or slum bootstrap --operator NAME")
        addresses = [parse_address(text) for text in host]
        hosts = tuple(model.SshHost(host=a.host, port=a.port, user=a.user) for a in addresses)
        found = model.SshOperator(name="bootstrap", hosts=hosts, key=os.path.abspath(key) if key else None, jump=jump)
        return found, tuple(dict.fromkeys(address.id for address in addresses))
    if key or jump:
        raise ConfigError("--key and --jump are the operator's own", hint="leave them out, or --operator")
    found = declared(asked, operator, file)
    there = {address_of(one, found).id: one.host for one in found.hosts}
    chosen = []
    for text in host:
        address = parse_address(text)
        if address.id not in there:
            raise ConfigError(f"{address.id} is no host of operators.{operator}", hint=f"it has {', '.join(there)}")
        chosen.append(address.id)
    return found, tuple(chosen or there)


def declared(asked: Invocation, name: str, file: str | None = None) -> SshOperator:
    """Return the ssh operator *name* of *file*, or of the fleet that is applied; ConfigError when there is none."""
    from pathlib import Path

    from slum import model
    from slum.fleetfile import load

    if file is not None:
        operators = load(Path(file)).fleet.operators
    else:
        with asked.client() as client:
            operators = client.fleet().fleet.operators
    found = next((one for one in operators if one.name == name), None)
    if found is None:
        names = ", ".join(one.name for one in operators) or "none"
        raise ConfigError(f"there is no operator {name!r}", hint=f"there are: {names}; -f FILE reads another file")
    if not isinstance(found, model.SshOperator):
        raise ConfigError(f"operators.{name} is of type {model.operator_type(found)}, not ssh")
    return found


def operator_of(asked: Invocation, definition: SshOperator, tell: Tell | None = None, *, alone: bool = False) -> Ssh:
    """Return the operator with this machine's folders; unless *alone* hosts are known by the control plane's keys too."""
    from dataclasses import replace

    from slum.operators.ssh import Ssh
    from slum.operators.ssh_hosts import KnownKeys, key_file
    from slum.server.boot import operator_site

    known: dict[str, str] = {}
    if not alone:
        with asked.client() as client, suppress(ConfigError):  # an older control plane keeps none
            known = {one.host: one.key for one in client.host_keys()}
    site = replace(operator_site(asked.home, ""), keys=KnownKeys(known, key_file(asked.home)))
    return Ssh(definition, site, tell=tell)


async def _all(
    operator: Ssh, names: tuple[str, ...], tell: Tell, *, dry_run: bool, upgrade: bool
) -> tuple[HostResult, ...]:
    at_once = asyncio.Semaphore(AT_ONCE)

    async def one(name: str) -> HostResult:
        async with at_once:
            return await (_look(operator, name, upgrade=upgrade) if dry_run else _prepare(operator, name, tell))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(name), name=f"bootstrap {name}") for name in names]
    results = {task.result().host: task.result() for task in tasks}
    for name in names if upgrade and not dry_run else ():
        if not results[name].ok:
            continue
        results[name] = await _upgrade(operator, name, tell)
        if not results[name].ok:
            break  # whatever is wrong would be wrong with the next one too
    return tuple(results.values())


async def _prepare(operator: Ssh, name: str, tell: Tell) -> HostResult:
    began = time.monotonic()
    try:
        facts = await operator.prepare(name)
    except SlumError as error:
        return _failed(operator, name, error, began, tell)
    return _done(operator, name, f"{facts.distribution}, Python {facts.python}", began)


async def _look(operator: Ssh, name: str, *, upgrade: bool) -> HostResult:
    from slum.operators.bootstrap import files_of

    began = time.monotonic()
    try:
        facts, house, steps = await operator.plan(name)
    except SlumError as error:
        return _failed(operator, name, error, began, None)
    titles = [step.title for step in steps]
    if upgrade and facts.agent_python and house.name not in facts.agent_python.split("/"):
        titles.append(f"switch the machine to {house.name}")
    return HostResult(
        host=name,
        ok=True,
        detail="" if titles else "nothing to do",
        hint="",
        code="",
        log="",
        took_s=round(time.monotonic() - began, 3),
        steps=tuple(titles),
        files=tuple(line for step in steps for line in files_of(step, facts)),
    )


async def _upgrade(operator: Ssh, name: str, tell: Tell) -> HostResult:
    began = time.monotonic()
    try:
        done = await operator.upgrade(name)
    except SlumError as error:
        return _failed(operator, name, error, began, tell)
    return _done(operator, name, "upgraded, services untouched" if done else "nothing to upgrade", began)


def _done(operator: Ssh, name: str, detail: str, began: float) -> HostResult:
    took_s = round(time.monotonic() - began, 3)
    return HostResult(
        host=name, ok=True, detail=detail, hint="", code="", log=str(operator.log_of(name)), took_s=took_s
    )


def _failed(operator: Ssh, name: str, error: SlumError, began: float, tell: Tell | None) -> HostResult:
    if tell is not None:
        tell(name, "failed", error.message)
    code = error.provider_code if isinstance(error, OperatorError) else error.code
    return HostResult(
        host=name,
        ok=False,
        detail=error.message,
        hint=error.hint,
        code=code or "",
        log=str(operator.log_of(name)),
        took_s=round(time.monotonic() - began, 3),
    )


def _last_line(results: tuple[HostResult, ...], failed: list[HostResult], *, dry_run: bool, upgrade: bool) -> str:
    good = len(results) - len(failed)
    if dry_run:
        todo = sum(bool(result.steps) for result in results)
        return f"{todo} of {len(results)} hosts would be changed; nothing was"
    what = "upgraded" if upgrade else "ready"
    rest = f", {len(failed)} failed: put that right and do it again" if failed else ""
    return f"{good} of {len(results)} hosts {what}{rest}" + (
        "" if failed or upgrade else "; `slum apply` lets them join"
    )


@contextmanager
def _shown(asked: Invocation, names: tuple[str, ...]) -> Iterator[Tell]:
    """Yield who is told of steps: lines redrawn in place on a terminal, one a host and step in a pipe, JSON with --json."""
    if asked.json or asked.quiet:
        yield (
            lambda host, step, said: (
                None if asked.quiet else asked.emit_line({"host": host, "step": step, "said": said}, err=True)
            )
        )
        return
    if not (asked.color and sys.stdout.isatty()):
        yield lambda host, step, said: asked.say(f"  {host:<24}  {step:<40}  {said}".rstrip()) if said else None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    latest = dict.fromkeys(names, ("connect", ""))
    began = time.monotonic()

    def table() -> Table:
        shown = Table.grid(padding=(0, 2))
        for host, (step, said) in list(latest.items()):
            style = {"done": "green", "failed": "red"}.get(step, "yellow")
            shown.add_row(f"  {host}", f"[{style}]{step}[/]", f"{said}", f"[dim]{time.monotonic() - began:.1f} s[/]")
        return shown

    def tell(host: str, step: str, said: str) -> None:
        latest[host] = (step, said.splitlines()[0] if said else "")

    with Live(get_renderable=table, console=Console(highlight=False), refresh_per_second=8):
        yield tell
