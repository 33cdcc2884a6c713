"""What is said about an instance: its phase, why, and its generations, as a wire.InstanceReport. Pure.

Inputs are what supervise.py decides from, so that a report never claims what the next decision would not see.
"""

from __future__ import annotations

from slum.model import Listen, Settings
from slum.node.actions import PREPARED, Broken, Missing, Preparation, Prepared, Want, Working
from slum.node.failures import Goal, cause, failures, finished, marked, retry_at, summary
from slum.node.observed import (
    PROBE_FAILURES_MAX,
    Draining,
    Ended,
    Generation,
    Observed,
    Past,
    Ready,
    Starting,
    Stopping,
)
from slum.node.supervise import best, replaces
from slum.wire import Exit, GenerationReport, InstanceReport, Phase

EXITS_REPORTED = 10


def report_of(
    want: Want | None,
    seen: Observed,
    settings: Settings,
    now: float,
    *,
    preparation: Preparation = PREPARED,
    waits_for: str = "",
    health: str = "",
    url: str | None = None,
) -> InstanceReport:
    """Return the report of one instance; ``since`` and figures are the caller's to fill in."""
    goal = goal_wanted(want, preparation)
    phase, detail = phase_of(want, goal, seen, settings, now, waits_for)
    serving = next((g for g in seen.living if g.socket == seen.serving and not isinstance(g.stage, Starting)), None)
    shown = serving or next(reversed(seen.living), None)
    failed = failures(goal, seen, settings) if goal else None
    return InstanceReport(
        service=seen.key.service,
        id=seen.key.id,
        phase=phase,
        release=want.release if want else None,
        generation=_newest(want, seen) if want else None,
        serving=serving.number if serving else None,
        serving_release=serving.release if serving else None,
        generations=tuple(generation_report(g, seen) for g in seen.generations if g.alive),
        exits=tuple(exit_of(past) for past in seen.past[-EXITS_REPORTED:]),
        restarts=seen.restarts,
        retry_at=retry_at(failed, settings, now) if phase is Phase.BACKOFF else None,
        detail=detail,
        health=health,
        pid=shown.pid if shown else None,
        url=url,
    )


def _newest(want: Want, seen: Observed) -> int | None:
    lived = (*((g.release, g.number) for g in seen.generations), *((p.release, p.generation) for p in seen.past))
    return max((number for release, number in lived if release == want.release), default=None)


def goal_wanted(want: Want | None, preparation: Preparation) -> Goal | None:
    if want is None:
        return None
    return Goal(release=want.release, restarts=want.restarts, service=want.service, preparation=preparation)


def phase_of(
    want: Want | None, goal: Goal | None, seen: Observed, settings: Settings, now: float, waits_for: str
) -> tuple[Phase, str]:
    """Return the phase of the wanted release, and why in one line; an older generation may serve meanwhile."""
    living = seen.living
    if want is None or goal is None:
        return Phase.STOPPING, "no longer declared"
    if want.stopped:
        return (Phase.STOPPING, "") if living else (Phase.STOPPED, "")
    mark = marked(goal, seen)
    if mark is not None:
        return Phase.FAILED, mark.why
    mine = [g for g in living if goal.matches(g)]
    current = best((g for g in mine if not isinstance(g.stage, Stopping)), seen.serving) or next(iter(mine), None)
    if current is not None:
        return _living_phase(current, seen, settings, goal)
    end = finished(goal, seen)
    if end is not None:
        return Phase.EXITED, exit_text(end)
    failed = failures(goal, seen, settings)
    match goal.preparation:
        case Working(what=what):
            return Phase.PENDING, what
        case Missing(why=why):
            return Phase.PENDING, why
        case Broken(why=why):
            return Phase.PENDING, why
        case Prepared():
            pass
    if waits_for:
        return Phase.PENDING, f"waits for {waits_for}"
    if failed is not None and now < retry_at(failed, settings, now):
        return Phase.BACKOFF, summary(failed)
    if living and replaces(want.service):
        return Phase.PENDING, f"waits for generation {living[-1].number} to stop"
    return Phase.PENDING, summary(failed) if failed else ""


def exit_text(past: Past) -> str:
    """Return "exit 0 after 1.2 s"."""
    return f"{cause(past)} after {past.ran_s:.1f} s"


def generation_report(generation: Generation, seen: Observed) -> GenerationReport:
    return GenerationReport(
        number=generation.number,
        release=generation.release,
        phase=_stage_phase(generation, seen),
        pid=generation.pid,
        started_at=generation.started_at,
        serving=generation.socket == seen.serving and not isinstance(generation.stage, Starting),
        draining=isinstance(generation.stage, Draining),
    )


def exit_of(past: Past) -> Exit:
    return Exit(at=past.at, generation=past.generation, status=past.status, oom=past.oom, ran_s=round(past.ran_s, 3))


def _living_phase(current: Generation, seen: Observed, settings: Settings, goal: Goal) -> tuple[Phase, str]:
    failed = failures(goal, seen, settings)
    phase = _stage_phase(current, seen)
    match current.stage:
        case Stopping(why=why):
            return phase, why
        case Ready(failures=count) if count:
            return phase, f"{count} probes failed"
        case Starting() if failed is not None:
            return phase, summary(failed)
    return phase, ""


def _stage_phase(generation: Generation, seen: Observed) -> Phase:
    match generation.stage:
        case Starting():
            return Phase.STARTING
        case Ready() if generation.socket != seen.serving:
            return Phase.STARTING
        case Ready(failures=count) if count >= PROBE_FAILURES_MAX:
            return Phase.UNHEALTHY
        case Ready(failures=count) if count:
            return Phase.DEGRADED
        case Stopping(why=why) if why.startswith("unhealthy"):
            return Phase.UNHEALTHY
        case Stopping() | Ended() | Draining():
            return Phase.STOPPING
    return Phase.RUNNING if generation.service.listen is Listen.NONE else Phase.HEALTHY
