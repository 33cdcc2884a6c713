"""`slum restart`, `stop` and `start`: one instance or all of a service, waited for."""

from __future__ import annotations

import click

from slum.cli.base import Invocation, SlumCommand, command
from slum.cli.look import chosen
from slum.cli.progress import follow, label
from slum.cli.target import service_argument, span_s, split_target, tenement_option
from slum.errors import Conflict, Unhealthy

PAST = {
    "restart": "restarted",
    "stop": "stopped",
    "start": "started",
    "drain": "drained",
    "undrain": "not drained any more",
}


def _verb(verb: str, doc: str) -> SlumCommand:
    examples = f"""
    slum {verb} notes
    slum {verb} notes/acme --no-wait
    """

    @command(verb, examples=examples, help=doc)
    @service_argument()
    @tenement_option
    @click.option("--no-wait", is_flag=True, help="Return as soon as it is committed.")
    @click.option("--timeout", metavar="TIME", default="2min", show_default=True, help="How long to wait: 30s, 5m.")
    def act(asked: Invocation, service: str, tenement: str | None, no_wait: bool, timeout: str) -> int | None:
        return act_and_wait(asked, verb, service, tenement, wait_s=None if no_wait else span_s(timeout))

    return act


restart = _verb("restart", "Restart instances and wait until they are well; also tries again what was given up.")
stop = _verb(
    "stop", "Stop instances and wait until they have; they stay stopped, over reboots too, until `slum start`."
)
start = _verb("start", "Start what `slum stop` stopped, and wait until it is well.")


def act_and_wait(
    asked: Invocation, verb: str, target: str, tenement: str | None, *, wait_s: float | None
) -> int | None:
    """Do *verb* to what is meant, wait for it, and report; *target* is empty for a verb that takes a whole tenement."""
    service, instance = split_target(target) if target else ("", None)
    with asked.client() as client:
        if target:
            chosen(client.instances(), service, instance, tenement)
        revision = client.status().revision
        acted = client.act(verb, service, instance=instance, tenement=tenement)
        if wait_s is None:
            _report(asked, verb, acted.instances, (), waited=False)
            return None
        outcome = follow(asked, client, revision, timeout_s=wait_s, only=frozenset(acted.instances))
    if not outcome.in_time:
        late = [step.name for step in outcome.waiting] or acted.instances
        raise Unhealthy(
            f"{', '.join(map(label, late))}: not {PAST[verb]} within {wait_s:g} s; it goes on",
            hint=f"`slum explain {service}`" if service else "`slum ps`",
        )
    if outcome.replaced:
        raise Conflict(outcome.replaced, hint="`slum status`")
    failed = tuple(step.name for step in outcome.failed)
    _report(asked, verb, acted.instances, failed, waited=True)
    if failed:
        raise Unhealthy(
            f"{', '.join(map(label, failed))}: not well", hint=f"`slum explain {service}`" if service else "`slum ps`"
        )
    return None


def _report(asked: Invocation, verb: str, instances: tuple[str, ...], failed: tuple[str, ...], *, waited: bool) -> None:
    if asked.json:
        asked.emit({"verb": verb, "instances": instances, "failed": failed, "waited": waited})
    elif waited:
        well = [label(name) for name in instances if name not in failed]
        if not instances:
            asked.say(f"{PAST[verb]}: nothing is declared there")
        if well:
            asked.say(f"{PAST[verb]}: {', '.join(well)}")
    else:
        asked.say(f"{verb} committed for {', '.join(map(label, instances))}; `slum ps` shows it")
