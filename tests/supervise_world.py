"""A small simulated machine for supervise.py: processes that get healthy, crash, hang or ignore SIGTERM, and a clock.

It performs actions the way the agent does and checks on each one what must never happen. Single instances and several.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from slum.model import Key, Service, Settings
from slum.node import observed as seen_of
from slum.node.actions import (
    Action,
    Broken,
    CloseSocket,
    Drain,
    Forget,
    GiveUp,
    Kill,
    Missing,
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
from slum.node.observed import Draining, Ended, Generation, Observed, Ready, Starting, Stopping
from slum.node.supervise import plan

SETTINGS = Settings(max_restarts=3, backoff_base_ms=100, backoff_max_ms=2_000, restart_window_s=20.0)


@dataclass(frozen=True)
class Nature:
    """How the processes of one release behave. None: never."""

    healthy_after: float | None = 0.2
    exits_after: float | None = None
    status: int = 1
    stops_after: float | None = 0.1
    quiet_after: float = 0.3
    builds: bool = True
    sick_after: float | None = None


@dataclass
class Process:
    generation: Generation
    nature: Nature
    term_at: float | None = None
    drain_at: float | None = None


@dataclass
class World:
    wants: dict[Key, Want] = field(default_factory=dict)
    natures: dict[str, Nature] = field(default_factory=dict)
    settings: Settings = SETTINGS
    now: float = 1_000.0
    observed: dict[Key, Observed] = field(default_factory=dict)
    preparations: dict[str, Preparation] = field(default_factory=dict)
    processes: dict[tuple[Key, int], Process] = field(default_factory=dict)
    numbers: set[tuple[Key, int]] = field(default_factory=set)
    done: list[Action] = field(default_factory=list)

    # --- what the outside does ----------------------------------------------------------------------------------------
    def want(self, service: Service, release: str, *, stopped: bool = False, restarts: int = 0) -> None:
        for name in service.instances:
            key = Key(tenement="t", service=service.name, id=name)
            want = Want(key=key, release=release, service=service, stopped=stopped, restarts=restarts)
            self.wants[key] = want
            seen = self.observed.get(key) or Observed(key=key)
            self.observed[key] = seen_of.retargeted(seen, want.target, self.now)
            self.preparations.setdefault(release, Missing())
            if self.observed[key] is not seen and isinstance(self.preparations[release], Broken):
                self.preparations[release] = Missing()

    def remove(self, service: str) -> None:
        for key in [key for key in self.wants if key.service == service]:
            del self.wants[key]

    def crash(self, key: Key) -> None:
        """The newest living process of *key* dies by a signal."""
        alive = sorted(number for k, number in self.processes if k == key)
        if alive:
            self._end(key, alive[-1], -9)

    # --- time ---------------------------------------------------------------------------------------------------------
    def run(self, seconds: float) -> None:
        """Let *seconds* pass, deciding at every change and every wake-up."""
        end = self.now + seconds
        while True:
            wake_at = self.settle()
            moments = [m for m in (wake_at, self._next_change()) if m is not None and m > self.now]
            self.now = min([*moments, end])
            self._change()
            if self.now >= end:
                self.settle()
                return

    def settle(self) -> float | None:
        """Decide and perform until nothing is left to do now; return when to ask again."""
        for _ in range(60):
            decision = plan(self.wants, self.observed, self.preparations, self.settings, self.now)
            if not decision.actions:
                return min(decision.wakes.values(), default=None)
            for action in decision.actions:
                self._perform(action)
                self._check(action.key)
        raise AssertionError(f"never settles: {decision.actions}")

    # --- the machine --------------------------------------------------------------------------------------------------
    def _perform(self, action: Action) -> None:
        self.done.append(action)
        key = action.key
        seen = self.observed.get(key) or Observed(key=key)
        match action:
            case Prepare(release=release):
                built = self._nature(release).builds
                self.preparations[release] = Prepared(pre_deployed=False) if built else Broken(why="build: exit 1")
            case PreDeploy(release=release):
                self.preparations[release] = Prepared(pre_deployed=True)
            case Start():
                self._start(action, seen)
                return
            case Publish(number=number):
                generation = seen.generation(number)
                assert generation is not None
                assert isinstance(generation.stage, Ready | Draining), "only a healthy generation is published"
                seen = seen_of.published(seen, number)
            case Unpublish():
                seen = seen_of.unpublished(seen)
            case Drain(number=number):
                generation = seen.generation(number)
                assert generation is not None
                assert isinstance(generation.stage, Ready)
                self.processes[key, number].drain_at = self.now
                seen = seen_of.staged(seen, number, Draining(since=self.now, ready_since=generation.stage.since))
            case Terminate(number=number, why=why):
                assert (key, number) in self.processes, "signals only what was started and lives"
                process = self.processes[key, number]
                assert process.term_at is None, "SIGTERM once"
                process.term_at = self.now
                seen = seen_of.staged(seen, number, Stopping(since=self.now, why=why))
            case Kill(number=number):
                assert (key, number) in self.processes
                self.observed[key] = seen_of.staged(
                    seen,
                    number,
                    Stopping(since=self.now, why=seen.generation(number).stage.why, killed=True),  # type: ignore[union-attr]
                )
                self._end(key, number, -9)
                return
            case Reap(number=number):
                assert (key, number) not in self.processes
                seen = seen_of.reaped(seen, number)
            case CloseSocket(socket=socket):
                assert socket != seen.serving
                assert all(g.socket != socket for g in seen.living)
                seen = seen_of.socket_closed(seen, socket)
            case GiveUp(mark=mark):
                seen = seen_of.given_up(seen, mark)
            case Forget():
                assert not any(k == key for k, _ in self.processes)
                del self.observed[key]
                self.numbers = {(k, n) for k, n in self.numbers if k != key}
                return
        self.observed[key] = seen

    def _start(self, action: Start, seen: Observed) -> None:
        alike = [
            p
            for (key, _), p in self.processes.items()
            if key == action.key and p.generation.release == action.release and p.generation.restarts == action.restarts
        ]
        assert not alike, "a second start of what already lives"
        assert (action.key, action.number) not in self.numbers, "a generation number is used once"
        used = [g.socket for g in seen.living]
        assert action.socket not in used, "a socket belongs to one living generation"
        for name in action.service.depends_on:
            states = [s for k, s in self.observed.items() if k.service == name]
            assert any(isinstance(g.stage, Ready) for s in states for g in s.living), f"{name} is not healthy"
        self.numbers.add((action.key, action.number))
        generation = Generation(
            number=action.number,
            socket=action.socket,
            release=action.release,
            restarts=action.restarts,
            service=action.service,
            started_at=self.now,
            stage=Starting(since=self.now),
        )
        self.processes[action.key, action.number] = Process(generation, self._nature(action.release))
        self.observed[action.key] = seen_of.started(seen, generation)

    def _check(self, key: Key) -> None:
        seen = self.observed.get(key)
        if seen is None:
            return
        serving = [g for g in seen.living if g.socket == seen.serving]
        assert len(serving) <= 1, "two generations serve"
        living = {g.number for g in seen.living}
        assert living == {number for k, number in self.processes if k == key}

    def _next_change(self) -> float | None:
        moments = [m for process in self.processes.values() for m in self._moments(process) if m > self.now]
        return min(moments, default=None)

    def _moments(self, process: Process) -> list[float]:
        nature, start = process.nature, process.generation.started_at
        found = [start + nature.healthy_after] if nature.healthy_after is not None else []
        found += [start + nature.exits_after] if nature.exits_after is not None else []
        found += [start + nature.sick_after] if nature.sick_after is not None else []
        if process.term_at is not None and nature.stops_after is not None:
            found.append(process.term_at + nature.stops_after)
        if process.drain_at is not None:
            found.append(process.drain_at + nature.quiet_after)
        return found

    def _change(self) -> None:
        for (key, number), process in list(self.processes.items()):
            nature, start, seen = process.nature, process.generation.started_at, self.observed[key]
            generation = seen.generation(number)
            assert generation is not None
            if nature.exits_after is not None and self.now >= start + nature.exits_after:
                self._end(key, number, nature.status)
            elif (
                process.term_at is not None
                and nature.stops_after is not None
                and self.now >= process.term_at + nature.stops_after
            ):
                self._end(key, number, 0)
            elif isinstance(generation.stage, Draining) and process.drain_at is not None:
                if self.now >= process.drain_at + nature.quiet_after:
                    stage = msgspec.structs.replace(generation.stage, quiet=True)
                    self.observed[key] = seen_of.staged(seen, number, stage)
            elif nature.healthy_after is not None and self.now >= start + nature.healthy_after:
                sick = nature.sick_after is not None and self.now >= start + nature.sick_after
                for _ in range(3 if sick else 1):
                    seen = seen_of.staged(seen, number, seen_of.probed(seen.generation(number), not sick, self.now))  # type: ignore[arg-type]
                if isinstance(generation.stage, Starting) and not sick:
                    seen = seen_of.proven(seen, generation)
                self.observed[key] = seen

    def _end(self, key: Key, number: int, status: int) -> None:
        del self.processes[key, number]
        seen = seen_of.ended(self.observed[key], number, status, self.now)
        assert isinstance(seen.generation(number).stage, Ended)  # type: ignore[union-attr]
        self.observed[key] = seen

    def _nature(self, release: str) -> Nature:
        return self.natures.get(release, Nature())

    # --- questions ----------------------------------------------------------------------------------------------------
    def serving(self, key: Key) -> Generation | None:
        seen = self.observed.get(key)
        return next((g for g in seen.living if g.socket == seen.serving), None) if seen else None

    def living(self, key: Key) -> list[str]:
        seen = self.observed.get(key)
        return [g.release for g in seen.living] if seen else []
