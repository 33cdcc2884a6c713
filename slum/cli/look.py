"""`slum status`, `ps` and `explain`: ask the control plane, show the answer. They change nothing."""

from __future__ import annotations

import shutil
import sys
import time

import click

from slum import api
from slum.cli.base import Invocation, command
from slum.cli.story import explain_lines
from slum.cli.target import service_argument, split_target
from slum.cli.views import cluster_lines, ps_lines, status_lines
from slum.errors import ConfigError
from slum.problem import nearest


@command(
    "ps",
    examples="""
    slum ps
    slum ps notes
    slum ps --json | jq -r '.[].report.url'
    """,
)
@service_argument(required=False)
def ps(asked: Invocation, service: str | None) -> None:
    """List instances: state, age, share of a core since their start, memory, URL.

    The last column says what is wrong with those that are not well. SERVICE[/ID] shows only these.
    """
    with asked.client() as client:
        found = client.instances()
    if service is not None:
        name, instance = split_target(service)
        found = chosen(found, name, instance)
    if asked.json:
        asked.emit(found)
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in ps_lines(found, time.time(), asked.paint, width):
        asked.say(line)


@command(
    "status",
    examples="""
    slum status
    slum status --cluster
    slum status --json
    """,
)
@click.option("--cluster", is_flag=True, help="The members of the control plane instead.")
def status(asked: Invocation, cluster: bool) -> None:
    """Show the control plane, its machines, and what is not well; on a node (`slum join`) what it is a node of."""
    from slum.cli.join import status_of_node
    from slum.node.home import has_joined

    if not asked.context and has_joined(asked.home):
        status_of_node(asked)
        return
    if cluster:
        with asked.client() as client:
            view = client.cluster()
        if asked.json:
            asked.emit(view)
            return
        for line in cluster_lines(view, asked.paint):
            asked.say(line)
        return
    with asked.client() as client:
        found = client.status()
        instances = () if asked.json else client.instances()
    if asked.json:
        asked.emit(found)
        return
    lines = status_lines(found, instances, asked.paint)
    for line in lines:
        asked.say(line)


@command(
    "explain",
    examples="""
    slum explain notes
    slum explain notes --json
    """,
)
@service_argument()
def explain(asked: Invocation, service: str) -> None:
    """Tell why SERVICE is in its state: what changed, how it ended, its last words, and what to do next."""
    name, instance = split_target(service)
    with asked.client() as client:
        told = client.explain(name)
    if instance is not None:
        told = api.Explanation(
            service=name,
            instances=chosen(told.instances, name, instance),
            events=tuple(e for e in told.events if not _of_another(e.subject, name, instance)),
            logs=tuple(line for line in told.logs if line.id == instance),
            desired=told.desired,
        )
    if asked.json:
        asked.emit(told)
        return
    for line in explain_lines(told, time.time(), asked.paint):
        asked.say(line)


def chosen(
    found: tuple[api.InstanceView, ...], service: str, instance: str | None = None, tenement: str | None = None
) -> tuple[api.InstanceView, ...]:
    """Return the instances that are meant; ConfigError with the nearest name when there is none."""
    of_service = tuple(view for view in found if view.report.service == service)
    if not of_service:
        near = nearest(service, {view.report.service for view in found})
        raise ConfigError(f"there is no service {service!r}{near}", hint="`slum ps` lists them")
    of_id = tuple(view for view in of_service if instance in (None, view.report.id))
    if not of_id:
        near = nearest(str(instance), {view.report.id for view in of_service})
        raise ConfigError(
            f"service {service} has no instance {instance!r}{near}", hint=f"`slum ps {service}` lists them"
        )
    there = tuple(view for view in of_id if tenement is None or _is_machine_of(view.tenement, tenement))
    if not there:
        near = nearest(str(tenement), {view.tenement for view in of_id})
        raise ConfigError(f"service {service} does not run on {tenement!r}{near}", hint=f"`slum ps {service}`")
    return there


def _is_machine_of(machine: str, tenement: str) -> bool:
    """Tell whether *machine* is the tenement, or one of its several (NAME-1, NAME-2, ...)."""
    return machine == tenement or (machine.startswith(f"{tenement}-") and machine[len(tenement) + 1 :].isdigit())


def _of_another(subject: str, service: str, instance: str) -> bool:
    kind, _, name = subject.partition(":")
    return kind == "instance" and not name.endswith(f"/{service}/{instance}")
