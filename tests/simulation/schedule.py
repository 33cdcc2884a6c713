"""One schedule: members, clients and trouble, all drawn from one seed; then calm, then everything is checked."""

from __future__ import annotations

import logging
import random
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from simulation.faults import Crash, Faults
from simulation.switch import Clock, SimNet, Switch
from slum.errors import SlumError
from slum.ledger import frames, group, identity
from slum.ledger.beginning import Beginning, begin
from slum.ledger.changes import Change
from slum.ledger.commands import Barrier, NoteEvent, Proposal, Record, Rejected, Result
from slum.ledger.commands import Member as MemberRow
from slum.ledger.joiner import Join, Joiner, pending, prepare
from slum.ledger.member import Member
from slum.ledger.opening import opened
from slum.ledger.world import Config, World

TICK_S = 0.02
CALM_S = 60.0


@dataclass
class Op:
    """One write or barrier of a client. *seq* once it is answered."""

    proposal: Proposal
    text: str
    began_at: float
    member: str = ""
    asked_at: float = 0.0
    seq: int = 0
    done_at: float = 0.0


@dataclass
class Node:
    name: str
    home: Path
    stack: ExitStack | None = None
    member: Member | None = None
    net: SimNet | None = None
    joiner: Joiner | None = None
    gone: bool = False
    """Learned that it is no member any more, and was switched off."""
    next_at: float = 0.0
    up_at: float = 0.0
    paused_until: float = 0.0
    runs: int = 0


@dataclass
class Failed(Exception):
    why: str


class Schedule:
    def __init__(self, folder: Path, seed: int, *, members: int = 3, troubles: int = 12, trace: bool = False) -> None:
        self.chance = random.Random(seed)
        self.clock = Clock()
        group.simulate(self.clock.now, self.chance)
        self.switch = Switch(self.clock, self.chance, self.chance.choice([0.0005, 0.002, 0.02]))
        self.faults = Faults(self.chance)
        self.config = Config(epoch_entries=self.chance.choice([8, 12, 30, 200]), epoch_bytes=1 << 18, ballast_bytes=0)
        self.trace = trace
        self.troubles = troubles
        self.folder = folder
        self.nodes: dict[str, Node] = {}
        self.changing = self.chance.random() < 0.4
        rows = tuple(
            self.make_node()[1] for _ in range(self.chance.choice([1, 2, members]) if self.changing else members)
        )
        beginning = Beginning(cluster="c0ffee", lineage="l", generation=7, members=rows, at=1.0)
        for node in self.nodes.values():
            begin(node.home, beginning, self.config.epoch_bytes)
        self.ops: list[Op] = []
        self.open: list[Op] = []
        self.leaders: dict[tuple[Any, ...], str] = {}
        self.counter = 0
        self.calm = False
        self.effective: list[tuple[float, str]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, node in self.nodes.items() if not node.gone]

    def make_node(self) -> tuple[Node, MemberRow]:
        name = f"m{len(self.nodes) + 1}"
        node = self.nodes[name] = Node(name, self.folder / name)
        node.home.mkdir(mode=0o700)
        me = identity.Me(id=name, incarnation=f"i-{name}", listen="", address="")
        (node.home / identity.ME).write_bytes(msgspec.json.encode(me))
        return node, MemberRow(id=name, incarnation=me.incarnation, public_key="k", address="a")

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Run it all; return a line about what happened, raise Failed."""
        try:
            for node in self.nodes.values():
                self.start(node)
            for _ in range(self.troubles):
                self.go_on(self.chance.choice([0.1, 0.4, 1.0, 2.0]) * self.chance.random())
                self.trouble()
            self.heal()
            self.settle()
            self.check()
        finally:
            for node in self.nodes.values():
                self.stop(node)
        at = [max(len(op.proposal.request_id) and op.seq for op in self.ops)]
        return f"{len(self.ops)} ops, seq {at[0]}, {len(self.leaders)} leaderships, {len(self.nodes)} members ever"

    def go_on(self, seconds: float) -> None:
        end = self.clock.at + seconds
        while self.clock.at < end:
            self.turn(end)

    def turn(self, end: float) -> None:
        """Move to the next thing that happens, and let it."""
        self.switch.keep()
        times = [end]
        for node in self.nodes.values():
            if node.gone:
                continue
            if node.joiner is not None:
                times.append(min(node.next_at, self.switch.next_at(node.name)))
            elif node.member is None:
                times.append(node.up_at)
            elif node.paused_until > self.clock.at:
                times.append(node.paused_until)
            else:
                times.append(min(node.next_at, self.switch.next_at(node.name)))
        self.clock.at = max(self.clock.at, min(times))
        self.clients()
        names = list(self.names)
        self.chance.shuffle(names)
        for name in names:
            node = self.nodes[name]
            if node.joiner is not None:
                self.join(node)
                continue
            if node.member is None:
                if self.clock.at >= node.up_at:
                    self.start(node)
                continue
            assert node.net is not None
            if node.paused_until > self.clock.at:
                continue
            node.net.paused = False
            if self.clock.at >= node.next_at or self.switch.next_at(name) <= self.clock.at or node.net.events:
                self.step(node)

    def step(self, node: Node) -> None:
        member = node.member
        assert member is not None
        try:
            member.step(0.0)
        except Crash:
            self.crash(node)
            return
        # What it has just taken in is worked on soon; else the next tick is.
        node.next_at = self.clock.at + (0.0002 if self.faults.moved else TICK_S)
        self.faults.moved = False
        if member.epoch.group.leads and member.epoch.wire is not None:
            key = (*member.epoch.wire.place, member.epoch.group.term)
            if self.leaders.setdefault(key, node.name) != node.name:
                raise Failed(f"{key} is led by {self.leaders[key]} and {node.name}")
        for take, answer in member.proposer.release():
            take(answer)

    def join(self, node: Node) -> None:
        assert node.joiner is not None
        node.next_at = self.clock.at + TICK_S
        try:
            done = node.joiner.step(0.0)
        except Crash:
            done = True
        if done:
            self.stop(node)
            node.up_at = self.clock.at

    def start(self, node: Node) -> None:
        wanted = pending(node.home)
        node.net = SimNet(self.switch, node.name)
        if wanted is not None:
            me = identity.load(node.home)
            assert me is not None
            node.joiner = Joiner(node.home, me, wanted, self.config, node.net, self.clock.now)  # type: ignore[arg-type]  # its wake needs no descriptor
            return
        node.runs += 1
        node.next_at = self.clock.at
        world = World(
            net=node.net,  # type: ignore[arg-type]  # its wake needs no descriptor
            clock=self.clock.now,
            now=lambda: 1_700_000_000.0 + self.clock.at,
            chance=self.chance,
            apart=lambda work: work(),
        )
        node.stack = ExitStack()
        run = f"{node.name}.{node.runs}"
        node.member = node.stack.enter_context(
            opened(node.home, self.config, run=run, note=lambda event, **f: self.say(node, event, f), world=world)
        )
        self.say(node, "start", {})

    def crash(self, node: Node) -> None:
        """A power cut: what was not synced is gone, but for a torn piece of it, perhaps."""
        member = node.member
        assert member is not None
        self.say(node, "crash", {"at": self.faults.last})
        journal = member.epoch.journal
        torn = None
        if journal._pending and self.chance.random() < 0.5:
            body = b"".join((*journal._pending, frames.commit_record(journal._commit)))
            frame = frames.encode_frame(journal._frames + 1, body, journal.identity.salt)
            torn = (journal.path, journal._end, frame[: self.chance.randrange(len(frame))])
        self.stop(node)
        if torn is not None:
            with torn[0].open("r+b") as file:
                file.seek(torn[1])
                file.write(torn[2])
        node.up_at = self.clock.at + self.chance.choice([0.05, 0.5, 3.0])

    def stop(self, node: Node) -> None:
        if node.stack is not None:
            node.stack.close()
        if node.joiner is not None:
            node.joiner.close()
            assert node.net is not None
            node.net.close()
            node.joiner = None
        for other in self.names:
            if other != node.name:
                self.switch.break_(node.name, other)
        node.stack = node.member = node.net = None

    def say(self, node: Node, event: str, fields: dict[str, Any]) -> None:
        if self.trace:
            print(f"{self.clock.at:10.4f} {node.name} {event} {fields}")
        if event == "no_longer_a_member":
            node.gone = True
        if event == "peer_was_refused" and "is no member" not in fields["why"]:
            raise Failed(f"{node.name}: {fields}")

    # --- trouble -----------------------------------------------------------------------------------------------------

    def alive(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.member is not None and not node.gone]

    def change(self, leader: Member) -> None:
        """Somebody joins or leaves; nobody asks a second time when it fails."""
        members = leader.position.members
        if len(members) >= 5 or (len(members) > 1 and self.chance.random() < 0.5):
            change = Change(remove=self.chance.choice(members).id)
        else:
            node, row = self.make_node()
            prepare(node.home, Join(cluster="c0ffee", members=members))
            node.up_at = self.clock.at
            change = Change(add=row)
        if self.trace:
            print(f"{self.clock.at:10.4f} -- {change}")
        try:
            leader.change(change, lambda outcome: self.trace and print(f"{self.clock.at:10.4f} -- {outcome}"))
        except SlumError:
            return

    def trouble(self) -> None:
        kind = self.chance.choice(
            ["crash", "crash", "crash_leader", "crash_all", "armed", "armed", "armed", "cut", "cut", "block", "isolate",
             "pause", "pause_leader", "heal", "heal", "break"]
        )  # fmt: skip
        alive = self.alive()
        leaders = [node for node in alive if node.member is not None and node.member.epoch.group.leads]
        if self.trace:
            print(f"{self.clock.at:10.4f} -- {kind}")
        if self.changing and leaders and self.chance.random() < 0.4:
            leading = self.chance.choice(leaders).member
            assert leading is not None
            self.change(leading)
            return
        if len(self.names) < 2:
            return
        a, b = self.chance.sample(self.names, 2)
        match kind:
            case "crash" if alive:
                self.crash(self.chance.choice(alive))
            case "crash_leader" if leaders:
                self.crash(self.chance.choice(leaders))
            case "crash_all":
                for node in alive:
                    self.crash(node)
            case "armed":
                self.faults.arm()
            case "cut":
                self.switch.pair(a, b).cut = True
                self.switch.break_(a, b)
            case "block" if self.switch.pair(a, b).connected:
                self.switch.pair(a, b).ways[a].blocked = True
            case "isolate":
                for other in self.names:
                    if other != a:
                        self.switch.pair(a, other).cut = True
                        self.switch.break_(a, other)
            case "pause" if alive:
                self.pause(self.chance.choice(alive))
            case "pause_leader" if leaders:
                self.pause(self.chance.choice(leaders))
            case "break":
                self.switch.break_(a, b)
            case "heal":
                self.heal_net()

    def pause(self, node: Node) -> None:
        assert node.net is not None
        node.paused_until = self.clock.at + self.chance.choice([0.3, 1.0, 4.0])
        node.net.paused = True

    def heal_net(self) -> None:
        for pair in self.switch.pairs.values():
            pair.cut = False
            for way in pair.ways.values():
                way.blocked = False

    def heal(self) -> None:
        self.heal_net()
        self.faults.disarm()
        self.calm = True
        for node in self.nodes.values():
            node.up_at = min(node.up_at, self.clock.at)
            node.paused_until = self.clock.at

    # --- clients -----------------------------------------------------------------------------------------------------

    def clients(self) -> None:
        now = self.clock.at
        for op in [op for op in self.open if now - op.asked_at > 1.5]:
            self.ask(op)
        while not self.calm and len(self.open) < 4:
            self.counter += 1
            made = f"{self.chance.getrandbits(128):032x}:0"
            text = "" if self.chance.random() < 0.15 else str(self.counter)
            command = (
                Barrier() if not text else Record(events=(NoteEvent(kind="noted", subject="x:y", at=1.0, why=text),))
            )
            op = Op(Proposal(command=command, request_id=made, actor="t"), text, now)
            self.ops.append(op)
            self.open.append(op)
            self.ask(op)

    def ask(self, op: Op) -> None:
        op.asked_at = self.clock.at
        alive = self.alive()
        if not alive:
            return
        member = self.chance.choice(alive).member
        assert member is not None

        def take(answer: Result | SlumError) -> None:
            if isinstance(answer, SlumError):
                op.asked_at = self.clock.at - 1.4
                return
            if isinstance(answer, Rejected):
                raise Failed(f"{op.text}: {answer}")
            if op in self.open:
                self.open.remove(op)
                op.seq, op.done_at = answer.seq, self.clock.at
                if op.text == "" and member.position.seq < answer.seq:
                    raise Failed("a barrier was answered before its member had applied it")

        try:
            member.proposer.submit(op.proposal, take, seq=member.position.seq)
        except SlumError:
            return

    # --- the end -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until everybody has everything."""
        end = self.clock.at + CALM_S
        while True:
            self.turn(self.clock.at + TICK_S)
            members = self.final()
            positions = {(m.position.seq, m.position.chain, m.place) for m in members if m is not None}
            ready = any(m is not None and m.is_ready and not m.proposer.in_flight for m in members)
            if members and not self.open and ready and len(positions) == 1:
                return
            if self.clock.at > end:
                state = [
                    (n.name, n.member.place, n.member.position.seq, n.member.epoch.group.term)
                    for n in self.alive()
                    if n.member
                ]
                raise Failed(f"not settled {CALM_S} s after all was healed: {len(self.open)} open, {state}")

    def final(self) -> list[Member]:
        """Return the members that the newest list names, if all of them run."""
        alive = {node.name: node.member for node in self.alive() if node.member is not None}
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
        found = texts.pop()
        wanted = {op.text for op in self.ops if op.text}
        if len(found) != len(set(found)):
            raise Failed("something was written twice")
        if set(found) != wanted:
            raise Failed(f"lost or invented: {sorted(wanted ^ set(found))[:10]}")
        self.check_order()

    def check_order(self) -> None:
        """What was answered before another began has a lower place; a barrier is above all that was answered before."""
        highest = 0
        ends = sorted((op for op in self.ops if op.done_at), key=lambda op: op.done_at)
        at = 0
        for op in sorted(self.ops, key=lambda op: op.began_at):
            while at < len(ends) and ends[at].done_at < op.began_at:
                highest = max(highest, ends[at].seq)
                at += 1
            if op.seq < highest or (op.text == "" and op.seq <= highest and highest):
                raise Failed(f"{op.text or 'a barrier'} at {op.seq} began after {highest} was answered")


class Raise(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            raise Failed(f"PySyncObj: {record.getMessage()}")


def run_one(folder: Path, seed: int, *, members: int, troubles: int, trace: bool = False) -> str:
    """Run the schedule of *seed* in *folder*, which is emptied after."""
    logging.getLogger("pysyncobj").handlers = [Raise()]
    logging.getLogger("pysyncobj").propagate = False
    place = folder / f"s{seed}"
    place.mkdir()
    try:
        return Schedule(place, seed, members=members, troubles=troubles, trace=trace).run()
    finally:
        shutil.rmtree(place)
