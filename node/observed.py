"""What the agent knows of one instance: its living generations, its past exits, what serves, what was given up.

Pure, frozen data and the folds that take one observation each (a probe answered, a process ended, a new target came).
The agent keeps one Observed an instance and writes the part that must outlive it to disk; supervise.py decides from it.
Never touches a process, a file or a clock: times arrive as arguments, in unix seconds.
"""

from __future__ import annotations

import msgspec

from slum.frozen import Frozen
from slum.model import Key, Listen, Restart, Service

PROBE_FAILURES_MAX = 3
"""So many failed probes in a row make a generation unhealthy; fewer make it degraded."""
PAST_MAX = 32
"""So many past exits are kept an instance; what happened before is only counted."""


class Starting(Frozen):
    """Not yet healthy; startup_timeout counts from *since*: its start, or when a new agent took it over."""

    since: float


class Ready(Frozen):
    """Healthy since *since*; *failures* probes in a row have failed lately."""

    since: float
    failures: int = 0


class Draining(Frozen):
    """No longer routed to; *quiet* once no connection is left."""

    since: float
    ready_since: float
    quiet: bool = False


class Stopping(Frozen):
    """Sent SIGTERM at *since*. *why* is set when it is stopped because it failed, and then counts as a failure."""

    since: float
    ready_since: float | None = None
    why: str = ""
    killed: bool = False


class Ended(Frozen):
    """Its process is gone and its exit is in the past; the keeper still holds its record."""


Stage = Starting | Ready | Draining | Stopping | Ended


class Generation(Frozen):
    """One start. *socket* is the number of the socket it serves on: its own, or the one of a crashed predecessor."""

    number: int
    socket: int
    release: str
    restarts: int
    """The override's restarts when it was started."""
    service: Service
    started_at: float
    stage: Stage
    pid: int | None = None

    @property
    def alive(self) -> bool:
        return not isinstance(self.stage, Ended)


class Past(Frozen):
    """One end of a generation. *asked*: slum stopped it; *why* says for which failure, if for one."""

    at: float
    generation: int
    socket: int
    release: str
    restarts: int
    status: int | None
    oom: bool = False
    ran_s: float = 0.0
    ready_s: float = 0.0
    asked: bool = False
    why: str = ""
    ordinal: int = 1
    """Counts the exits since the target changed, from 1."""


class Mark(Frozen):
    """A release that was given up; holds until another one is desired or a restart is asked for."""

    release: str
    restarts: int
    at: float
    why: str


class Good(Frozen):
    """A release that was healthy here, whole: what a failed replacement falls back to."""

    release: str
    service: Service


class Target(Frozen):
    """What was last asked for; a change of it forgives old failures."""

    release: str
    restarts: int = 0
    stopped: bool = False


class Observed(Frozen):
    """One instance as the agent sees it. Generations are ordered by number, the past oldest first."""

    key: Key
    generations: tuple[Generation, ...] = ()
    serving: int | None = None
    """Number of the socket that the route points to; without a route, of the generation that took over last."""
    sockets: tuple[int, ...] = ()
    """Sockets that exist: held by the keeper or bound by a generation."""
    counter: int = 0
    """The highest generation number ever used."""
    target: Target | None = None
    since: float = 0.0
    """When *target* became what is asked for."""
    past: tuple[Past, ...] = ()
    marks: tuple[Mark, ...] = ()
    good: Good | None = None
    restarts: int = 0
    """Starts since the target changed that followed an end nobody asked for."""

    @property
    def living(self) -> tuple[Generation, ...]:
        return tuple(g for g in self.generations if g.alive)

    def generation(self, number: int) -> Generation | None:
        return next((g for g in self.generations if g.number == number), None)


def routed(service: Service) -> bool:
    return service.listen is not Listen.NONE


def retargeted(seen: Observed, target: Target, now: float) -> Observed:
    """Return *seen* with *target* asked for. Anything new in it (a fallen restart count is not) forgives the past."""
    old = seen.target
    same = old is not None and old.release == target.release and old.stopped == target.stopped
    if same and old is not None and target.restarts <= old.restarts:
        return seen
    return msgspec.structs.replace(seen, target=target, since=now, marks=(), restarts=0)


def rebooted(seen: Observed, restart: Restart | None) -> Observed:
    """Return *seen* after a reboot: nothing runs, failures are forgiven; a job that ended by itself stays ended."""
    ended = tuple(p for p in seen.past if restart is Restart.NEVER and p.status is not None and p.status >= 0)
    return msgspec.structs.replace(seen, generations=(), serving=None, sockets=(), past=ended, marks=())


def started(seen: Observed, generation: Generation) -> Observed:
    """Return *seen* with one generation more, whose number becomes the counter when it is higher. May be repeated."""
    again = generation.number > seen.counter and _last_was_unasked(seen)
    rest = tuple(g for g in seen.generations if g.number != generation.number)
    return msgspec.structs.replace(
        seen,
        generations=tuple(sorted((*rest, generation), key=lambda g: g.number)),
        sockets=tuple(sorted({*seen.sockets, generation.socket})) if routed(generation.service) else seen.sockets,
        counter=max(seen.counter, generation.number),
        restarts=seen.restarts + again,
    )


def staged(seen: Observed, number: int, stage: Stage) -> Observed:
    """Return *seen* with generation *number* in *stage*."""
    changed = tuple(msgspec.structs.replace(g, stage=stage) if g.number == number else g for g in seen.generations)
    return msgspec.structs.replace(seen, generations=changed)


def probed(generation: Generation, ok: bool, now: float) -> Stage:
    """Return the stage of *generation* after one answer of its probe."""
    match generation.stage:
        case Starting() if ok:
            return Ready(since=now)
        case Ready(since=since):
            return Ready(since=since, failures=0 if ok else generation.stage.failures + 1)
        case stage:
            return stage


def proven(seen: Observed, generation: Generation) -> Observed:
    """Return *seen* with the release of *generation* as the last healthy one."""
    return msgspec.structs.replace(seen, good=Good(release=generation.release, service=generation.service))


def ended(seen: Observed, number: int, status: int | None, at: float, *, oom: bool = False, why: str = "") -> Observed:
    """Return *seen* after the end of generation *number*; a second time for the same one changes nothing.

    *why* tells what kept it from starting at all, which is a failure.
    """
    generation = seen.generation(number)
    if generation is None or not generation.alive:
        return seen
    stage = generation.stage
    ready_since = None if isinstance(stage, Starting | Ended) else _ready_since(stage)
    past = Past(
        at=at,
        generation=number,
        socket=generation.socket,
        release=generation.release,
        restarts=generation.restarts,
        status=status,
        oom=oom,
        ran_s=max(0.0, at - generation.started_at),
        ready_s=0.0 if ready_since is None else max(0.0, at - ready_since),
        asked=isinstance(stage, Stopping),
        why=why or (stage.why if isinstance(stage, Stopping) else ""),
        ordinal=seen.past[-1].ordinal + 1 if seen.past and seen.past[-1].at >= seen.since else 1,
    )
    seen = staged(seen, number, Ended())
    if any(p.generation == number for p in seen.past):
        return seen
    return msgspec.structs.replace(seen, past=(*seen.past, past)[-PAST_MAX:])


def reaped(seen: Observed, number: int) -> Observed:
    return msgspec.structs.replace(seen, generations=tuple(g for g in seen.generations if g.number != number))


def published(seen: Observed, number: int) -> Observed:
    """Return *seen* with the route at generation *number*; one that was draining is healthy again."""
    generation = seen.generation(number)
    if generation is None:
        return seen
    if isinstance(generation.stage, Draining):
        seen = staged(seen, number, Ready(since=generation.stage.ready_since))
    return msgspec.structs.replace(seen, serving=generation.socket)


def unpublished(seen: Observed) -> Observed:
    return msgspec.structs.replace(seen, serving=None)


def socket_closed(seen: Observed, socket: int) -> Observed:
    return msgspec.structs.replace(seen, sockets=tuple(s for s in seen.sockets if s != socket))


def given_up(seen: Observed, mark: Mark) -> Observed:
    rest = tuple(m for m in seen.marks if m.release != mark.release)
    return msgspec.structs.replace(seen, marks=(*rest, mark))


def _last_was_unasked(seen: Observed) -> bool:
    """Return whether the youngest generation that ended under this target did so by itself, or failed."""
    last = max((p for p in seen.past if p.at >= seen.since), key=lambda p: p.generation, default=None)
    return last is not None and (not last.asked or last.why != "")


def _ready_since(stage: Ready | Draining | Stopping) -> float | None:
    return stage.since if isinstance(stage, Ready) else stage.ready_since
