"""Between PySyncObj and the members' connections: translates, filters, and corrects what is unsafe in its messages.

Out: the journal is synced before any message leaves (Raft: persist before answering), but for a leader's new entries, which
it writes while they travel: it counts itself only once they are on its disk (Ongaro's thesis, 2014, section 10.2.1). Four
message types pass, each with the place and the sender's term. In: what is of another epoch or term is dropped, appends are fitted to the log
(overlap.py), a peer's vote counts once a term, and a sender of an older term is told so instead of being ignored. One Wire
serves one group; connections outlive it. All in the ledger's one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from slum.errors import invariant
from slum.ledger.election import Election
from slum.ledger.group import Group, Node, Transport
from slum.ledger.journal import Journal
from slum.ledger.later import Later
from slum.ledger.overlap import Fitted, fit
from slum.ledger.peerwire import (
    Append,
    AskPreVote,
    AskVote,
    HigherTerm,
    Message,
    NextIndex,
    OfEpoch,
    Place,
    PreVote,
    Raft,
    Tail,
    Vote,
)

Post = Callable[[str, Message], None]


class NoPeers(Transport):  # type: ignore[misc]  # PySyncObj has no types
    """The transport of a group of one: always ready, and never asked to send."""

    def __init__(self) -> None:
        super().__init__(None, None, ())

    def send(self, node: Any, message: Any) -> bool:
        invariant(False, f"a group of one sends nothing, but had {message.get('type')!r} for {node}")
        return False


class Wire(Transport):  # type: ignore[misc]  # PySyncObj has no types
    """The transport of one epoch's group."""

    def __init__(
        self,
        *,
        place: Place,
        peers: Collection[str],
        journal: Journal,
        election: Election,
        post: Post,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(None, None, ())
        self.place = place
        self._nodes = {peer: Node(peer) for peer in peers}
        self._journal = journal
        self._election = election
        self._post = post
        self._clock = clock
        self._group: Group | None = None
        self._up: set[str] = set()
        self._fitted: Fitted | None = None
        self._feeding = False
        self._votes: tuple[int, set[str]] = (0, set())
        self._acknowledged: dict[str, tuple[int, int]] = {}
        """(index, term) of the newest entry that each has said to hold."""
        self._later = Later()
        # As they stand for election when the leader is gone: whoever comes first then lacks nothing.
        self._preferred = sorted(peers)
        self.told: tuple[float, int] | None = None
        """When a leader said that how much is committed; whoever has applied that takes it away."""

    def attach(self, group: Group) -> None:
        self._group = group

    @property
    def group(self) -> Group:
        invariant(self._group is not None, "a wire was used before its group was made")
        assert self._group is not None
        return self._group

    @property
    def reaches_majority(self) -> bool:
        """Enough members are connected and in this epoch to elect somebody."""
        return len(self._up) + 1 > (len(self._nodes) + 1) / 2

    def up(self, peer: str) -> None:
        """*peer* is connected and in this epoch."""
        if peer in self._nodes and peer not in self._up:
            self._up.add(peer)
            self._election.found_leader(peer, self._clock())
            self._onNodeConnected(self._nodes[peer])

    def down(self, peer: str) -> None:
        if peer in self._up:
            self._up.discard(peer)
            if self.group.leader == peer:
                others = sorted({self.group.selfNode.id, *self._nodes} - {peer})
                self._election.lost_leader(peer, self._clock(), others.index(self.group.selfNode.id))
            self._onNodeDisconnected(self._nodes[peer])

    def acknowledged(self, peer: str) -> int:
        """Return the highest committed index that *peer* has said to us, its leader, to hold in this epoch."""
        return min(self._held(peer), self.group.commit)

    def _held(self, peer: str) -> int:
        index, term = self._acknowledged.get(peer, (0, 0))
        # A later leader may have replaced what was not committed, in its log and in ours.
        is_ours = 0 < index <= len(self._journal) and self._journal.term_of(index) == term
        return index if is_ours else 0

    # --- out ---------------------------------------------------------------------------------------------------------

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        """Called by PySyncObj, from inside a tick or while it takes a message."""
        translated = self._translate(message)
        if translated is None or node.id not in self._up or self._feeding:
            return False
        if not isinstance(translated, Append) or self._journal.promises:
            self._journal.sync()
        self._post(node.id, translated)
        return True

    def spares(self) -> Collection[str]:
        """Return whom the newest entries are not sent now: a majority will have them without, as far as we know.

        Who is needed stays so until it lags.
        """
        group, size_bytes = self.group, self._journal.size_bytes
        self._preferred.sort(key=lambda name: name not in self._up or group.acknowledged(name) < group.commit)
        found = self._preferred[(len(self._nodes) + 1) // 2 :]
        if self._later.is_much(size_bytes):
            found = []
        if found:
            self._later.owe(len(self._journal), size_bytes, self._clock())
        else:
            self._later.settle()
        return found

    @property
    def due_at(self) -> float:
        """When tick() has something to send."""
        return self._later.due_at(self.group.commit)

    def tick(self) -> None:
        """Let the spares have what has waited long enough."""
        if self._clock() >= self.due_at:
            self._later.settle()
            self.group.send_missing()

    def _translate(self, message: dict[str, Any]) -> Raft | None:
        term = self.group.term
        match message["type"]:
            case "append_entries" if "entries" in message:
                return Append(
                    place=self.place,
                    term=message["term"],
                    commit=message["commit_index"],
                    prev_index=message["prevLogIdx"],
                    prev_term=message["prevLogTerm"],
                    entries=tuple(message["entries"]),
                )
            case "next_node_idx":
                next_index, success = message["next_node_idx"], message["success"]
                if self._fitted is not None:
                    next_index = self._fitted.next
                    invariant(success == self._fitted.matches, "PySyncObj found another match than the log's")
                return NextIndex(place=self.place, term=term, next=next_index, reset=message["reset"], success=success)
            case "request_vote":
                return AskVote(
                    place=self.place,
                    term=message["term"],
                    last_index=message["last_log_index"],
                    last_term=message["last_log_term"],
                )
            case "response_vote":
                self._election.voted(self._clock())
                return Vote(place=self.place, term=message["term"])
            case _:
                # Snapshots and forwarded commands are not its business here.
                return None

    # --- in ----------------------------------------------------------------------------------------------------------

    def take(self, peer: str, message: OfEpoch) -> None:
        """Take a message of this epoch from *peer*, which is up."""
        group, now = self.group, self._clock()
        if peer not in self._up:
            return
        match message:
            case HigherTerm():
                if message.term > group.term:
                    self._raise_term(peer, message.term)
            case AskPreVote():
                if message.term < group.term:
                    self._post(peer, HigherTerm(place=self.place, term=group.term))
                elif self._election.would_vote(
                    message, now, leads=group.leads, term=group.term, last=self._journal.last
                ):
                    self._post(peer, PreVote(place=self.place, round=message.round))
            case PreVote():
                self._election.granted(peer, message)
            case Append():
                if message.term < group.term:
                    self._post(peer, HigherTerm(place=self.place, term=group.term))
                else:
                    self._election.heard_leader(now)
                    self.told = self.told or (now, message.commit)
                    self._append(peer, message)
            case NextIndex():
                if message.term == group.term and group.leads:
                    self._take_next(peer, message)
            case AskVote():
                self._onMessageReceived(
                    self._nodes[peer],
                    {
                        "type": "request_vote",
                        "term": message.term,
                        "last_log_index": message.last_index,
                        "last_log_term": message.last_term,
                    },
                )
            case Vote():
                self._take_vote(peer, message)

    def feed(self, peer: str, tail: Tail) -> None:
        """Take committed entries of this epoch from *peer*, whoever leads; the answer goes nowhere."""
        group = self.group
        # Who leads this epoch while others have left it leads nobody; a higher term ends that.
        term = max(group.term + group.leads, tail.entries[-1][2] if tail.entries else 0)
        message = Append(
            place=self.place,
            term=term,
            commit=tail.prev_index + len(tail.entries),
            prev_index=tail.prev_index,
            prev_term=tail.prev_term,
            entries=tail.entries,
        )
        self._feeding = True
        try:
            self._append(peer, message)
        finally:
            self._feeding = False

    def _append(self, peer: str, message: Append) -> None:
        group = self.group
        invariant(not (group.leads and message.term == group.term), f"{peer} leads term {group.term} too")
        fitted = fit(message, self._journal, group.commit)
        given = fitted.message
        self._fitted = fitted
        try:
            self._onMessageReceived(
                self._nodes.get(peer, Node(peer)),
                {
                    "type": "append_entries",
                    "term": given.term,
                    "commit_index": given.commit,
                    "prevLogIdx": given.prev_index,
                    "prevLogTerm": given.prev_term,
                    "entries": given.entries,
                },
            )
        finally:
            self._fitted = None

    def _take_next(self, peer: str, message: NextIndex) -> None:
        end = len(self._journal)
        if not 2 <= message.next <= end + 1:
            # What was acknowledged in this term is not beyond our log; nothing below 2 was ever replaced.
            return
        sent = self.group.next_of(peer)
        if message.success:
            index = max(self._held(peer), message.next - 1)
            self._acknowledged[peer] = (index, self._journal.term_of(index))
        self._onMessageReceived(
            self._nodes[peer],
            {
                "type": "next_node_idx",
                "next_node_idx": message.next,
                "reset": message.reset,
                "success": message.success,
            },
        )
        if message.success and not message.reset:
            # PySyncObj would send again what is on its way behind that. What is lost there is asked for, with reset.
            self.group.go_on_from(peer, max(sent, message.next))

    def _take_vote(self, peer: str, message: Vote) -> None:
        if message.term != self.group.term:
            return
        term, voters = self._votes
        if term != message.term:
            term, voters = self._votes = (message.term, set())
        if peer not in voters:
            voters.add(peer)
            self._onMessageReceived(self._nodes[peer], {"type": "response_vote", "term": message.term})

    def _raise_term(self, peer: str, term: int) -> None:
        """Move to *term* without voting: a request of somebody whose log is shorter than any."""
        self._onMessageReceived(
            self._nodes[peer], {"type": "request_vote", "term": term, "last_log_index": 0, "last_log_term": -1}
        )
