"""The pages of `slum ps`, `status`, `events` and `explain`: the API's answers in, lines of text out. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from slum import api
from slum.render import (
    PHASE_STYLE,
    Cell,
    Paint,
    clean,
    clock,
    exit_text,
    instance_name,
    quantity,
    seconds,
    size,
    table,
)
from slum.wire import Phase

PS_HEADER = ("SERVICE", "ID", "TENEMENT", "LEVEL", "STATE", "AGE", "CPU", "MEM", "REQUESTS", "RESTARTS", "URL", "")
UNWELL = frozenset({Phase.FAILED, Phase.BACKOFF, Phase.UNHEALTHY, Phase.DEGRADED})


def ps_lines(instances: Sequence[api.InstanceView], now: float, paint: Paint) -> list[str]:
    """One row an instance; the last column says what is wrong with one that is not well."""
    if not instances:
        return ["nothing runs here: `slum apply` a slum.toml"]
    rows = []
    for view in sorted(instances, key=lambda v: (v.report.service, v.tenement, v.report.id)):
        report = view.report
        unknown = view.stale_s is not None
        rows.append(
            (
                Cell(report.service, "strong"),
                report.id,
                view.tenement,
                view.isolation,
                Cell("unknown", "warn") if unknown else Cell(report.phase, PHASE_STYLE.get(report.phase, "")),
                seconds(now - report.since) if report.since else "",
                _cpu(view, now),
                "" if report.memory_bytes is None else size(report.memory_bytes),
                "" if report.requests is None else str(report.requests),
                str(report.restarts) if report.restarts else "",
                report.url or "",
                _remark(view),
            )
        )
    return table(PS_HEADER, rows, paint)


def status_lines(status: api.Status, instances: Sequence[api.InstanceView], paint: Paint) -> list[str]:
    """The control plane, its machines, and last what is not well and how to look at it."""
    ledger = status.ledger
    up = seconds(status.now - status.started_at)
    leader = f"leader {ledger.leader}" if ledger.leader else paint("no leader", "bad")
    lines = [
        f"control plane  {paint('running', 'good')} since {up}, version {status.version}, pid {status.pid}"
        f" (data {status.data_dir})",
        f"ledger         {leader}, epoch {ledger.epoch}, sequence {ledger.seq}",
        f"fleet          {status.fleet or '(none yet)'}, revision {status.revision}, domain {status.domain}",
        f"instances      {_counts(status.counts, paint)}",
    ]
    if status.tenements:
        header = ("TENEMENT", "OPERATOR", "STATE", "HOST", "CONTACT", "LOAD", "MEMORY FREE", "INSTANCES", "")
        lines += ["", *table(header, [_tenement_row(t) for t in status.tenements], paint)]
    unwell = sorted({v.report.service for v in instances if v.report.phase in UNWELL})
    if unwell:
        lines += ["", *(f"{name} is not well: `slum explain {name}`" for name in unwell)]
    elif status.revision == 0:
        lines += ["", "nothing is declared yet: `slum init`, then `slum apply`"]
    return lines


def member_lines(ledger: api.LedgerView, paint: Paint) -> list[str]:
    """One row a member of the control plane."""
    style = {"leader": "good", "down": "bad", "fenced": "bad"}
    rows = [
        (
            Cell(member.id, "strong"),
            Cell(member.role, style.get(member.role, "")),
            str(ledger.epoch),
            str(ledger.seq - member.lag),
            "" if member.role == "leader" else str(member.lag),
            "" if member.contact_s is None else seconds(member.contact_s),
            "" if member.certificate_s is None else seconds(member.certificate_s),
            member.address,
        )
        for member in ledger.members
    ]
    return table(("MEMBER", "ROLE", "EPOCH", "SEQ", "LAG", "CONTACT", "CERT", "ADDRESS"), rows, paint)


def event_lines(events: Sequence[api.Event], now: float, paint: Paint) -> list[str]:
    """One row an event: when, what, about what, by whom, and the change in words."""
    return [
        f"{paint(clock(event.at, now), 'dim')}  {event.number:>6}  {event.kind:<22}  {event.subject:<28}"
        f"  {event.actor:<18}  {clean(change_text(event))}".rstrip()
        for event in events
    ]


def change_text(event: api.Event) -> str:
    """Return why an event happened and what it changed, in a line: "memory_limit_mb 256 -> 512"."""
    parts = [event.why] if event.why else []
    before, after = event.before, event.after
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        parts += [
            f"{name} {value_text(before.get(name))} -> {value_text(after.get(name))}"
            for name in sorted({*before, *after})
            if before.get(name) != after.get(name)
        ]
    elif isinstance(after, Mapping):
        parts += [f"{name} {value_text(value)}" for name, value in sorted(after.items()) if not isinstance(value, Mapping)]
    return ", ".join(parts)


def value_text(value: object) -> str:
    """Return a value as a person would write it in TOML, short."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return f'"{value}"' if not value or " " in value else value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return " ".join(value_text(item) if " " in str(item) else str(item) for item in value) or "none"
    return str(value)


def explain_lines(told: api.Explanation, now: float, paint: Paint) -> list[str]:
    """The story of a service: its state in a sentence, what led there, its last words, and what to do next."""
    if not told.instances:
        lines = [f"{told.service} is declared, but no machine has reported it yet" if told.desired else
                 f"{told.service} is not declared any more"]
    else:
        alone = len(told.instances) == 1
        lines = [_headline(view, now, paint, alone=alone) for view in told.instances]
    if told.desired:
        lines.append(f"  desired: {told.desired}")
    story = _story(told, now)
    if story:
        width = max(len(what) for _, what, _ in story)
        lines += [f"  {paint(at, 'dim')}  {what:<{width}}  {result}".rstrip() for at, what, result in story]
    for view in told.instances:
        if view.report.health:
            lines.append(f"  last health answer: {clean(view.report.health)}")
    if told.logs:
        several = len({(line.tenement, line.id) for line in told.logs}) > 1
        lines.append("  last log lines:")
        lines += [f"    {f'{line.id}: ' if several else ''}{clean(line.text)}".rstrip() for line in told.logs]
    lines.append(f"  next: {_next_step(told)}")
    return lines


def _headline(view: api.InstanceView, now: float, paint: Paint, *, alone: bool) -> str:
    report = view.report
    name = f"{paint(instance_name(report.service, report.id, alone=alone), 'strong')} on {view.tenement}"
    phase = paint(report.phase, PHASE_STYLE.get(report.phase, ""))
    newest = max((g.number for g in report.generations), default=report.serving or 0)
    detail = f": {clean(report.detail)}" if report.detail else ""
    since = f" for {seconds(now - report.since)}" if report.since else ""
    if report.serving is not None and newest > report.serving:
        text = f"{name} is serving generation {report.serving}; generation {newest} is {phase}{detail}"
    elif report.serving is not None and report.phase in (Phase.HEALTHY, Phase.RUNNING, Phase.DEGRADED):
        what = "serves" if report.url else "runs"
        text = f"{name} is {phase}{since}: generation {report.serving} {what}" + (
            f" (pid {report.pid})" if report.pid else ""
        )
        text += f"; {clean(report.detail)}" if report.detail else ""
    elif report.serving is not None and report.phase == Phase.FAILED:
        text = f"{name} is serving generation {report.serving}; its new release {phase}{detail}"
    else:
        text = f"{name} is {phase}{since}{detail}"
    if view.stale_s is not None:
        text += f" (as last told {seconds(view.stale_s)} ago: its agent is not connected)"
    return text


def _story(told: api.Explanation, now: float) -> list[tuple[str, str, str]]:
    """Events and ends of processes in the order of time, as (local time, what, result)."""
    alone = len(told.instances) <= 1
    rows: list[tuple[float, str, str]] = []
    for event in told.events:
        rows.append((event.at, _event_text(event, told.service, alone=alone), ""))
    for view in told.instances:
        prefix = "" if alone else f"{view.report.id}: "
        for ended in view.report.exits:
            rows.append((ended.at, f"{prefix}generation {ended.generation} ended", exit_text(ended)))
    return [(clock(at, now), clean(what), result) for at, what, result in sorted(rows, key=lambda row: row[0])]


def _event_text(event: api.Event, service: str, *, alone: bool) -> str:
    words = event.kind.replace("_", " ")
    if event.kind == "fleet_applied":
        after = event.after if isinstance(event.after, Mapping) else {}
        revision = after.get("revision")
        return f"revision {revision} applied by {event.actor}" if revision else f"fleet applied by {event.actor}"
    kind, _, subject = event.subject.partition(":")
    if kind == "instance":
        words = words.removeprefix("instance ")
        if not alone:
            words = f"{subject.rpartition('/')[2]}: {words}"
    elif kind == "service" and subject == service:
        words = f"{words.removeprefix('service ')} by {event.actor}"
    elif subject:
        words = f"{words} ({subject})"
    change = change_text(event)
    return f"{words}: {change}" if change else words


def _next_step(told: api.Explanation) -> str:
    service = told.service
    phases = {view.report.phase for view in told.instances}
    if any(view.stale_s is not None for view in told.instances):
        return "`slum status` shows the machine; its services go on without the control plane"
    if phases & {Phase.FAILED, Phase.BACKOFF, Phase.UNHEALTHY}:
        if any(view.report.serving is not None for view in told.instances):
            return "fix the cause and apply, or `slum rollback`; what serves goes on meanwhile"
        return f"fix the cause and apply, or `slum restart {service}` to try again"
    if Phase.DEGRADED in phases:
        return f"`slum logs {service} -f`; it is restarted when three probes in a row fail"
    if Phase.STOPPED in phases:
        return f"`slum start {service}`"
    if Phase.EXITED in phases:
        return f"`slum restart {service}` runs it again"
    if phases & {Phase.PENDING, Phase.STARTING, Phase.STOPPING}:
        return f"wait; `slum logs {service} -f` shows what it says"
    if not told.instances:
        return "`slum status` shows the machines" if told.desired else "declare it and `slum apply`"
    return f"nothing to do; `slum logs {service} -f` shows what it says"


def _cpu(view: api.InstanceView, now: float) -> str:
    """The share of one core since the start, as ps(1) counts it."""
    report = view.report
    started = next((g.started_at for g in report.generations if g.number == report.serving), report.since)
    if report.cpu_s is None or not started or now <= started:
        return ""
    return f"{100 * report.cpu_s / (now - started):.1f} %"


def _remark(view: api.InstanceView) -> str:
    if view.stale_s is not None:
        return f"{view.report.phase} when last seen {seconds(view.stale_s)} ago"
    if view.report.phase in (Phase.HEALTHY, Phase.RUNNING):
        return ""
    return clean(view.report.detail)


def _tenement_row(tenement: api.TenementView) -> tuple[str, ...]:
    style = {"ready": "good", "unknown": "bad"}.get(tenement.state, "warn")
    known = tenement.memory_bytes > 0
    return (
        Cell(tenement.name, "strong"),
        tenement.operator,
        Cell(tenement.state, style),
        tenement.host,
        "" if tenement.contact_s is None else f"{seconds(tenement.contact_s)} ago",
        f"{tenement.load:.2f}" if known else "",
        size(tenement.memory_available_bytes) if known else "",
        str(tenement.instances),
        clean(tenement.detail),
    )


def _counts(counts: Mapping[str, int], paint: Paint) -> str:
    order = Counter(counts).most_common()
    return ", ".join(paint(f"{n} {phase}", PHASE_STYLE.get(phase, "")) for phase, n in order if n) or "none"


