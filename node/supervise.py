"""What to do next for each instance: a pure function of what is desired, what is observed and the time.

    (wants, observed, now) -> actions, and when to ask again

Actions never run themselves: the agent performs one, folds what came of it into Observed, and asks again until nothing is
left to do. The same question has the same answer, so an agent that was killed and came back goes on where it was.

A deploy of a routed service overlaps: the new generation is started beside the old one, published when healthy, then the
old one is drained and stopped. A service whose address is fixed, or that takes no requests, is replaced: stopped, then
started. A release that fails more than max_restarts times is given up; the old generation goes on serving, or is started
again from the last healthy release. Only time spent healthy counts against restart_window, so that a slow crash loop
(long start-up, long back-off) ends too.

Must never: start a second generation of what already lives, signal what is not in Observed, or read a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from slum.model import Deploy, Key, Listen, Service, Settings, release_of
from slum.node.actions import (
    PREPARED,
    Action,
    Around,
    Broken,
    CloseSocket,
    Decision,
    Drain,
    Forget,
    GiveUp,
    Kill,
    Missing,
    Plan,
    PreDeploy,
    Preparation,
    Prepare,
    Prepared,
    Publish,
    Reap,
    Start,
    Terminate,
    Unpublish,
    Want,
)
from slum.node.failures import Goal, failures, finished, marked, retry_at, summary
from slum.node.observed import (
    PROBE_FAILURES_MAX,
    Draining,
    Generation,
    Mark,
    Observed,
    Ready,
    Starting,
    Stopping,
    routed,
)
from slum.wire import Desired

GENERATIONS_MAX = 4
"""So many generations of one instance may live at once; a further overlap waits for one to finish draining."""


# --- the whole tenement -----------------------------------------------------------------------------------------------


def wants_of(desired: Desired) -> dict[Key, Want]:
    """Return the instances that *desired* asks for, by key."""
    overrides = {(o.service, o.id): o for o in desired.overrides}
    wants: dict[Key, Want] = {}
    for service in desired.services:
        release = release_of(service)
        for instance in service.instances:
            key = Key(tenement=desired.tenement, service=service.name, id=instance)
            asked = overrides.get((service.name, instance))
            wants[key] = Want(
                key=key,
                release=release,
                service=service,
                restarts=asked.restarts if asked else 0,
                stopped=asked.stopped if asked else False,
            )
    return wants


def plan(
    wants: Mapping[Key, Want],
    observed: Mapping[Key, Observed],
    preparations: Mapping[str, Preparation],
    settings: Settings,
    now: float,
    keys: Iterable[Key] | None = None,
) -> Plan:
    """Return what to do for *keys* (all when None), ordered by key, and when to ask again."""
    ids = keys_of(wants)
    live_removed = {
        name
        for key, seen in observed.items()
        if key not in wants
        for generation in seen.living
        for name in generation.service.depends_on
    }
    actions: list[Action] = []
    wakes: dict[Key, float] = {}
    for key in sorted(set(keys) if keys is not None else {*wants, *observed}):
        want, seen = wants.get(key), observed.get(key) or Observed(key=key)
        good = seen.good.release if seen.good else ""
        around = Around(
            settings=settings,
            wanted=preparations.get(want.release, PREPARED) if want else PREPARED,
            fallback=preparations.get(good, PREPARED),
            waits_for=waits_for(want, wants, observed.get, ids) if want else "",
            dependents_live=want is None and key.service in live_removed,
        )
        decision = decide(want, seen, around, now)
        actions += decision.actions
        if decision.wake_at is not None:
            wakes[key] = decision.wake_at
    return Plan(actions=tuple(actions), wakes=wakes)


def keys_of(wants: Iterable[Key]) -> dict[str, list[Key]]:
    """Return the keys of each service."""
    ids: dict[str, list[Key]] = {}
    for key in wants:
        ids.setdefault(key.service, []).append(key)
    return ids


def waits_for(
    want: Want, wants: Mapping[Key, Want], seen: Callable[[Key], Observed | None], ids: Mapping[str, list[Key]]
) -> str:
    """Return the first dependency of *want* with no healthy instance, or with one that may still become healthy."""
    for name in want.service.depends_on:
        states = [_standing(wants[key], seen(key)) for key in ids.get(name, ())]
        if states and ("coming" in states or "up" not in states):
            return name
    return ""


def _standing(want: Want, seen: Observed | None) -> str:
    goal = Goal(release=want.release, restarts=want.restarts, service=want.service, preparation=PREPARED)
    if seen is None:
        return "coming"
    if any(isinstance(g.stage, Ready) and g.stage.failures < PROBE_FAILURES_MAX for g in seen.living):
        return "up"
    if want.stopped or marked(goal, seen):
        return "down"
    end = finished(goal, seen)
    return ("up" if end.status == 0 else "down") if end else "coming"


# --- one instance -----------------------------------------------------------------------------------------------------


class _Draft:
    def __init__(self) -> None:
        self.actions: list[Action] = []
        self.wake_at: float | None = None

    def wake(self, at: float) -> None:
        self.wake_at = at if self.wake_at is None else min(self.wake_at, at)


def decide(want: Want | None, seen: Observed, around: Around, now: float) -> Decision:
    """Return the next actions for one instance; *want* is None when it is no longer desired."""
    draft = _Draft()
    for generation in seen.generations:
        if not generation.alive:
            draft.actions.append(Reap(key=seen.key, number=generation.number))
        elif isinstance(generation.stage, Stopping):
            _enforce(generation, generation.stage, seen, draft, now)
    goal = goal_of(want, seen, around)
    mark = _verdict(want, goal, seen, around, now)
    if mark is not None:
        draft.actions.append(GiveUp(key=seen.key, mark=mark))
    elif want is None or want.stopped:
        _wind_down(want, seen, around, draft, now)
    else:
        if goal is None:
            _hold(seen, draft, now)
        else:
            _pursue(goal, seen, around, draft, now)
        _prepare(want, seen, around, draft, now)
        _tidy(goal, seen, draft)
    return Decision(actions=tuple(draft.actions), wake_at=draft.wake_at)


def goal_of(want: Want | None, seen: Observed, around: Around) -> Goal | None:
    """Return what the instance is to run now; None when nothing (stopped, removed, or given up without a fallback)."""
    if want is None or want.stopped:
        return None
    goal = Goal(release=want.release, restarts=want.restarts, service=want.service, preparation=around.wanted)
    held = marked(goal, seen) is not None
    lives = any(goal.matches(g) and not isinstance(g.stage, Stopping) for g in seen.living)
    if not held and (lives or isinstance(around.wanted, Prepared) or finished(goal, seen)):
        return goal
    if seen.good is not None and seen.good.release != want.release:
        good = Goal(release=seen.good.release, restarts=0, service=seen.good.service, preparation=around.fallback)
        return None if marked(good, seen) else good
    return None if held else goal


def replaces(service: Service) -> bool:
    """Tell whether a deploy has to stop the old generation first: it says so, or two could not share the address."""
    fixed = service.listen is Listen.PORT or service.socket is not None
    return fixed or service.deploy is Deploy.REPLACE


def _verdict(want: Want | None, goal: Goal | None, seen: Observed, around: Around, now: float) -> Mark | None:
    if want is None or want.stopped:
        return None
    wanted = Goal(release=want.release, restarts=want.restarts, service=want.service, preparation=around.wanted)
    for aim in (wanted, goal):
        if aim is None or marked(aim, seen):
            continue
        broken = aim.preparation
        lives = any(aim.matches(g) for g in seen.living)
        if isinstance(broken, Broken) and not lives:
            return Mark(release=aim.release, restarts=aim.restarts, at=now, why=broken.why)
        failed = failures(aim, seen, around.settings)
        if failed is not None and failed.count > around.settings.max_restarts and not lives:
            return Mark(release=aim.release, restarts=aim.restarts, at=now, why=summary(failed))
    return None


def _enforce(generation: Generation, stage: Stopping, seen: Observed, draft: _Draft, now: float) -> None:
    if stage.killed:
        return
    due = stage.since + generation.service.stop_timeout_s
    if now >= due:
        draft.actions.append(Kill(key=seen.key, number=generation.number))
    else:
        draft.wake(due)


def _wind_down(want: Want | None, seen: Observed, around: Around, draft: _Draft, now: float) -> None:
    living = seen.living
    if not around.dependents_live:
        for generation in living:
            _retire(generation, seen, draft, now)
    if not living:
        _tidy(None, seen, draft)
        if want is None and not seen.generations and seen.serving is None and not seen.sockets:
            draft.actions.append(Forget(key=seen.key))


def _hold(seen: Observed, draft: _Draft, now: float) -> None:
    """Leave what serves alone: the wanted release was given up and nothing is known to fall back to."""
    for generation in seen.living:
        if generation.socket != seen.serving:
            _retire(generation, seen, draft, now)


def _pursue(goal: Goal, seen: Observed, around: Around, draft: _Draft, now: float) -> None:
    mine = [g for g in seen.living if goal.matches(g) and not isinstance(g.stage, Stopping)]
    current = best(mine, seen.serving)
    for generation in mine:
        if generation is not current:
            draft.actions.append(Terminate(key=seen.key, number=generation.number))
    if current is None:
        _start(goal, seen, around, draft, now)
    else:
        _oversee(current, seen, draft, now)
    for generation in seen.living:
        if generation not in mine and generation.socket != seen.serving:
            _retire(generation, seen, draft, now)


def best(generations: Iterable[Generation], serving: int | None) -> Generation | None:
    """Return the generation to keep of several alike: the serving one, else a healthy one, else the oldest."""
    return min(
        generations,
        key=lambda g: (g.socket != serving, not isinstance(g.stage, Ready), isinstance(g.stage, Draining), g.number),
        default=None,
    )


def _oversee(current: Generation, seen: Observed, draft: _Draft, now: float) -> None:
    stage = current.stage
    if isinstance(stage, Starting):
        due = stage.since + current.service.startup_timeout_s
        if now >= due:
            why = f"not healthy within {current.service.startup_timeout_s:g} s"
            draft.actions.append(Terminate(key=seen.key, number=current.number, why=why))
        else:
            draft.wake(due)
    elif isinstance(stage, Ready) and stage.failures >= PROBE_FAILURES_MAX:
        why = f"unhealthy: {stage.failures} probes failed"
        draft.actions.append(Terminate(key=seen.key, number=current.number, why=why))
    elif isinstance(stage, Draining) or current.socket != seen.serving:
        draft.actions.append(Publish(key=seen.key, number=current.number))


def _start(goal: Goal, seen: Observed, around: Around, draft: _Draft, now: float) -> None:
    if finished(goal, seen) or any(goal.matches(g) for g in seen.living):
        return
    ready = goal.preparation
    if not isinstance(ready, Prepared):
        _fetch(goal, seen, draft, now)
        return
    if around.waits_for or (goal.service.pre_deploy and not ready.pre_deployed):
        return
    due = retry_at(failures(goal, seen, around.settings), around.settings, now)
    if now < due:
        draft.wake(due)
        return
    if replaces(goal.service) and seen.living:
        for generation in seen.living:
            if generation.socket == seen.serving:
                _retire(generation, seen, draft, now)
        return
    if len(seen.living) >= GENERATIONS_MAX:
        return
    number = seen.counter + 1
    draft.actions.append(
        Start(
            key=seen.key,
            number=number,
            socket=seen.serving if _reusable(goal, seen) and seen.serving is not None else number,
            release=goal.release,
            restarts=seen.target.restarts if seen.target else goal.restarts,
            service=goal.service,
        )
    )


def _prepare(want: Want, seen: Observed, around: Around, draft: _Draft, now: float) -> None:
    """Bring the wanted release nearer to a start, also while another one runs in its place."""
    goal = Goal(release=want.release, restarts=want.restarts, service=want.service, preparation=around.wanted)
    if marked(goal, seen) or finished(goal, seen) or any(goal.matches(g) for g in seen.living):
        return
    if isinstance(goal.preparation, Prepared):
        if want.service.pre_deploy and not goal.preparation.pre_deployed and not around.waits_for:
            draft.actions.append(PreDeploy(key=seen.key, release=want.release))
    elif not any(isinstance(a, Prepare) and a.release == want.release for a in draft.actions):
        _fetch(goal, seen, draft, now)


def _fetch(goal: Goal, seen: Observed, draft: _Draft, now: float) -> None:
    state = goal.preparation
    if isinstance(state, Missing) and now < state.retry_at:
        draft.wake(state.retry_at)
    elif isinstance(state, Missing):
        draft.actions.append(Prepare(key=seen.key, release=goal.release))


def _retire(generation: Generation, seen: Observed, draft: _Draft, now: float) -> None:
    match generation.stage:
        case Starting():
            draft.actions.append(Terminate(key=seen.key, number=generation.number))
        case Ready() if routed(generation.service):
            if generation.socket == seen.serving:
                draft.actions.append(Unpublish(key=seen.key))
            draft.actions.append(Drain(key=seen.key, number=generation.number))
        case Ready():
            draft.actions.append(Terminate(key=seen.key, number=generation.number))
        case Draining(since=since, quiet=quiet):
            due = since + generation.service.drain_timeout_s
            if quiet or now >= due:
                draft.actions.append(Terminate(key=seen.key, number=generation.number))
            else:
                draft.wake(due)


def _tidy(goal: Goal | None, seen: Observed, draft: _Draft) -> None:
    used = {g.socket for g in seen.living}
    used |= {a.socket for a in draft.actions if isinstance(a, Start)}
    if seen.serving is not None and seen.serving not in used and not (goal and _reusable(goal, seen)):
        draft.actions.append(Unpublish(key=seen.key))
    for socket in seen.sockets:
        if socket != seen.serving and socket not in used:
            draft.actions.append(CloseSocket(key=seen.key, socket=socket))


def _reusable(goal: Goal, seen: Observed) -> bool:
    """Tell whether the route's listener outlived its generation and the same release is to take it over."""
    if goal.service.listen is not Listen.FD or seen.serving not in seen.sockets:
        return False
    if any(g.socket == seen.serving for g in seen.living):
        return False
    last = next((p for p in reversed(seen.past) if p.socket == seen.serving), None)
    return last is not None and last.release == goal.release
