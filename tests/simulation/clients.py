"""Clients of a schedule: a few at once, each asks any member and insists; what they were told is checked at the end.

Every write has a text of its own, so that it can be found in the rows. What was answered before another began comes before it
(linearizability of a single register of the log's order: Herlihy and Wing, 1990).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from simulation.nodes import Nodes
from simulation.switch import Clock
from simulation.witness import Failed
from slum.errors import SlumError
from slum.ledger.commands import Barrier, NoteEvent, Proposal, Record, Rejected, Result

AT_ONCE = 3
AGAIN_S = 1.5
"""Longer than the slowest answer of a member that hears a leader."""
REFUSED_S = 0.1


@dataclass
class Op:
    """One write or barrier of a client. *seq* once it is answered."""

    proposal: Proposal
    text: str
    began_at: float
    asked: str = ""
    """The member that it was given to last; "" once that has refused it."""
    asked_at: float = 0.0
    again_at: float = 0.0
    seq: int = 0
    done_at: float = 0.0


class Clients:
    def __init__(self, nodes: Nodes, clock: Clock, chance: random.Random) -> None:
        self._nodes = nodes
        self._clock = clock
        self._chance = chance
        self.all: list[Op] = []
        self.open: list[Op] = []
        self.calm = False
        """No new ones are begun."""
        self._pause_s = chance.choice([0.05, 0.2, 0.5])
        self._next_at = 0.0

    def require_answers(self, within_s: float, *, deaf: str) -> None:
        """Raise Failed when somebody waits for longer than *within_s* at a member other than *deaf*."""
        for op in self.open:
            if op.asked not in ("", deaf) and self._clock.at - op.asked_at > within_s:
                raise Failed(f"{op.text or 'a barrier'} was not answered in {within_s} s by {op.asked}")

    def work(self) -> None:
        now = self._clock.at
        for op in [op for op in self.open if now >= op.again_at]:
            self._ask(op)
        if self.calm or now < self._next_at:
            return
        self._next_at = now + self._pause_s * self._chance.random()
        for _ in range(self._chance.randint(0, AT_ONCE - len(self.open))):
            request_id = f"{self._chance.getrandbits(128):032x}:0"
            text = "" if self._chance.random() < 0.15 else str(len(self.all))
            command = (
                Barrier() if not text else Record(events=(NoteEvent(kind="noted", subject="x:y", at=1.0, why=text),))
            )
            op = Op(Proposal(command=command, request_id=request_id, actor="t"), text, now)
            self.all.append(op)
            self.open.append(op)
            self._ask(op)

    def _ask(self, op: Op) -> None:
        op.again_at = self._clock.at + AGAIN_S
        alive = self._nodes.alive
        if not alive:
            return
        node = self._chance.choice(alive)
        member = node.member
        assert member is not None
        op.asked, op.asked_at = node.name, self._clock.at

        def take(answer: Result | SlumError) -> None:
            if isinstance(answer, SlumError):
                if op.asked == node.name:
                    op.asked = ""
                    op.again_at = self._clock.at + REFUSED_S
                return
            if isinstance(answer, Rejected):
                raise Failed(f"{op.text}: {answer}")
            if op in self.open:
                self.open.remove(op)
                op.seq, op.done_at = answer.seq, self._clock.at
                if member.shown < answer.seq:
                    raise Failed(f"{op.text or 'a barrier'} was answered before its member's state.db had it")

        try:
            member.proposer.submit(op.proposal, take, seq=member.position.seq)
        except SlumError:
            return
        member.wake.set()

    # --- the end -----------------------------------------------------------------------------------------------------

    def check(self, texts: tuple[str, ...]) -> None:
        """*texts* are what the ledger holds in the end, in order: everything that was answered, once, in its place."""
        wanted = {op.text for op in self.all if op.text}
        if len(texts) != len(set(texts)):
            raise Failed("something was written twice")
        if set(texts) != wanted:
            raise Failed(f"lost or invented: {sorted(wanted ^ set(texts))[:10]}")
        highest = at = 0
        ends = sorted((op for op in self.all if op.done_at), key=lambda op: op.done_at)
        for op in sorted(self.all, key=lambda op: op.began_at):
            while at < len(ends) and ends[at].done_at < op.began_at:
                highest = max(highest, ends[at].seq)
                at += 1
            if op.seq < highest or (op.text == "" and op.seq <= highest and highest):
                raise Failed(f"{op.text or 'a barrier'} at {op.seq} began after {highest} was answered")
