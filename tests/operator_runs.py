"""Seeded runs of a cloud operator against a lying provider, with a control plane that is killed at random moments.

The ledger's state machine, the pure decision and the operator are the real ones; the clock is simulated, and a small loop
stands for slum.server.reconcile: observe, decide, and for each action commit the intent, call, commit the outcome. A kill
ends that process between any two looks at the clock (before and after each request); a pause holds a call back while the
next leader works, then lets it go. Wishes change meanwhile, and machines are deleted by hand.

    python tests/operator_runs.py --runs 500          # both operators; any seed that fails is printed
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fakes.cloud import Cloud, Killed, Liar, SimClock, a_liar
from fakes.fly import FakeFly
from fakes.hetzner import FakeHetzner
from ledger_support import Scribe, new_state

from slum import model
from slum.errors import SlumError
from slum.ledger.commands import Done, Intent, Outcome
from slum.ledger.reader import Reader
from slum.operators import naming
from slum.operators.account import Clock
from slum.operators.base import Join, Machine, MachineSpec
from slum.operators.fly import Fly
from slum.operators.hetzner import Hetzner
from slum.server.decide import Action, Create, Destroy, Known, Recognise, Situation, Wanted, decide, key_of

CLUSTER = "c0ffee00-1111-4222-8333-944445555666"
NEIGHBOUR = "deadbeef-1111-4222-8333-944445555666"
ROUNDS_MAX = 400
ROUND_S = 30.0
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)
CALLS_A_LOOK = 10
CALLS_AN_ATTEMPT = 60
JOIN = Join(server="https://home.example", token="join-canary-7f3a")


@dataclass
class Kind:
    fake: Callable[[Liar, Clock], FakeHetzner | FakeFly]
    operator: Callable[[str, Cloud, Clock], Hetzner | Fly]


def _hetzner(url: str, fake: Cloud, clock: Clock) -> Hetzner:
    definition = model.HetznerOperator(name="eu", location="fsn1", server_type="cx23")
    return Hetzner(definition, clock=clock, env={"HCLOUD_TOKEN": fake.token, "HCLOUD_ENDPOINT": f"{url}/v1"})


def _fly(url: str, fake: Cloud, clock: Clock) -> Fly:
    definition = model.FlyOperator(name="eu", org="mine", region="iad", image="registry.fly.io/slum:1")
    return Fly(definition, clock=clock, env={"FLY_API_TOKEN": fake.token, "FLY_FLAPS_BASE_URL": url})


KINDS = {
    "hetzner": Kind(lambda liar, clock: FakeHetzner(liar=liar, clock=clock), _hetzner),
    "fly": Kind(lambda liar, clock: FakeFly(liar=liar, clock=clock), _fly),
}


@dataclass
class Report:
    seed: int
    rounds: int = 0
    lives: int = 1
    looks: int = 0
    attempts: int = 0
    calls: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class Held:
    """A call whose intent is committed and which its process has not made yet: it was stopped there."""

    action: Create | Destroy
    intent: Intent
    until: float


class Plane:
    """One control plane after another, on one ledger. *wanted* is what its user wishes at the moment."""

    def __init__(
        self,
        kind: str,
        clock: SimClock,
        scribe: Scribe,
        reader: Reader,
        operator: Hetzner | Fly,
        random: Random,
    ) -> None:
        self.kind = kind
        self.clock, self.scribe, self.reader, self.operator, self.random = clock, scribe, reader, operator, random
        self.wanted: set[str] = set()
        self.holds = 0.04
        self.held: list[Held] = []
        self.tries: dict[str, tuple[int, float]] = {}
        self.look_again = 0.0
        self.count = 0
        self.attempts = 0
        self.looks = 0

    def begin(self) -> None:
        """A new process leads; of the last one only the ledger is left."""
        self.count += 1
        self.tries, self.look_again = {}, 0.0
        self.scribe.at = 1_800_000_000.0 + self.clock.at
        self.scribe.lead(run=f"r{self.count}")

    async def round(self) -> tuple[Action, ...] | None:
        """Observe, decide, act, one action after the other; None when the operator did not answer."""
        began = self.clock.at
        if began < self.look_again:
            return None
        self.looks += 1
        self.clock.deadline = began + self.operator.deadlines.observe_s
        try:
            machines = await self.operator.observe(CLUSTER)
        except (SlumError, TimeoutError) as error:
            self.look_again = self.clock.at + (getattr(error, "retry_after_s", None) or BACKOFF_S[2])
            return None
        finally:
            self.clock.deadline = None
        actions = decide(self.situation(machines, began))
        for action in actions:
            await self.perform(action)
        return actions

    def situation(self, machines: tuple[Machine, ...], began: float) -> Situation:
        rows: dict[str, Known] = {}
        for row in self.reader.machines():
            if row.machine not in rows or rows[row.machine].incarnation < row.incarnation:
                rows[row.machine] = Known(
                    machine=row.machine,
                    tenement=row.tenement,
                    operator=row.operator,
                    incarnation=row.incarnation,
                    state=row.state,
                    machine_id=row.machine_id,
                    action=row.action,
                    arrives_until=row.arrives_until,
                )
        return Situation(
            wanted=tuple(Wanted(machine=name, tenement=name, operator="eu") for name in sorted(self.wanted)),
            known=tuple(rows.values()),
            observed={"eu": machines},
            settled_at={"eu": 1_800_000_000.0 + began - self.operator.deadlines.settle_s},
            drained=frozenset(rows),
            resting=frozenset(name for name, (_, at) in self.tries.items() if at > self.clock.at),
        )

    async def perform(self, action: Action) -> None:
        if isinstance(action, Recognise):
            self.commit(Outcome(action=action.action, ok=True, machine_id=action.machine_id))
            return
        deadlines = self.operator.deadlines
        is_create = isinstance(action, Create)
        intent = Intent(
            action=f"{self.random.getrandbits(64):016x}",
            kind="create" if is_create else "destroy",
            machine=action.machine,
            tenement=action.tenement,
            operator=action.operator,
            incarnation=action.incarnation,
            deadline_at=self.clock.wall() + (deadlines.create_s if is_create else deadlines.destroy_s),
            machine_id=self.operator.machine_id(self.spec(action)),
        )
        if not self.commit(intent):
            self.later(action.machine, None)
            return
        if self.random.random() < self.holds:
            self.held.append(Held(action, intent, self.clock.at + self.random.uniform(0, 500)))
            raise Killed
        await self.call(action, intent)

    async def call(self, action: Create | Destroy, intent: Intent, *, commits: bool = True) -> None:
        left = intent.deadline_at - self.clock.wall()
        if left <= 0:
            return
        self.attempts += 1
        self.clock.deadline = self.clock.at + left
        try:
            if isinstance(action, Create):
                made = (await self.operator.create(self.spec(action))).id
            else:
                made = intent.machine_id
                await self.operator.destroy(made)
        except (SlumError, TimeoutError) as error:
            self.later(action.machine, getattr(error, "retry_after_s", None))
            return
        finally:
            self.clock.deadline = None
        if commits:
            self.clock.now()
            self.commit(Outcome(action=intent.action, ok=True, machine_id=made))
            self.tries.pop(action.machine, None)

    def later(self, machine: str, retry_after_s: float | None) -> None:
        count = self.tries.get(machine, (0, 0.0))[0]
        pause = max(BACKOFF_S[min(count, len(BACKOFF_S) - 1)], retry_after_s or 0.0)
        self.tries[machine] = (count + 1, self.clock.at + pause)

    def is_settled(self) -> bool:
        """Tell whether the ledger knows every machine as created or destroyed, as it is wished."""
        newest = {row.machine: row.state for row in self.reader.machines()}  # rows come by incarnation
        return self.wanted <= newest.keys() and all(
            state == ("created" if name in self.wanted else "destroyed") for name, state in newest.items()
        )

    async def wake(self) -> None:
        """Let stopped processes of earlier leaders go on; they can commit nothing any more."""
        for held in [held for held in self.held if held.until <= self.clock.at]:
            self.held.remove(held)
            tries = dict(self.tries)
            await self.call(held.action, held.intent, commits=False)
            self.tries = tries

    def spec(self, action: Create | Destroy) -> MachineSpec:
        key = key_of(action.machine, action.incarnation)
        return MachineSpec(cluster=CLUSTER, key=key, machine=action.machine, tenement=action.tenement, join=JOIN)

    def commit(self, command: Intent | Outcome) -> bool:
        self.scribe.at = 1_800_000_000.0 + self.clock.at
        return isinstance(self.scribe.one(command), Done)


@contextmanager
def a_plane(
    kind: str, folder: Path, liar: Liar | None = None, seed: int = 0
) -> Iterator[tuple[Plane, FakeHetzner | FakeFly, SimClock]]:
    """Yield a control plane that leads, its provider and the time, all of them new."""
    clock = SimClock()
    fake = KINDS[kind].fake(liar or Liar(), clock)
    home = folder / f"{kind}-{seed}"
    home.mkdir()
    with ExitStack() as stack:
        state = new_state(home / "state.db")
        (home / "CURRENT").write_text("state.db\n")
        stack.callback(state.close)
        reader = Reader(home)
        stack.callback(reader.close)
        url = stack.enter_context(fake.serving())
        operator = KINDS[kind].operator(url, fake, clock)
        plane = Plane(kind, clock, Scribe(state), reader, operator, Random(f"{kind}/{seed}"))
        plane.begin()
        yield plane, fake, clock


async def run(kind: str, seed: int, folder: Path) -> Report:
    """Live through one seed and report what is wrong at its end, if anything."""
    report = Report(seed)
    theirs = {naming.KEY: "w-1.1", naming.CLUSTER: NEIGHBOUR, naming.MACHINE: "w-1", naming.TENEMENT: "w"}
    neighbours = (naming.name_of(NEIGHBOUR, "w-1.1"), "web-1")
    with a_plane(kind, folder, a_liar(seed), seed) as (plane, fake, _):
        fake.add_server(neighbours[0], theirs)
        fake.add_server(neighbours[1], {})
        await _live(plane, fake, plane.random, report)
        report.looks, report.attempts, report.lives = plane.looks, plane.attempts, plane.count
        _judge(plane, fake, set(neighbours), report)
        if not report.problems:
            await _stays(plane, fake, report)
        report.calls = len(fake.calls)
    return report


async def _live(plane: Plane, fake: FakeHetzner | FakeFly, random: Random, report: Report) -> None:
    """Go on until the last wish is fulfilled and nothing is under way, or for ROUNDS_MAX rounds."""
    names = [f"w-{n}" for n in range(1, random.randint(2, 5))]
    wishes = [set(random.sample(names, random.randint(0, len(names)))) for _ in range(random.randint(2, 5))]
    next_wish, quiet = 0.0, 0
    while report.rounds < ROUNDS_MAX and quiet < 3:
        report.rounds += 1
        clock = plane.clock
        if wishes and clock.at >= next_wish:
            plane.wanted = wishes.pop(0)
            next_wish = clock.at + random.choice((0.0, 5.0, 30.0, 90.0, 700.0))
        if wishes and random.random() < 0.1:
            alive = sorted(
                name for name in fake.alive() if name.startswith(naming.prefix_of(CLUSTER)) and "#" not in name
            )
            if alive:
                fake.remove_server(random.choice(alive))
        clock.fuse = random.randint(1, 40) if random.random() < 0.3 and (wishes or random.random() < 0.3) else None
        actions: tuple[Action, ...] | None = None
        try:
            await plane.wake()
            actions = await plane.round()
        except BaseException as error:
            if not _is_kill(error):
                raise
            fake.forget_caller()
            clock.fuse, clock.deadline = None, None
            plane.operator = KINDS[plane.kind].operator(fake.url, fake, clock)
            _forget_budgets(clock)
            plane.begin()
        clock.fuse = None
        if actions is not None:
            is_quiet = not actions and not wishes and not plane.held and plane.is_settled()
            quiet = quiet + 1 if is_quiet else 0
        clock.at += random.uniform(0.5, ROUND_S)
    fake.settle()


def _is_kill(error: BaseException) -> bool:
    """Tell whether the process was killed, perhaps in several of its tasks at once."""
    return isinstance(error, Killed) or (isinstance(error, BaseExceptionGroup) and error.split(Killed)[1] is None)


def _forget_budgets(clock: Clock) -> None:
    """A new process knows nothing of what the last one was told about limits."""
    from slum.operators import account

    account._BUDGETS.pop(clock, None)


def _judge(plane: Plane, fake: FakeHetzner | FakeFly, neighbours: set[str], report: Report) -> None:
    newest: dict[str, int] = {}
    for row in plane.reader.machines():
        newest[row.machine] = max(newest.get(row.machine, 0), row.incarnation)
    should = {naming.name_of(CLUSTER, key_of(name, newest.get(name, 1))) for name in plane.wanted} | neighbours
    there = set(fake.alive())
    tell = report.problems.append
    if report.rounds >= ROUNDS_MAX:
        tell("not converged")
    for name in sorted(there - should):
        tell(f"orphan or double: {name}")
    for name in sorted(should - there):
        tell(f"missing: {name}")
    for left in fake.leftovers():
        tell(f"left over: {left}")
    if fake.impatient:
        tell(f"{fake.impatient} calls while asked to stay away")
    budget = CALLS_A_LOOK * plane.looks + CALLS_AN_ATTEMPT * plane.attempts
    if len(fake.calls) > budget:
        tell(f"{len(fake.calls)} calls, more than {budget}")


async def _stays(plane: Plane, fake: Cloud, report: Report) -> None:
    """Once converged, looking again changes nothing."""
    fake.liar = Liar(seed=report.seed)
    plane.holds, before = 0.0, fake.mutations()
    for _ in range(3):
        plane.clock.at += 2 * ROUND_S + 60
        if await plane.round() not in ((), None):
            report.problems.append("it goes on acting")
    if fake.mutations() != before:
        report.problems.append("it goes on changing things")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--operator", choices=sorted(KINDS), action="append")
    given = parser.parse_args(argv)
    failed = 0
    for kind in given.operator or sorted(KINDS):
        began, totals = time.monotonic(), Report(0)
        with tempfile.TemporaryDirectory(prefix="slum-runs-") as folder:
            for seed in range(given.first, given.first + given.runs):
                report = asyncio.run(run(kind, seed, Path(folder)))
                failed += bool(report.problems)
                for name in ("rounds", "lives", "looks", "attempts", "calls"):
                    setattr(totals, name, getattr(totals, name) + getattr(report, name))
                for problem in report.problems:
                    print(f"{kind} seed {seed}: {problem}", flush=True)
        print(
            f"{kind}: {given.runs} runs, {totals.lives} processes, {totals.attempts} calls of create and destroy, "
            f"{totals.calls} requests, {time.monotonic() - began:.0f} s"
        )
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
