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

from collections.abc import Iterable, Mapping

from slum.frozen import Frozen
from slum.model import Deploy, Key, Listen, Restart, Service, Settings, release_of
from slum.node.observed import (
    PROBE_FAILURES_MAX,
    Draining,
    Generation,
    Mark,
    Observed,
    Past,
    Ready,
    Starting,
    Stopping,
    Target,
    routed,
)
from slum.wire import Desired

GENERATIONS_MAX = 4
"""So many generations of one instance may live at once; a further overlap waits for one to finish draining."""


class Want(Frozen):
    """One desired instance."""

    key: Key
    release: str
    service: Service
    restarts: int = 0
    stopped: bool = False

    @property
    def target(self) -> Target:
        return Target(release=self.release, restarts=self.restarts, stopped=self.stopped)


# --- how far a release is from being startable ------------------------------------------------------------------------


class Missing(Frozen):
    """Its bundle is not here, or it is not built. *why* tells of the last attempt; the next one is at *retry_at*."""

    retry_at: float = 0.0
    why: str = ""


class Working(Frozen):
    """*what* is under way: "fetching", "building", "pre_deploy"."""

    what: str


class Prepared(Frozen):
    """Startable, but for its pre_deploy while *pre_deployed* is false."""

    pre_deployed: bool = True


class Broken(Frozen):
    """Its build or pre_deploy failed when *restarts* had been asked for."""

    why: str
    restarts: int = 0


Preparation = Missing | Working | Prepared | Broken
PREPARED = Prepared()


class Around(Frozen):
    """What else bears on one instance."""

    settings: Settings
    wanted: Preparation = PREPARED
    fallback: Preparation = PREPARED
    """Of the last healthy release, where it is another one."""
    waits_for: str = ""
    """The dependency that is not healthy yet."""
    dependents_live: bool = False
    """A removed service that depends on this one still runs."""


# --- actions ----------------------------------------------------------------------------------------------------------


class Prepare(Frozen):
    """Fetch and build *release*."""

    key: Key
    release: str


class PreDeploy(Frozen):
    key: Key
    release: str


class Start(Frozen):
    """Start generation *number* on socket *socket* (its own number, or that of a crashed generation's listener)."""

    key: Key
    number: int
    socket: int
    release: str
    restarts: int
    service: Service


class Publish(Frozen):
    """Point the route at generation *number*."""

    key: Key
    number: int


class Unpublish(Frozen):
    key: Key


class Drain(Frozen):
    key: Key
    number: int


class Terminate(Frozen):
    """Send SIGTERM. *why* is empty unless it is stopped for failing."""

    key: Key
    number: int
    why: str = ""


class Kill(Frozen):
    key: Key
    number: int


class Reap(Frozen):
    """Forget the record of a generation that has ended."""

    key: Key
    number: int


class CloseSocket(Frozen):
    key: Key
    socket: int


class GiveUp(Frozen):
    key: Key
    mark: Mark


class Forget(Frozen):
    """Nothing is left of a removed instance but its data and logs."""

    key: Key


Action = (
    Prepare | PreDeploy | Start | Publish | Unpublish | Drain | Terminate | Kill | Reap | CloseSocket | GiveUp | Forget
)


class Decision(Frozen):
    actions: tuple[Action, ...] = ()
    wake_at: float | None = None
    """Ask again then, if nothing was observed before."""


class Goal(Frozen):
    """The release that an instance is to run now: the wanted one, or the last healthy one in its place."""

    release: str
    restarts: int
    service: Service
    preparation: Preparation

    def matches(self, generation: Generation | Past | Mark) -> bool:
        return generation.release == self.release and generation.restarts >= self.restarts


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
) -> Decision:
    """Return what to do for *keys* (all when None), ordered by key, and when to ask again."""
    ids: dict[str, list[Key]] = {}
    for key in wants:
        ids.setdefault(key.service, []).append(key)
    live_removed = {
        name
        for key, seen in observed.items()
        if key not in wants
        for generation in seen.living
        for name in generation.service.depends_on
    }
    actions: list[Action] = []
    wake_at: float | None = None
    for key in sorted(set(keys) if keys is not None else {*wants, *observed}):
        want, seen = wants.get(key), observed.get(key) or Observed(key=key)
        good = seen.good.release if seen.good else ""
        around = Around(
            settings=settings,
            wanted=preparations.get(want.release, PREPARED) if want else PREPARED,
            fallback=preparations.get(good, PREPARED),
            waits_for=waits_for(want, wants, observed, ids) if want else "",
            dependents_live=want is None and key.service in live_removed,
        )
        decision = decide(want, seen, around, now)
        actions += decision.actions
        wake_at = _sooner(wake_at, decision.wake_at)
    return Decision(actions=tuple(actions), wake_at=wake_at)


def waits_for(
    want: Want, wants: Mapping[Key, Want], observed: Mapping[Key, Observed], ids: Mapping[str, list[Key]]
) -> str:
    """Return the first dependency of *want* with no healthy instance, or with one that may still become healthy."""
    for name in want.service.depends_on:
        states = [_standing(wants[key], observed.get(key)) for key in ids.get(name, ())]
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
        self.wake_at = _sooner(self.wake_at, at)


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


def failures(goal: Goal, seen: Observed, settings: Settings) -> tuple[Past, ...]:
    """Return the failures of *goal*'s release that count: newest first, within restart_window of healthy time."""
    found: list[Past] = []
    healthy_s = 0.0
    for past in reversed(seen.past):
        if past.at < seen.since or healthy_s > settings.restart_window_s:
            break
        if goal.matches(past) and _failed(past, goal.service.restart):
            found.append(past)
            healthy_s += past.ready_s
    return tuple(found)


def retry_at(failed: tuple[Past, ...], settings: Settings, now: float) -> float:
    """Return when the next start is due after *failed* (newest first): the last end plus base * 2^(n-1), capped."""
    if not failed:
        return now
    exponent = min(len(failed) - 1, 30)
    delay_ms = min(settings.backoff_base_ms * 2**exponent, settings.backoff_max_ms)
    return min(failed[0].at, now) + delay_ms / 1000


def finished(goal: Goal, seen: Observed) -> Past | None:
    """Return the newest exit after which *goal* is not to be started again by its restart policy."""
    policy = goal.service.restart
    for past in reversed(seen.past):
        if past.at < seen.since:
            return None
        if goal.matches(past) and (not past.asked or past.why):
            done = policy is Restart.NEVER or (policy is Restart.ON_FAILURE and not past.why and past.status == 0)
            return past if done else None
    return None


def marked(goal: Goal, seen: Observed) -> Mark | None:
    return next((m for m in seen.marks if goal.matches(m)), None)


def replaces(service: Service) -> bool:
    """Tell whether a deploy has to stop the old generation first: it says so, or two could not share the address."""
    fixed = service.listen is Listen.PORT or service.socket is not None
    return fixed or service.deploy is Deploy.REPLACE


def _failed(past: Past, policy: Restart) -> bool:
    if past.why:
        return policy is not Restart.NEVER
    if past.asked or policy is Restart.NEVER:
        return False
    return policy is Restart.ALWAYS or past.status != 0


def _verdict(want: Want | None, goal: Goal | None, seen: Observed, around: Around, now: float) -> Mark | None:
    if want is None or want.stopped:
        return None
    wanted = Goal(release=want.release, restarts=want.restarts, service=want.service, preparation=around.wanted)
    for aim in (wanted, goal):
        if aim is None or marked(aim, seen):
            continue
        broken = aim.preparation
        lives = any(aim.matches(g) for g in seen.living)
        if isinstance(broken, Broken) and broken.restarts >= aim.restarts and not lives:
            return Mark(release=aim.release, restarts=aim.restarts, at=now, why=broken.why)
        failed = failures(aim, seen, around.settings)
        if len(failed) > around.settings.max_restarts and not lives:
            return Mark(release=aim.release, restarts=aim.restarts, at=now, why=summary(failed))
    return None


def summary(failed: tuple[Past, ...]) -> str:
    """Return "exit 2, 3 times in 2.1 s" for failures given newest first."""
    if len(failed) == 1:
        return f"{cause(failed[0])} after {failed[0].ran_s:.1f} s"
    span_s = failed[0].at - failed[-1].at + failed[-1].ran_s
    return f"{cause(failed[0])}, {len(failed)} times in {span_s:.1f} s"


def cause(past: Past) -> str:
    if past.why:
        return past.why
    if past.oom:
        return "out of memory"
    if past.status is None:
        return "ended unseen"
    return f"exit {past.status}" if past.status >= 0 else f"signal {-past.status}"


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
    elif isinstance(state, Missing) or (isinstance(state, Broken) and state.restarts < goal.restarts):
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


def _sooner(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)
