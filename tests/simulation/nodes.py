"""The members of one schedule and the time that passes for them: started, stepped when something is due, crashed, switched off.

Time jumps from one thing that happens to the next. What members write into their logs is heard here.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from simulation import power
from simulation.faults import Crash, Faults, torn_write
from simulation.switch import Clock, SimNet, Switch
from simulation.witness import Failed, Witness
from slum.errors import InvariantError, SlumError
from slum.ledger import identity
from slum.ledger.beginning import Beginning, begin
from slum.ledger.commands import Member as MemberRow
from slum.ledger.joiner import Joiner, pending
from slum.ledger.member import TICK_S, Member
from slum.ledger.opening import opened
from slum.ledger.service import IDLE_S
from slum.ledger.world import Config, World

LOOK_S = 0.05
SOON_S = 0.0002
STALL_S = 0.06
CLUSTER = "c0ffee"


@dataclass
class Node:
    name: str
    home: Path
    clock_off_s: float = 0.0
    stack: ExitStack | None = None
    member: Member | None = None
    net: SimNet | None = None
    joiner: Joiner | None = None
    gone: bool = False
    """Learned that it is no member any more, and was switched off."""
    next_at: float = 0.0
    up_at: float = 0.0
    paused_until: float = 0.0
    halfway: bool = False
    """Has taken in what came, and not worked on it yet."""
    runs: int = 0

    @property
    def leads(self) -> bool:
        return self.member is not None and self.member.epoch.group.leads

    @property
    def due(self) -> float:
        """When something happens here next."""
        if self.joiner is None and self.member is None:
            return self.up_at
        assert self.net is not None
        at = self.next_at if not self.net.events and not self.net.wake.is_set else 0.0
        return max(min(at, self.net.arrival), self.paused_until)


class Nodes:
    """*hear* is called with what a member logs."""

    def __init__(
        self,
        folder: Path,
        chance: random.Random,
        config: Config,
        *,
        clock: Clock,
        switch: Switch,
        faults: Faults,
        witness: Witness,
        trace: bool,
    ) -> None:
        self.folder = folder
        self.chance = chance
        self.config = config
        self.clock = clock
        self.switch = switch
        self.faults = faults
        self.witness = witness
        self.trace = trace
        self.stalls = chance.choice([0.0, 0.02, 0.1])
        self.all: dict[str, Node] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, node in self.all.items() if not node.gone]

    @property
    def alive(self) -> list[Node]:
        return [node for node in self.all.values() if node.member is not None and not node.gone]

    @property
    def leading(self) -> list[Node]:
        return [node for node in self.alive if node.leads]

    def make(self, *, clock_off_s: float = 0.0) -> tuple[Node, MemberRow]:
        name = f"m{len(self.all) + 1}"
        node = self.all[name] = Node(name, self.folder / name, clock_off_s)
        node.home.mkdir(mode=0o700)
        me = identity.Me(id=name, incarnation=f"i-{name}", listen="", address="")
        (node.home / identity.ME).write_bytes(msgspec.json.encode(me))
        return node, MemberRow(id=name, incarnation=me.incarnation, public_key="k", address="a")

    def begin(self, rows: tuple[MemberRow, ...], template: Path) -> None:
        """Lay the same new ledger down for all; *template* is where an equal one was made before, or will be."""
        if not template.exists():
            beginning = Beginning(cluster=CLUSTER, lineage="l", generation=7, members=rows, at=1.0)
            begin(template, beginning, self.config.epoch_bytes)
        for node in self.all.values():
            shutil.copytree(template, node.home, dirs_exist_ok=True)
            self.start(node)

    # --- time --------------------------------------------------------------------------------------------------------

    def turn(self, end: float) -> None:
        """Move to the next thing that happens, at *end* at the latest, and let it."""
        self.switch.keep()
        first, due = min(end, self.switch.look_at), []
        for node in self.all.values():
            if not node.gone:
                at = node.due
                due.append((at, node))
                first = min(first, at)
        now = self.clock.at = max(self.clock.at, first)
        ready = [node for at, node in due if at <= now]
        if len(ready) > 1:
            self.chance.shuffle(ready)
        for node in ready:
            if node.joiner is not None:
                self._join(node)
            elif node.member is None:
                self.start(node)
            else:
                assert node.net is not None
                node.net.paused = False
                self.step(node)

    def step(self, node: Node) -> None:
        member = node.member
        assert member is not None
        self.faults.moved = self.faults.full = False
        try:
            if not node.halfway:
                member.take(0.0)
                node.halfway = bool(self.stalls) and self.chance.random() < self.stalls
                if node.halfway:
                    # Answers are on their way; the machine has something else to do before it goes on.
                    node.paused_until = self.clock.at + STALL_S * self.chance.random()
                    return
            node.halfway = False
            member.work()
        except Crash:
            self.crash(node)
            return
        except InvariantError:
            raise
        except (SlumError, OSError):
            if not self.faults.full:
                raise
            self.say(node, "disk full", {"at": self.faults.last})
            self.end(node)
            return
        # As long as it would wait if nothing came; a little longer where that is only to look around.
        wait_s = member._patience(IDLE_S)
        node.next_at = self.clock.at + (max(SOON_S, wait_s) if wait_s < TICK_S else max(LOOK_S, wait_s))
        self.witness.look(node.name, member, self.clock.at)
        for take, answer in member.answers():
            take(answer)

    def _join(self, node: Node) -> None:
        assert node.joiner is not None
        node.next_at = self.clock.at + LOOK_S
        try:
            done = node.joiner.step(0.0)
        except (Crash, OSError):
            done = True
        if done:
            self.stop(node)
            node.up_at = self.clock.at

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self, node: Node) -> None:
        wanted = pending(node.home)
        self._cut_off(node)
        node.net = SimNet(self.switch, node.name)
        node.next_at = self.clock.at
        if wanted is not None:
            me = identity.load(node.home)
            assert me is not None
            node.joiner = Joiner(node.home, me, wanted, self.config, node.net, self.clock.now)  # type: ignore[arg-type]  # its wake needs no descriptor
            return
        node.runs += 1
        world = World(
            net=node.net,  # type: ignore[arg-type]  # its wake needs no descriptor
            clock=self.clock.now,
            now=lambda: 1_700_000_000.0 + self.clock.at + node.clock_off_s,
            chance=self.chance,
            apart=lambda work: work(),
            rest=lambda _: None,
        )
        node.stack = ExitStack()
        node.member = node.stack.enter_context(
            opened(node.home, self.config, run=f"{node.name}.{node.runs}", note=self._ear(node), world=world)
        )
        self.say(node, "start", {})

    def _ear(self, node: Node) -> Callable[..., None]:
        return lambda event, **fields: self.say(node, event, fields)

    def crash(self, node: Node) -> None:
        """A power cut: what was not synced is gone, but for a torn piece of it, perhaps."""
        member = node.member
        assert member is not None
        self.say(node, "crash", {"at": self.faults.last})
        torn = torn_write(member.epoch.journal, self.chance)
        left = power.cut_off(member.state, self.chance)
        # What it has sent is on its way all the same; the others notice at once, or a little later.
        self.end(node, at_once=self.chance.random() < 0.3)
        if left[0].exists():
            power.leave(left)
        if torn is not None:
            with torn[0].open("r+b") as file:
                file.seek(torn[1])
                file.write(torn[2])

    def end(self, node: Node, *, at_once: bool = True) -> None:
        """The process is gone; the keeper starts it again after a while."""
        self.stop(node, at_once=at_once)
        node.up_at = self.clock.at + self.chance.choice([0.05, 0.5, 3.0])

    def stop(self, node: Node, *, at_once: bool = True) -> None:
        self.witness.forget(node.name)
        node.halfway = False
        stack, joiner, net = node.stack, node.joiner, node.net
        node.stack = node.member = node.net = node.joiner = None
        if stack is not None:
            stack.close()
        if joiner is not None:
            joiner.close()
        if net is not None:
            net.close()
        if at_once:
            self._cut_off(node)

    def _cut_off(self, node: Node) -> None:
        for other in self.all:
            if other != node.name:
                self.switch.break_(node.name, other)

    def pause(self, node: Node, seconds: float) -> None:
        assert node.net is not None
        node.paused_until = self.clock.at + seconds
        node.net.paused = True

    def say(self, node: Node, event: str, fields: dict[str, Any]) -> None:
        if self.trace:
            print(f"{self.clock.at:10.4f} {node.name} {event} {fields}")
        if event == "no_longer_a_member":
            node.gone = True
        if event == "peer_was_refused" and "is no member" not in fields["why"]:
            raise Failed(f"{node.name} refuses {fields['peer']}: {fields['why']}")
