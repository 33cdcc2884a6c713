"""The pages of `slum ps`, `status` and `events`: the API's answers in, lines of text out. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from slum import api
from slum.render import (
    PHASE_STYLE,
    Cell,
    Paint,
    clean,
    clock,
    seconds,
    size,
    table,
)
from slum.wire import Phase

PS_HEADER = ("SERVICE", "ID", "TENEMENT", "LEVEL", "STATE", "AGE", "CPU", "MEM", "REQUESTS", "RESTARTS", "URL", "")
_DIGEST = re.compile(r"[0-9a-f]{64}")
VALUE_CHARS = 60
UNWELL = frozenset({Phase.FAILED, Phase.BACKOFF, Phase.UNHEALTHY, Phase.DEGRADED})


PS_SPARE = ("REQUESTS", "CPU", "MEM", "RESTARTS", "LEVEL", "AGE", "TENEMENT")
"""What a narrow terminal does without, first one first."""


def ps_lines(
    instances: Sequence[api.InstanceView], now: float, paint: Paint, width_max: int | None = None
) -> list[str]:
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
                str(report.restarts),
                report.url or "",
                _remark(view),
            )
        )
    return table(PS_HEADER, rows, paint, width_max=width_max, spare=PS_SPARE)


def status_lines(status: api.Status, instances: Sequence[api.InstanceView], paint: Paint) -> list[str]:
    """The control plane, its machines, and last what is not well and how to look at it."""
    ledger = status.ledger
    up = seconds(status.now - status.started_at)
    leader = f"leader {ledger.leader}" if ledger.leader else paint("no leader", "bad")
    if not ledger.majority:
        leader = (
            f"{paint('cut off', 'bad')}: no majority is in reach, what is shown is {seconds(ledger.age_s)} old or older"
        )
    if ledger.silent_s is not None:
        leader = f"{paint('does not answer', 'bad')}; what it last said {seconds(ledger.silent_s)} ago: {leader}"
    lines = [
        f"control plane  {paint('running', 'good')} for {up}, version {status.version}, pid {status.pid}"
        f" (data {status.data_dir})",
        f"ledger         {leader}, epoch {ledger.epoch}, sequence {ledger.seq}",
        f"fleet          {status.fleet or '(none yet)'}, revision {status.revision}, domain {status.domain}",
        f"instances      {_counts(status.counts, paint)}",
    ]
    if status.tenements:
        header = ("TENEMENT", "OPERATOR", "STATE", "HOST", "CONTACT", "LOAD", "MEMORY FREE", "INSTANCES", "")
        lines += ["", *table(header, [_tenement_row(t) for t in status.tenements], paint)]
    if ledger.silent_s is not None:
        lines += [
            "",
            "nothing can be changed until the ledger answers; it is started again by itself within some 60 s, and services go on",
        ]
    if status.paused:
        lines += [
            "",
            f"{paint('paused', 'warn')}: {clean(status.paused)}; `slum resume` shows what it would do, and goes on",
        ]
    if not ledger.majority:
        lines += ["", "nothing can be changed from here: `slum status --cluster` says who is missing, and what to do"]
    unwell = sorted({v.report.service for v in instances if v.report.phase in UNWELL})
    if unwell:
        lines += ["", *(f"{name} is not well: `slum explain {name}`" for name in unwell)]
    elif status.revision == 0:
        lines += ["", "nothing is declared yet: `slum init`, then `slum apply`"]
    return lines


def machine_lines(machines: Sequence[api.MachineView], now: float, paint: Paint) -> list[str]:
    """One row a machine; the last column says what its operator's trouble is."""
    if not machines:
        return ["there are no machines: `slum apply` a slum.toml makes them"]
    style = {"gone": "warn", "left": "bad", "stray": "warn"}
    rows = [
        (
            Cell(m.name, "strong"),
            m.operator,
            m.id,
            str(m.incarnation or ""),
            Cell(m.state or "unknown", "good" if m.state == "created" else "warn"),
            Cell(m.drift, style.get(m.drift, "")),
            "" if m.created_at is None else seconds(now - m.created_at),
            "never" if m.seen_s is None else f"{seconds(m.seen_s)} ago",
            clean(m.detail),
        )
        for m in machines
    ]
    return table(("MACHINE", "OPERATOR", "ID", "INCARNATION", "STATE", "DRIFT", "AGE", "ASKED", ""), rows, paint)


def cluster_lines(view: api.ClusterView, paint: Paint) -> list[str]:
    """One row a member of the control plane, as the one that answers knows them; then what somebody should look at."""
    style = {"leader": "good", "follower": "", "learner": "warn"}
    rows = [
        (
            Cell(member.id, "strong"),
            Cell(member.role, style.get(member.role, "bad")),
            "" if member.epoch is None else str(member.epoch),
            "" if member.seq is None else str(member.seq),
            "" if member.lag is None or member.role == "leader" else str(member.lag),
            "" if member.contact_s is None or member.id == view.member else seconds(member.contact_s),
            "" if member.certificate_s is None else seconds(member.certificate_s),
            member.api or member.address,
            "" if member.followed or not member.api else Cell("its API is not reached", "warn"),
        )
        for member in view.members
    ]
    lines = table(("MEMBER", "ROLE", "EPOCH", "SEQ", "LAG", "CONTACT", "CERT", "ADDRESS", ""), rows, paint)
    leader = f"leader {view.leader}" if view.leader else paint("no leader", "bad")
    lines += ["", f"{leader}, term {view.term}, generation {view.generation}; as {view.member} knows it"]
    if not view.majority:
        why = f"{view.member} reaches no majority: nothing can be changed from here"
        lines.append(f"{paint(why, 'bad')}; what it shows is {seconds(view.age_s)} old or older")
    lines += _versions(view)
    for alarm in view.alarms:
        lines.append(f"{paint(alarm.kind, 'bad')} {alarm.member}: {clean(alarm.why)}")
        if alarm.hint:
            lines.append(f"  next: {clean(alarm.hint)}")
    return lines


def _versions(view: api.ClusterView) -> list[str]:
    """Say how far an upgrade is, while some member speaks a newer protocol of the ledger than the one in force."""
    spoken = {member.id: member.protocol or 0 for member in view.members if member.role != "learner"}
    if max(spoken.values(), default=0) <= view.protocol:
        return []
    older = sorted(name for name, protocol in spoken.items() if protocol <= view.protocol)
    if older:
        return [
            f"protocol {view.protocol} is in force until {', '.join(older)} can speak a newer one, as others do already"
        ]
    newest = min(spoken.values())
    return [
        f"protocol {view.protocol} is in force; all speak {newest}, which comes into force when they have for an hour"
    ]


def event_lines(events: Sequence[api.Event], now: float, paint: Paint) -> list[str]:
    """One row an event: when, what, about what, by whom, and the change in words."""
    return [
        f"{paint(clock(event.at, now), 'dim')}  {event.number:>6}  {event.kind:<22}  {event.subject:<28}"
        f"  {event.actor:<18}  {clean(change_text(event))}".rstrip()
        for event in events
    ]


def change_text(event: api.Event) -> str:
    """Return why an event happened and what it changed, in a line: "memory_limit_mb 256 -> 512"."""
    why = [] if event.why in ("", "apply") else [event.why]
    if event.kind == "fleet_applied" and isinstance(event.after, Mapping):
        summary = event.after.get("summary")
        why = [f"revision {event.after.get('revision')}" + (f": {summary}" if summary else ""), *why]
        return ", ".join(why)
    return ", ".join([*why, *changes_text(event.before, event.after)])


def changes_text(before: object, after: object, prefix: str = "") -> list[str]:
    """Return each field that differs between two documents; of a single one, its plain fields."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: list[str] = []
        for name in sorted({*before, *after}):
            was, now = before.get(name), after.get(name)
            if isinstance(was, Mapping) or isinstance(now, Mapping):
                found += changes_text(was or {}, now or {}, f"{prefix}{name}.")
            elif was != now:
                found.append(f"{prefix}{name} {value_text(was)} -> {value_text(now)}")
        return found
    if isinstance(after, Mapping):
        plain = ((name, value) for name, value in sorted(after.items()) if not isinstance(value, Mapping))
        return [f"{name} {value_text(value)}" for name, value in plain if value not in (None, "", [], ())]
    return []


def value_text(value: object) -> str:
    """Return a value as a person would write it, short: digests cut, texts quoted where they need it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if _DIGEST.fullmatch(value):
            return value[:12]
        short = value if len(value) <= VALUE_CHARS else f"{value[:VALUE_CHARS]}..."
        short = short.replace("\n", "\\n")
        return f'"{short}"' if not short or " " in short else short
    if isinstance(value, (list, tuple)):
        return " ".join(map(value_text, value)) or "none"
    return str(value)


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
    report = view.report
    if report.phase in (Phase.HEALTHY, Phase.RUNNING):
        return ""
    old = report.serving if report.serving_release not in (None, report.release) else None
    serves = "" if old is None else f"generation {old} of the release before serves"
    return "; ".join(part for part in (clean(report.detail), serves) if part)


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
