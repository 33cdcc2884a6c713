"""The page of `slum explain`: one service's state in a sentence, what led there, its last words, what to do next. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from slum import api
from slum.cli.views import change_text
from slum.render import PHASE_STYLE, Paint, clean, clock, exit_text, instance_name, seconds
from slum.wire import Phase

SERVING = frozenset({Phase.HEALTHY, Phase.RUNNING, Phase.DEGRADED})
GIVEN_UP = frozenset({Phase.FAILED, Phase.BACKOFF, Phase.UNHEALTHY})
ON_THE_WAY = frozenset({Phase.PENDING, Phase.STARTING, Phase.STOPPING})
WAITS = "waits for "
ENDS = ("instance_exited", "instance_stopped")
VERBS = {
    "generation_started": "started",
    "generation_serving": "serves",
    "generation_drained": "drained",
    "instance_healthy": "is healthy",
    "instance_unhealthy": "is unhealthy",
    "instance_exited": "ended",
    "instance_stopped": "ended as asked",
}
SERVICE_KINDS = frozenset({"service_added", "service_changed", "service_removed"})


class Line(NamedTuple):
    """Something that happened: when, what, and how it ended."""

    at: float
    what: str
    result: str = ""


def explain_lines(told: api.Explanation, now: float, paint: Paint) -> list[str]:
    """Return the whole page."""
    lines = [headline(view, now, paint) for view in told.instances]
    if not told.instances:
        known = "is declared, but no machine has reported it yet" if told.desired else "is not declared any more"
        lines = [f"{paint(told.service, 'strong')} {known}"]
    if told.desired:
        lines.append(f"  desired: {told.desired}")
    story = story_of(told)
    width = max((len(line.what) for line in story if line.result), default=0)
    for line in story:
        lines.append(f"  {paint(clock(line.at, now), 'dim')}  {clean(line.what):<{width}}  {line.result}".rstrip())
    for view in told.instances:
        if view.report.health:
            lines.append(f"  last health answer: {clean(view.report.health)}")
    if told.logs:
        several = len({(line.tenement, line.id) for line in told.logs}) > 1
        lines.append(f"  last log lines{_whose(told)}:")
        lines += [f"    {f'{line.id}: ' if several else ''}{clean(line.text)}".rstrip() for line in told.logs]
    lines.append(f"  next: {next_step(told)}")
    return lines


def _whose(told: api.Explanation) -> str:
    """Say which generation wrote the lines where another one serves."""
    report = told.instances[0].report if len(told.instances) == 1 else None
    if report is None or report.generation is None or report.serving in (None, report.generation):
        return ""
    return f" of generation {report.generation}"


def headline(view: api.InstanceView, now: float, paint: Paint) -> str:
    """Return one instance's state as a sentence."""
    report = view.report
    name = f"{paint(_name(view), 'strong')} on {view.tenement}"
    phase = paint(report.phase, PHASE_STYLE.get(report.phase, ""))
    detail = clean(report.detail)
    newest = report.generation or max((generation.number for generation in report.generations), default=0)
    since = f" for {seconds(now - report.since)}" if report.since else ""
    if report.serving is not None and report.phase in SERVING:
        pid = f" (pid {report.pid})" if report.pid else ""
        doing = "serves" if report.url else "runs"
        text = f"{name} is {phase}{since}: generation {report.serving} {doing}{pid}" + (f"; {detail}" if detail else "")
    elif report.serving is not None:
        other = f"generation {newest}" if newest > report.serving else "its new release"
        text = f"{name} is serving generation {report.serving}; {other} is {phase}" + (f": {detail}" if detail else "")
    else:
        text = f"{name} is {phase}{since}" + (f": {detail}" if detail else "")
    if view.stale_s is not None:
        text += f" (as told {seconds(view.stale_s)} ago: its agent is not connected)"
    return text


def _name(view: api.InstanceView) -> str:
    return instance_name(view.report.service, view.report.id, alone=view.report.id == "main")


def story_of(told: api.Explanation) -> list[Line]:
    """Return events and ends of processes in the order of time, what belongs together in one line."""
    alone = len(told.instances) <= 1
    ends = {_generation(event): event.why for event in told.events if event.kind in ENDS and _generation(event)}
    starts = {_generation(event) for event in told.events if event.kind == "generation_started"}
    lines = []
    for event in told.events:
        if event.kind in ENDS and _generation(event) in starts:
            continue
        text = _event_text(event, told)
        if text:
            kind, _, subject = event.subject.partition(":")
            prefix = f"{subject.rpartition('/')[2]}: " if kind == "instance" and not alone else ""
            result = ends.get(_generation(event), "") if event.kind in (*ENDS, "generation_started") else ""
            lines.append(Line(event.at, f"{prefix}{text}", result))
    for view in told.instances:
        seat = f"{view.tenement}/{view.report.service}/{view.report.id}"
        prefix = "" if alone else f"{view.report.id}: "
        lines += [
            Line(ended.at, f"{prefix}generation {ended.generation} ended", exit_text(ended))
            for ended in view.report.exits
            if (seat, ended.generation) not in ends
        ]
    return sorted(lines, key=lambda line: line.at)


def _generation(event: api.Event) -> tuple[str, int] | None:
    """Return (instance, number) of the generation that an agent's note is about."""
    number = event.after.get("generation") if isinstance(event.after, Mapping) else None
    kind, _, subject = event.subject.partition(":")
    return (subject, number) if kind == "instance" and isinstance(number, int) else None


def _event_text(event: api.Event, told: api.Explanation) -> str:
    """Return an event in words; "" when it is no part of this service's story.

    A revision that left the service alone is none; one that changed it is told together with the change.
    """
    if event.kind == "fleet_applied":
        return ""
    kind, _, subject = event.subject.partition(":")
    if event.kind in SERVICE_KINDS:
        verb, change = event.kind.removeprefix("service_"), change_text(event)
        applied = next((e.after for e in told.events if e.kind == "fleet_applied" and e.seq == event.seq), None)
        revision = applied.get("revision") if isinstance(applied, Mapping) else None
        what = change if event.kind == "service_changed" and change else verb
        return (
            f"{verb} by {event.actor}" if revision is None else f"revision {revision} applied by {event.actor}: {what}"
        )
    if event.kind == "override_set":
        return f"{event.why} asked by {event.actor}"
    about = _generation(event)
    if about is not None and event.kind in VERBS:
        detail = "" if not event.why or event.kind in ENDS else f": {event.why}"
        if event.kind == "generation_started":
            detail = f" ({event.why})" if event.why else ""
        return f"generation {about[1]} {VERBS[event.kind]}{detail}"
    words = event.kind.removeprefix("instance_").replace("_", " ")
    why = f": {event.why}" if event.why else ""
    return f"{words}{why}" if kind in ("instance", "service") else f"{subject}: {words}{why}"


def _waits(view: api.InstanceView) -> bool:
    """Tell whether it waits for another service, which the agent names in its detail."""
    report = view.report
    return report.phase is Phase.PENDING and bool(re.fullmatch(rf"{WAITS}[a-z0-9-]+", report.detail))


def next_step(told: api.Explanation) -> str:
    """Return what to do now."""
    # What to type names the one instance that was asked about, else the service.
    service = _name(told.instances[0]) if len(told.instances) == 1 else told.service
    phases = {view.report.phase for view in told.instances}
    if not told.instances:
        return "`slum status` shows the machines" if told.desired else "declare it in slum.toml and `slum apply`"
    if any(view.stale_s is not None for view in told.instances):
        return "`slum status` shows the machine; its services go on without the control plane"
    if phases & GIVEN_UP:
        if any(view.report.serving is not None for view in told.instances):
            return "fix the cause and `slum apply`, or `slum rollback`; what serves goes on meanwhile"
        return f"fix the cause and `slum apply`, or `slum restart {service}` to try again as it is"
    if Phase.DEGRADED in phases:
        return f"`slum logs {service} -f`; three failed probes in a row restart it"
    if Phase.STOPPED in phases:
        return f"`slum start {service}`"
    if Phase.EXITED in phases:
        return f"`slum restart {service}` runs it again"
    if any(view.report.since == 0 for view in told.instances):
        return "`slum status` shows the machine, whose agent has told nothing yet"
    blocker = next((v.report.detail.removeprefix(WAITS) for v in told.instances if _waits(v)), None)
    if blocker is not None:
        return f"it starts when {blocker} is well: `slum explain {blocker}`"
    if phases & ON_THE_WAY:
        return f"wait; `slum logs {service} -f` shows what it says"
    return f"nothing to do; `slum logs {service} -f` shows what it says"
