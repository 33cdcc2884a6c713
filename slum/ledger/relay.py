"""Proposals at a member that does not lead: sent on to the one that does, or refused when no majority is in reach.

Any member's process takes proposals, so that nobody outside has to follow the leader. What is sent on stays in flight
here until it comes back as a committed entry of the log, applied on this member: so an answer given here is visible
in the state.db beside it. Lost or late, it is sent again; the request id makes that safe. One batch is in flight at a time,
which keeps a caller's order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from slum.errors import BY_CODE, QuorumLost, SlumError
from slum.ledger.commands import Proposal
from slum.ledger.peerwire import Message, Relay, RelayRefused
from slum.ledger.proposer import Answer, Proposer

AGAIN_S = 2.0
PAUSE_S = 0.05
NOT_LEADER = "not_leader"


class Relays:
    """Both sides of relaying for one member."""

    def __init__(self, proposer: Proposer, *, post: Callable[[str, Message], None], clock: Callable[[], float]) -> None:
        self._proposer = proposer
        self._post = post
        self._clock = clock
        self._sent_at = 0.0
        self._not_before = 0.0
        self._told: deque[tuple[str, RelayRefused]] = deque()
        """Filled by whichever thread hands out answers."""
        self._from_others: set[str] = set()
        """Request ids that were relayed to us and are not answered yet."""
        self._urgent = False

    def send(self, leader: str) -> None:
        """Send the next batch to *leader*, or the same again when its answer is late."""
        now = self._clock()
        if self._proposer.in_flight and now - self._sent_at > AGAIN_S:
            self._proposer.put_back()
        if self._proposer.in_flight or now < self._not_before:
            return
        batch = self._proposer.take_batch()
        if batch:
            self._sent_at = now
            self._post(leader, Relay(proposals=batch))

    def refuse_all(self, reached: int, members: int) -> None:
        """Answer everything that waits: nothing can be committed from here now."""
        self._proposer.put_back()
        if self._proposer.queued:
            error = QuorumLost(
                f"{reached} of {members} members of the ledger are in reach, a majority is needed to change anything",
                hint="nothing new is committed from here; bring members back, then repeat with the same request id",
            )
            self._proposer.take_batch(lambda _: error)

    def on_relay(self, peer: str, message: Relay, *, leads: bool, seq: int) -> None:
        """Take what *peer* sent on to us."""
        if not leads:
            ids = tuple(proposal.request_id for proposal in message.proposals)
            self._post(peer, RelayRefused(request_ids=ids, code=NOT_LEADER, message=""))
            return
        for proposal in message.proposals:
            take = self._teller(peer, proposal.request_id)
            try:
                self._proposer.submit(proposal, take, seq=seq)
            except SlumError as error:
                take(error)

    def applied(self, proposals: Sequence[Proposal]) -> None:
        """Take note that *proposals* are committed: somebody may wait at another member until that one hears it too."""
        if self._from_others and any(proposal.request_id in self._from_others for proposal in proposals):
            self._urgent = True

    def take_urgent(self) -> bool:
        """Tell, once, whether others should hear at once what is committed."""
        urgent, self._urgent = self._urgent, False
        return urgent

    def tell(self) -> None:
        """Send the refusals of what was relayed to us."""
        while self._told:
            self._post(*self._told.popleft())

    def on_refused(self, message: RelayRefused) -> None:
        if message.code == NOT_LEADER:
            self._not_before = self._clock() + PAUSE_S
            self._proposer.put_back()
        else:
            error = BY_CODE.get(message.code, SlumError)(message.message, hint=message.hint)
            self._proposer.refuse(message.request_ids, error)

    def _teller(self, peer: str, request_id: str) -> Callable[[Answer], None]:
        self._from_others.add(request_id)

        def tell(answer: Answer) -> None:
            self._from_others.discard(request_id)
            # Results need no word: the entry that holds them is on its way to every member.
            if isinstance(answer, SlumError):
                refused = RelayRefused(
                    request_ids=(request_id,), code=answer.code, message=answer.message, hint=answer.hint
                )
                self._told.append((peer, refused))

        return tell
