"""One schedule: members, clients and trouble, all drawn from one seed; then calm, a probe, and everything is checked."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

from simulation import power
from simulation.clients import Clients
from simulation.faults import Faults
from simulation.nodes import CLUSTER, LOOK_S, Node, Nodes
from simulation.switch import Clock, Switch
from simulation.witness import Failed, Witness
from slum.errors import SlumError
from slum.ledger import group
from slum.ledger.changes import Change
from slum.ledger.commands import Barrier, Proposal
from slum.ledger.group import Timing
from slum.ledger.joiner import Join, prepare
from slum.ledger.member import Member
from slum.ledger.world import Config

CALM_S = 20.0
KNOWN_S = 1.0
PROBE_S = 2.0
ANSWER_S = 1.4
"""Longer than everything takes when nothing fails, and shorter than a client waits."""
YEAR_S = 365 * 86400.0
KINDS = (
    "crash", "crash", "crash_leader", "crash_leader", "crash_all", "armed", "armed", "armed", "cut", "cut", "block",
    "isolate", "isolate_leader", "burst", "burst", "rolling", "rolling", "pause", "pause_leader", "heal", "heal", "break", "again",
)  # fmt: skip

ROLLING = (
    "relapse",
    "relapse",
    "rolling",
    "rolling",
    "rolling",
    "rolling",
    "burst",
    "burst",
    "crash_leader",
    "pause_leader",
    "heal",
    "block",
)


class Schedule:
    """*rolling*: nothing but leaders that write much and are cut off, so that logs differ; *strays*: so many messages arrive twice;
    *kinds*: nothing but these troubles. None, or nothing, leaves it to the seed."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        members: int = 3,
        troubles: int = 12,
        rolling: bool | None = None,
        strays: float | None = None,
        kinds: tuple[str, ...] = (),
        trace: bool = False,
    ) -> None:
        chance = self.chance = random.Random(seed)
        self.clock = Clock()
        group.simulate(self.clock.now, chance)
        power.forget()
        self.witness = Witness()
        self.faults = Faults(chance, self.witness)
        # Slow networks and short timeouts make many elections, whose messages cross each other.
        delay_s, hurry = chance.choice(
            [(0.0005, 1.0), (0.002, 1.0), (0.02, 1.0), (0.02, 0.3), (0.06, 0.4), (0.12, 0.3)]
        )
        self.hurries = hurry < 1.0
        drawn = chance.random() < 0.25
        self.rolling = drawn if rolling is None else rolling
        doubled = chance.choice([0.0, 0.05, 0.3])
        self.switch = Switch(self.clock, chance, delay_s, strays=doubled if strays is None else strays)
        timing = Timing(
            election_min_s=0.4 * hurry, election_max_s=0.8 * hurry, fallback_s=0.8 * hurry, heartbeat_s=0.13 * hurry
        )
        config = Config(
            epoch_entries=chance.choice([30, 200_000] if self.rolling else [8, 12, 20, 30, 200_000]),
            epoch_bytes=1 << 14,
            ballast_bytes=0,
            timing=timing,
            hash_rows=chance.random() < 0.25,
        )
        self.trace = trace
        self.kinds = kinds or (ROLLING if self.rolling else KINDS)
        # Each of a rolling one takes several elections.
        self.troubles = troubles // 2 if self.rolling else troubles
        self.nodes = Nodes(
            folder,
            chance,
            config,
            clock=self.clock,
            switch=self.switch,
            faults=self.faults,
            witness=self.witness,
            trace=trace,
        )
        self.changing = chance.random() < 0.4 and not self.rolling
        first = chance.choice([1, 2, members]) if self.changing else members
        wrong = chance.randrange(first) if chance.random() < 0.15 else -1
        self.clocks_agree = wrong < 0
        rows = [self.nodes.make(clock_off_s=YEAR_S if n == wrong else chance.uniform(-2, 2))[1] for n in range(first)]
        self.nodes.begin(tuple(rows), folder.parent / f"begun-{first}")
        self.clients = Clients(self.nodes, self.clock, chance)

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Run it all; return a line about what happened, raise Failed."""
        try:
            for _ in range(self.troubles):
                self.go_on(self.chance.choice([0.1, 0.4, 1.0, 2.0]) * self.chance.random())
                self.trouble()
            self.heal()
            if self.chance.random() < 0.5:
                self.probe()
            self.clients.calm = True
            self.settle()
            self.check()
        finally:
            for node in self.nodes.all.values():
                self.nodes.stop(node)
        seq = max((op.seq for op in self.clients.all), default=0)
        return f"{len(self.clients.all)} ops, seq {seq}, {len(self.witness.leaders)} leaderships, {len(self.nodes.all)} members ever"

    def go_on(self, seconds: float) -> None:
        end = self.clock.at + seconds
        while self.clock.at < end:
            self.turn(end)

    def turn(self, end: float) -> None:
        self.clients.work()
        self.nodes.turn(min(end, self.clock.at + 0.1))

    # --- trouble -----------------------------------------------------------------------------------------------------

    def change(self, leader: Member) -> None:
        """Somebody joins or leaves; nobody asks a second time when it fails."""
        members = leader.position.members
        if len(members) > 1 and (len(members) >= 5 or self.chance.random() < 0.4):
            change = Change(remove=self.chance.choice(members).id)
        else:
            node, row = self.nodes.make()
            prepare(node.home, Join(cluster=CLUSTER, members=members))
            node.up_at = self.clock.at
            change = Change(add=row)
        self.say(str(change))
        try:
            leader.change(change, lambda outcome: self.say(str(outcome)))
        except SlumError:
            return

    def say(self, what: str) -> None:
        if self.trace:
            print(f"{self.clock.at:10.4f} -- {what}")

    def trouble(self) -> None:
        kind = self.chance.choice(self.kinds)
        alive, leaders, names = self.nodes.alive, self.nodes.leading, self.nodes.names
        if self.changing and leaders and self.chance.random() < 0.4:
            leading = self.chance.choice(leaders).member
            assert leading is not None
            self.change(leading)
            return
        self.say(kind)
        one = self.chance.choice(alive) if alive else None
        leader = self.chance.choice(leaders) if leaders else None
        match kind:
            case "crash" if one is not None:
                self.nodes.crash(one)
            case "crash_leader" if leader is not None:
                self.nodes.crash(leader)
            case "crash_all":
                for node in alive:
                    self.nodes.crash(node)
            case "armed":
                self.faults.arm()
            case "again" if leader is not None:
                self.push_again(leader)
            case "burst" if leader is not None:
                self.burst(leader)
            case "relapse" if leader is not None and len(names) > 4:
                self.relapse(leader)
            case "rolling" | "relapse" if leader is not None and len(names) > 2:
                self.roll(leader)
            case "pause" if one is not None:
                self.nodes.pause(one, self.chance.choice([0.3, 1.0, 4.0]))
            case "pause_leader" if leader is not None:
                self.nodes.pause(leader, self.chance.choice([0.3, 1.0, 4.0]))
            case "heal":
                self.heal_net()
            case _ if len(names) > 1:
                self.trouble_net(kind, leader.name if leader is not None else self.chance.choice(names))

    def trouble_net(self, kind: str, leader: str) -> None:
        a, b = self.chance.sample(self.nodes.names, 2)
        match kind:
            case "cut":
                self.cut(a, b)
            case "block":
                self.block(a, b)
            case "isolate":
                self.isolate(a)
            case "isolate_leader":
                self.isolate(leader)
            case "break":
                self.switch.break_(a, b)

    def cut(self, a: str, b: str) -> None:
        self.switch.pair(a, b).cut = True
        self.switch.break_(a, b)

    def isolate(self, name: str) -> None:
        for other in self.nodes.names:
            if other != name:
                self.cut(name, other)

    def burst(self, leader: Node) -> None:
        """A leader writes more than one entry at once, and soon something happens to it: others have some of them."""
        member = leader.member
        self.write_much(leader)
        self.go_on(self.switch.delay_s * self.chance.uniform(0.2, 2.0))
        if leader.member is not member or leader.paused_until > self.clock.at:
            return
        match self.chance.choice(["isolate", "crash", "pause", "cut", "block"]):
            case "isolate":
                self.isolate(leader.name)
            case "crash":
                self.nodes.crash(leader)
            case "pause":
                self.nodes.pause(leader, self.chance.choice([0.3, 1.0]))
            case how if len(self.nodes.names) > 1:
                other = self.chance.choice([name for name in self.nodes.names if name != leader.name])
                if how == "cut":
                    self.cut(leader.name, other)
                else:
                    self.block(leader.name, other)

    def write_much(self, leader: Node) -> None:
        """Put some entries into the log of *leader* at once, large enough that few fit into one message."""
        assert leader.member is not None
        if leader.member.is_ready:
            barrier = (Proposal(command=Barrier(), request_id="", actor="t" * self.chance.choice([1, 600, 600, 600])),)
            for _ in range(self.chance.randint(2, 8)):
                leader.member._offers.append(barrier)
            leader.next_at = self.clock.at

    def roll(self, leader: Node) -> None:
        """One after the other is cut off from all, leaders first, while the one before comes back with what it has."""
        timing = self.nodes.config.timing
        for _ in range(self.chance.randint(2, 3)):
            if leader.member is not None and leader.paused_until <= self.clock.at:
                self.write_much(leader)
                self.go_on(self.switch.delay_s * self.chance.uniform(0.2, 1.5))
            self.isolate(leader.name)
            self.go_on(timing.election_max_s * self.chance.uniform(1.5, 3.0))
            newer = [node for node in self.nodes.leading if node is not leader]
            if newer and self.chance.random() < 0.6:
                # Whoever comes back meets a leader that has never heard of its log's end.
                self.nodes.crash(newer[0])
                newer[0].up_at = self.clock.at + 0.05
                self.go_on(timing.election_max_s * self.chance.uniform(2.0, 4.0))
            self.heal_net()
            others = [node for node in self.nodes.alive if node is not leader]
            if not others:
                return
            newer = [node for node in others if node.leads]
            if newer and self.chance.random() < 0.7:
                # The new leader stays, somebody who followed it goes.
                others = [node for node in others if node is not newer[0]] or others
            leader = self.chance.choice(others)

    def relapse(self, leader: Node) -> None:
        """What a leader wrote is held by one other alone; others go on without the two, and the leader may lead them again.

        Only then does that other come back, and what it once answered to the leader may still be on its way.
        """
        wait_s = self.nodes.config.timing.election_max_s
        other = self.chance.choice([name for name in self.nodes.names if name != leader.name])
        for name in self.nodes.names:
            if name not in (leader.name, other):
                self.cut(leader.name, name)
        self.write_much(leader)
        self.go_on(self.switch.delay_s * self.chance.uniform(2.0, 4.0))
        self.isolate(leader.name)
        self.isolate(other)
        self.go_on(wait_s * self.chance.uniform(1.5, 2.5))
        newer = [node for node in self.nodes.leading if node.name not in (leader.name, other)]
        self.heal_net()
        self.isolate(other)
        self.go_on(wait_s * self.chance.uniform(0.7, 1.5))
        if newer:
            self.isolate(newer[0].name)
            self.go_on(wait_s * self.chance.uniform(1.0, 2.0))
        if leader.member is not None and leader.paused_until <= self.clock.at:
            self.write_much(leader)
        self.heal_net()

    def block(self, a: str, b: str) -> None:
        """What *b* says to *a* waits."""
        if self.switch.pair(a, b).connected:
            self.switch.pair(a, b).ways[a].blocked = True
            self.switch.recount()

    def push_again(self, leader: Node) -> None:
        """A command of an earlier leader arrives only now, whoever held it back; it has not been done before."""
        member = leader.member
        assert member is not None
        log, term = member.epoch.journal, member.epoch.group.term
        old = [entry for entry in log[1:] if entry[2] < term and group.command_entry(entry[0]) is not None]
        if old:
            data = group.command_entry(self.chance.choice(old)[0])
            member.epoch.group.append(data)

    def heal_net(self) -> None:
        for pair in self.switch.pairs.values():
            pair.cut = False
            for way in pair.ways.values():
                way.blocked = False
        self.switch.recount()

    def heal(self) -> None:
        self.heal_net()
        self.faults.disarm()
        self.switch.strays = self.nodes.stalls = 0.0
        self.switch.delay_s = min(self.switch.delay_s, 0.02)
        for node in self.nodes.all.values():
            node.up_at = min(node.up_at, self.clock.at)
            node.paused_until = self.clock.at

    # --- the end -----------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """With members well, a lost line or one that was away deposes nobody, and whoever hears the leader answers."""
        if not self.clocks_agree or self.hurries:
            return
        self.settle()
        # A leader whose connections have all just broken is rightly replaced: that must be over.
        self.go_on(1.0)
        self.settle()
        leaders = [node for node in self.nodes.leading if node.member is not None and node.member.is_ready]
        voters = [row.id for row in leaders[0].member.position.members] if leaders and leaders[0].member else []
        if len(leaders) != 1 or len(voters) < 3:
            return
        leader = leaders[0].name
        other = self.chance.choice([name for name in voters if name != leader])
        began = len(self.witness.changes)
        if self.chance.random() < 0.5:
            self.say(f"probe: {other} and {leader} lose their line")
            self.cut(leader, other)
        else:
            self.say(f"probe: {other} is away for a while")
            self.isolate(other)
        end = self.clock.at + PROBE_S
        while self.clock.at < end:
            self.turn(end)
            self.clients.require_answers(ANSWER_S, deaf=other)
        deaf = self.nodes.all[other].member
        if deaf is not None and deaf.status().age_s < PROBE_S / 2:
            raise Failed(f"{other} has heard no leader for {PROBE_S} s, but says {deaf.status().age_s}")
        self.heal_net()
        self.go_on(ANSWER_S)
        deposed = self.witness.changes[began:]
        if deposed:
            raise Failed(f"{leader} led and could, but lost it: {deposed}")
        for member in self.final():
            if member.status().age_s > KNOWN_S:
                raise Failed(f"all is well, but what a member shows is {member.status().age_s} s old, it says")

    def settle(self) -> None:
        """Wait until everybody has everything."""
        end = self.clock.at + CALM_S
        open_before = set(map(id, self.clients.open))
        while True:
            self.turn(self.clock.at + LOOK_S)
            members = self.final()
            positions = {(m.position.seq, m.position.chain, m.place) for m in members}
            ready = any(m.is_ready and not m.proposer.in_flight for m in members)
            waiting = open_before & set(map(id, self.clients.open))
            together = len(positions if self.clients.calm else {m.place for m in members}) == 1
            if members and not waiting and ready and together:
                return
            if self.clock.at > end:
                state = [
                    (
                        n.name,
                        n.member.place,
                        n.member.position.seq,
                        n.member.epoch.group.term,
                        n.leads,
                        n.member.is_ready,
                    )
                    for n in self.nodes.alive
                    if n.member
                ]
                raise Failed(f"not settled {CALM_S} s after all was healed: {len(waiting)} open, {state}")

    def final(self) -> list[Member]:
        """Return the members that the newest list names, if all of them run."""
        alive = {node.name: node.member for node in self.nodes.alive if node.member is not None}
        newest = max(alive.values(), key=lambda member: member.place, default=None)
        if newest is None or not all(row.id in alive for row in newest.position.members):
            return []
        return [alive[row.id] for row in newest.position.members]

    def check(self) -> None:
        hashes, texts = set(), set()
        for member in self.final():
            state = member.state
            hashes.add(state.row_hash())
            state.check_events()
            rows = state._db.execute("SELECT why FROM events WHERE kind = 'noted' ORDER BY number").fetchall()
            texts.add(tuple(row[0] for row in rows))
        if len(hashes) != 1 or len(texts) != 1:
            raise Failed("members differ in rows")
        self.clients.check(texts.pop())


class Raise(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            raise Failed(f"PySyncObj: {record.getMessage()}")


def run_one(
    folder: Path,
    seed: int,
    *,
    members: int,
    troubles: int,
    rolling: bool | None = None,
    strays: float | None = None,
    kinds: tuple[str, ...] = (),
    trace: bool = False,
) -> str:
    """Run the schedule of *seed* in *folder*, which is emptied after."""
    logging.getLogger("pysyncobj").handlers = [Raise()]
    logging.getLogger("pysyncobj").propagate = False
    place = folder / f"s{seed}"
    place.mkdir()
    try:
        return Schedule(
            place, seed, members=members, troubles=troubles, rolling=rolling, strays=strays, kinds=kinds, trace=trace
        ).run()
    finally:
        shutil.rmtree(place)
