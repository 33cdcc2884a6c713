"""The reconcile loop, on the leader: observe the operators, decide, and for each action commit, act, commit.

It wakes when the ledger moves, an agent reports, an action ends, or half a minute has passed. decide.py decides; here is
only what touches the world. Each operator is observed and called in tasks of its own: a dead one holds up nobody, its
error is kept as the trouble of its machines. After a crash the next leader starts from the open intents.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from slum import log, model
from slum.errors import ConfigError, OperatorError, QuorumLost, SlumError
from slum.ledger.commands import AnyCommand, Intent, LeaderInfo, NoteEvent, Outcome, Record, Rejected, new_request_id
from slum.operators.base import Foretold, Held, MachineSpec, Operator
from slum.operators.registry import make_operator
from slum.operators.ssh_hosts import FreeHosts
from slum.server.agents import ELSEWHERE
from slum.server.boot import operator_site
from slum.server.control import Control, Sight
from slum.server.decide import Action, Create, Destroy, Known, Recognise, Situation, Wanted, decide, key_of
from slum.server.hostkeys import LedgerKeys
from slum.server.joins import Joins
from slum.server.localmember import LocalOfMember, member_of
from slum.server.vanished import GRACE_S, vanished
from slum.server.view import World

TIMER_S = 30.0
CALM_S, REST = 0.02, 4.0
"""How long it looks away after a change, in seconds; in a large fleet in times of what looking takes (of the CPU)."""
OBSERVED_S = 30.0
"""How long an observation may be used; after an action on that operator it is made anew."""
DRAIN_S = 120.0
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 15.0, 60.0)


class Reconciler:
    def __init__(self, control: Control) -> None:
        self._control = control
        self._joins = Joins(control)
        self._keys = LedgerKeys(control)
        self._free = FreeHosts()
        self._sights = control.sights
        self._looking: set[str] = set()
        self._acts: Counter[str] = Counter()
        """Actions ended, by operator: an observation that one of them overtook is not used."""
        self._busy: set[str] = set()
        self._failures: dict[str, tuple[int, float]] = {}
        """By machine: how often it failed in a row, and when (monotonic) it may be tried again."""
        self._leaving: dict[str, float] = {}
        """By machine: since when (monotonic) it is to be drained."""
        self._leads_since: tuple[tuple[int, int, int], float] | None = None
        """The (generation, epoch, term) of our lead, and since when (monotonic)."""
        self._vanished: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Reconcile until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                seen, took_s = self._control.changed.count, 0.0
                try:
                    leader = await self._control.link.leader()
                    if leader.is_self:
                        began = time.thread_time()
                        actions = self._decide(leader, group)
                        took_s = time.thread_time() - began
                        for action in actions:
                            self._busy.add(action.machine)
                            group.create_task(self._perform(action, leader), name=f"reconcile {action.machine}")
                    else:
                        self._control.troubles.clear()
                        self._leads_since = None
                except QuorumLost as error:
                    log.get().info("reconcile_waits", why=error.message)
                    await asyncio.sleep(BACKOFF_S[0])
                await self._control.changed.wait(seen, self._pause())
                await asyncio.sleep(max(CALM_S, took_s * REST))

    def _pause(self) -> float:
        """Return how long nothing needs to be looked at, unless something changes."""
        now = time.monotonic()
        waits = [at - now for _, at in self._failures.values() if at > now]
        waits += [since + DRAIN_S - now for since in self._leaving.values()]
        if self._leads_since is not None and now < self._leads_since[1] + GRACE_S:
            waits.append(self._leads_since[1] + GRACE_S - now)
        return min([TIMER_S, *(max(0.05, wait) for wait in waits)])

    def _decide(self, leader: LeaderInfo, group: asyncio.TaskGroup) -> tuple[Action, ...]:
        world = self._control.world()
        wanted = tuple(
            Wanted(machine=machine, tenement=tenement.name, operator=tenement.operator)
            for tenement in world.fleet.tenements
            for machine in tenement.machine_names
        )
        if world.paused is None:
            self._note_leaving(world, {one.machine for one in wanted})
        definitions = self._definitions(world, wanted)
        now = time.monotonic()
        for name, operator in self._operators(definitions, leader).items():
            if name not in self._looking and not self._is_fresh(name, now):
                self._looking.add(name)
                group.create_task(self._look(name, operator, world.cluster.cluster_id), name=f"observe {name}")
        observed = {
            name: sight.machines
            for name, sight in self._sights.items()
            if name in definitions and sight.machines is not None
        }
        situation = Situation(
            wanted=wanted,
            known=known_machines(world),
            observed=observed,
            settled_at={name: self._sights[name].settled_at for name in observed},
            hosts={
                name: f"local:{self._member_of(operator, world)}"
                for name, operator in definitions.items()
                if isinstance(operator, model.LocalOperator)
            },
            drained=frozenset(machine for machine in self._leaving if self._is_drained(machine, now)),
            resting=frozenset(self._busy | {m for m, (_, at) in self._failures.items() if at > now}),
        )
        situation = replace(situation, held=self._held(situation, leader, group, now))
        if world.paused is not None:
            everything = frozenset(known.machine for known in situation.known)
            self._control.foretold = decide(replace(situation, drained=everything))
            return ()
        self._control.foretold = None
        return decide(situation)

    def _held(self, situation: Situation, leader: LeaderInfo, group: asyncio.TaskGroup, now: float) -> frozenset[str]:
        """Return the machines that are gone and not made again now; that they are too many is told, and noted once."""
        term = (leader.generation, leader.epoch, leader.term)
        if self._leads_since is None or self._leads_since[0] != term:
            self._leads_since = (term, now)
        names = {one.machine for one in situation.wanted}
        held, why = vanished(situation.known, names, situation.observed, situation.hosts, now - self._leads_since[1])
        for machine in held if why else ():
            self._control.troubles[machine] = why
        for machine in () if why else self._vanished:
            self._control.troubles.pop(machine, None)
        if why and not self._vanished:
            event = NoteEvent(kind="machines_vanished", subject="fleet:machines", at=time.time(), why=why)
            group.create_task(self._note(event, leader), name="note what vanished")
        self._vanished = held if why else frozenset()
        return held

    async def _note(self, event: NoteEvent, leader: LeaderInfo) -> None:
        try:
            await self._end(Record(events=(event,)), leader)
        except QuorumLost as error:
            log.get().warning("event_not_recorded", kind=event.kind, why=error.message)

    def _definitions(self, world: World, wanted: tuple[Wanted, ...]) -> dict[str, model.Operator]:
        """Return the operators that are concerned: of the fleet, or of the last revision that still declared them."""
        names = {one.operator for one in wanted} | {row.operator for row in world.machines.values()}
        found = {operator.name: operator for operator in world.fleet.operators if operator.name in names}
        reader = self._control.view.reader
        for revision in range(world.revision - 1, max(0, world.revision - 20), -1):
            if names <= found.keys():
                break
            older = reader.fleet(revision)
            for operator in older[1].operators if older else ():
                if operator.name in names:
                    found.setdefault(operator.name, operator)
        return found

    def _operators(self, definitions: Mapping[str, model.Operator], leader: LeaderInfo) -> dict[str, Operator]:
        fence = (leader.generation, leader.epoch, leader.term)
        site = replace(
            operator_site(self._control.home, leader.member or ""),
            fence=fence,
            held=held_machines(self._control.world()),
            alive=self._alive(),
            free=self._free,
            keys=self._keys,
        )
        made: dict[str, Operator] = {}
        for name, definition in definitions.items():
            try:
                made[name] = self._elsewhere(definition, leader) or make_operator(definition, site)
            except SlumError as error:
                log.get().warning("operator_unusable", operator=name, why=error.message)
        return made

    def _alive(self) -> frozenset[str]:
        """Return the keys of the machines whose agents are connected, to whichever member."""
        now = time.monotonic()
        seen = (one.hello.machine for one in self._control.hub.seen.values() if one.is_connected(now))
        return frozenset(name.removeprefix(ELSEWHERE) for name in seen if name.startswith(ELSEWHERE))

    def _elsewhere(self, definition: model.Operator, leader: LeaderInfo) -> Operator | None:
        """Return the operator of a local machine that is another member's; None for all that is called from here."""
        if not isinstance(definition, model.LocalOperator):
            return None
        member = self._member_of(definition, self._control.world())
        if not member:
            raise ConfigError(
                f"operators.{definition.name}: with several members `member` must say whose machine it is"
            )
        if member == self._control.me:
            return None
        return LocalOfMember(self._control.relay, member, (leader.generation, leader.epoch, leader.term))

    def _member_of(self, definition: model.LocalOperator, world: World) -> str:
        return member_of(definition, world.machines.values(), [row.id for row in world.cluster.members])

    async def _look(self, name: str, operator: Operator, cluster: str) -> None:
        machines, pause, acts = None, BACKOFF_S[2], self._acts[name]
        settled_at = time.time() - operator.deadlines.settle_s
        try:
            async with asyncio.timeout(operator.deadlines.observe_s):
                machines, pause = await operator.observe(cluster), OBSERVED_S
        except (SlumError, TimeoutError) as error:
            pause = max(pause, _retry_after_s(error))
            log.get().warning("operator_not_observed", operator=name, why=str(error) or "it did not answer in time")
        finally:
            self._looking.discard(name)
        now = time.monotonic()
        if acts == self._acts[name]:
            self._sights[name] = Sight(machines, now, now + pause, settled_at)
        self._control.changed.beat()

    def _is_fresh(self, operator: str, now: float) -> bool:
        sight = self._sights.get(operator)
        return sight is not None and now < sight.until

    def _note_leaving(self, world: World, wanted: set[str]) -> None:
        leaving = {
            m for m, row in world.machines.items() if m not in wanted or row.operator != self._operator(world, m)
        }
        now = time.monotonic()
        self._leaving = {machine: self._leaving.get(machine, now) for machine in leaving}
        for machine in self._failures.keys() - wanted - world.machines.keys():
            del self._failures[machine]
            self._control.troubles.pop(machine, None)

    def _operator(self, world: World, machine: str) -> str:
        tenement = world.tenement_of(machine)
        return tenement.operator if tenement else ""

    def _is_drained(self, machine: str, now: float) -> bool:
        """Tell whether *machine*'s agent acts on the empty config and has nothing left, or had all the time for it."""
        if now - self._leaving[machine] > DRAIN_S:
            return True
        seen, desired = self._control.hub.seen.get(machine), self._control.hub.desired.get(machine)
        return (
            seen is not None
            and desired is not None
            and not desired.services
            and seen.is_reported
            and seen.acts_on(desired)
            and not seen.instances
        )

    async def _perform(self, action: Action, leader: LeaderInfo) -> None:
        """Do *action*; whatever becomes of it is data afterwards."""
        machine, retry_after_s = action.machine, 0.0
        try:
            trouble = await self._done(action, leader)
        except SlumError as error:
            trouble = f"{error.message}{f' ({error.hint})' if error.hint else ''}"
            retry_after_s = _retry_after_s(error)
        finally:
            self._busy.discard(machine)
        if trouble:
            count = self._failures.get(machine, (0, 0.0))[0]
            pause = max(BACKOFF_S[min(count, len(BACKOFF_S) - 1)], retry_after_s)
            self._failures[machine] = (count + 1, time.monotonic() + pause)
            self._control.troubles[machine] = trouble
            log.get().warning("machine_action_failed", machine=machine, action=type(action).__name__, why=trouble)
        else:
            self._failures.pop(machine, None)
            self._control.troubles.pop(machine, None)
            log.get().info("machine_action_done", machine=machine, action=type(action).__name__)
        self._control.changed.beat()

    async def _done(self, action: Action, leader: LeaderInfo) -> str:
        """Do *action* and return "", or why it is not done. A refusal of the operator's is raised.

        Whatever goes wrong after the intent leaves it open: even an error may be the answer to something that was done.
        Only a ConfigError says that nothing was asked of the provider.
        """
        if isinstance(action, Recognise):
            return await self._end(Outcome(action=action.action, ok=True, machine_id=action.machine_id), leader)
        world = self._control.world()
        definition = self._definitions(
            world, (Wanted(machine=action.machine, tenement=action.tenement, operator=action.operator),)
        )
        operator = self._operators(definition, leader).get(action.operator)
        if operator is None:
            return f"the operator {action.operator!r} is not known"
        is_create = isinstance(action, Create)
        deadline_s = operator.deadlines.create_s if is_create else operator.deadlines.destroy_s
        spec = _spec(action, world)
        intent = Intent(
            action=secrets.token_hex(8),
            kind="create" if is_create else "destroy",
            machine=action.machine,
            tenement=action.tenement,
            operator=action.operator,
            incarnation=action.incarnation,
            deadline_at=time.time() + deadline_s,
            machine_id=action.machine_id if isinstance(action, Destroy) else _foretold(operator, spec),
        )
        refused = await self._end(intent, leader)
        if refused:
            return refused
        try:
            # Not a moment longer than the ledger knows of, however long the commit took or the process was stopped.
            async with asyncio.timeout(intent.deadline_at - time.time()):
                await asyncio.sleep(0)
                if is_create and not isinstance(definition[action.operator], model.LocalOperator | model.JoinOperator):
                    spec = msgspec.structs.replace(spec, join=await self._joins.of(spec.key, deadline_s))
                machine_id = await _call(operator, action, spec)
        except TimeoutError:
            return f"no answer within {deadline_s:g} s; what came of it is being looked for"
        except ConfigError as error:
            if is_create:
                await self._end(Outcome(action=intent.action, ok=False, error=error.message), leader)
            raise
        finally:
            self._acts[action.operator] += 1
            self._sights.pop(action.operator, None)
        return await self._end(Outcome(action=intent.action, ok=True, machine_id=machine_id), leader)

    async def _end(self, command: AnyCommand, leader: LeaderInfo) -> str:
        """Commit *command* and return "", or why the ledger refused it; QuorumLost when it cannot be committed."""
        request_id = new_request_id(self._control.view.seq())
        result = await self._control.commit(command, request_id, f"slum@{leader.member}")
        return result.why if isinstance(result, Rejected) else ""


def known_machines(world: World) -> tuple[Known, ...]:
    """Return the newest incarnation of each machine that the ledger remembers."""
    newest: dict[str, Known] = {}
    for row in world.rows:
        if row.machine not in newest or newest[row.machine].incarnation < row.incarnation:
            newest[row.machine] = Known(
                machine=row.machine,
                tenement=row.tenement,
                operator=row.operator,
                incarnation=row.incarnation,
                state=row.state,
                machine_id=row.machine_id,
                action=row.action,
                arrives_until=row.arrives_until,
            )
    return tuple(newest.values())


def held_machines(world: World) -> tuple[Held, ...]:
    """Return the machines that have an id and are not destroyed, as operators are told of them."""
    return tuple(
        Held(
            id=row.machine_id,
            key=key_of(row.machine, row.incarnation),
            machine=row.machine,
            tenement=row.tenement,
            is_made=row.state == "created",
        )
        for row in world.rows
        if row.machine_id and row.state != "destroyed"
    )


def _spec(action: Create | Destroy, world: World) -> MachineSpec:
    """Return what an operator is told of *action*'s machine, but for the token that it joins with."""
    tenement = world.tenement_of(action.machine)
    return MachineSpec(
        cluster=world.cluster.cluster_id,
        key=key_of(action.machine, action.incarnation),
        machine=action.machine,
        tenement=action.tenement,
        ports=tenement.public_ports if tenement else (),
    )


async def _call(operator: Operator, action: Create | Destroy, spec: MachineSpec) -> str:
    """Call the operator and return the machine's id."""
    if isinstance(action, Create):
        return (await operator.create(spec)).id
    if action.machine_id:
        await operator.destroy(action.machine_id)
    return action.machine_id


def _foretold(operator: Operator, spec: MachineSpec) -> str:
    """Return the id that the machine will have, or "" when its operator cannot know."""
    return operator.machine_id(spec) if isinstance(operator, Foretold) else ""


def _retry_after_s(error: Exception) -> float:
    return (isinstance(error, OperatorError) and error.retry_after_s) or 0.0
