"""What must hold at every moment of a schedule, looked at from outside by somebody who sees all members.

Raft's safety properties (Ongaro and Ousterhout 2014, figure 3) and the ledger's own: one leader a term; what one member knows to
be committed is on the disks of a majority, and every later leader has it; nobody votes twice; entries are applied in one order, with one outcome; headers that take effect
never go back. Knows nothing of how the members come to it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from slum.ledger.applying import Applied
from slum.ledger.journal import Journal
from slum.ledger.member import Member
from slum.ledger.peerwire import NO_OP, Place

_SEAL = msgspec.msgpack.encode("Seal")


@dataclass
class Failed(Exception):
    """A schedule broke a promise; *why* says which."""

    why: str

    def __str__(self) -> str:
        return self.why


class Witness:
    def __init__(self) -> None:
        self.leaders: dict[tuple[Place, int], str] = {}
        self.changes: list[tuple[float, str]] = []
        """When another member than before began to lead, and who."""
        self._committed: dict[Place, list[tuple[int, int]]] = {}
        """(term, CRC of the command) of entries 1 and up."""
        self._committed_in: dict[Place, list[int]] = {}
        """For each of these the term of whoever was first seen to know: a leader of a lower term may lack it."""
        self._seen: dict[str, tuple[Place, int, bool]] = {}
        self._chains: dict[int, str] = {}
        self._fences: dict[int, tuple[int, int, int]] = {}
        self._disks: dict[str, tuple[Place, Sequence[int], int]] = {}
        """What each member's newest journal holds on disk: the terms of its entries, and its own."""
        self._acknowledged: dict[tuple[str, str], tuple[Place, int, int]] = {}
        self._ends: dict[Place, int] = {}
        """The first Seal of an epoch."""
        self._votes: dict[tuple[Place, int, str], str] = {}
        """(epoch, term, voter) -> whom, as far as it is on disk."""

    def synced(self, log: Journal) -> None:
        """What *log* holds is on disk."""
        name, place = log.path.parent.name, (log.identity.generation, log.identity.epoch)
        if name in self._disks and place < self._disks[name][0]:
            return
        self._disks[name] = (place, log._terms[:], log._vote.term)
        if log._vote.voted_for is not None:
            voted = self._votes.setdefault((place, log._vote.term, name), log._vote.voted_for)
            if voted != log._vote.voted_for:
                raise Failed(f"{name} voted for {voted} and {log._vote.voted_for} in term {log._vote.term} of {place}")

    def applied(self, applied: Applied) -> None:
        """An entry was applied by somebody."""
        at = applied.position
        if self._chains.setdefault(at.seq, at.chain) != at.chain:
            raise Failed(f"members differ about entry {at.seq}")
        if at.fence < self._fences.get(at.seq - 1, at.fence):
            raise Failed(f"entry {at.seq} of {at.fence} took effect after one of {self._fences[at.seq - 1]}")
        self._fences[at.seq] = at.fence

    def forget(self, name: str) -> None:
        """*name* has ended or begun anew."""
        self._seen.pop(name, None)

    def look(self, name: str, member: Member, now: float) -> None:
        """Look at *member* after it has done something."""
        epoch = member.epoch
        group, place = epoch.group, epoch.place
        leads, commit = group.leads, group.commit
        if leads:
            self._look_at_acknowledged(name, member)
        seen = self._seen.get(name)
        if seen == (place, commit, leads):
            return
        known = self._committed.setdefault(place, [])
        if leads and (seen is None or seen[0] != place or not seen[2]):
            self._elected(name, member, now)
        start = seen[1] if seen is not None and seen[0] == place else 0
        log = epoch.journal
        for index in range(start + 1, min(commit, len(log)) + 1):
            command, _, term = log.entry(index)
            if index > self._ends.get(place, index):
                # Behind the Seal nothing counts, whatever the group or a tail says of it.
                break
            if _SEAL in command:
                self._ends.setdefault(place, index)
            mark = (term, zlib.crc32(command))
            if len(known) < index:
                self._require_majority(index, term, name, member)
                known.append(mark)
                self._committed_in.setdefault(place, []).append(group.term)
            elif known[index - 1] != mark:
                raise Failed(f"{name} takes another entry {index} of {place} for committed than the others did")
        self._seen[name] = (place, commit, leads)

    def _look_at_acknowledged(self, name: str, member: Member) -> None:
        """What a leader takes for acknowledged is on the disk of whoever acknowledged it, and is the same.

        Unless that one has gone on to a later term: the leader of that may have replaced what was not committed, while the
        acknowledgement travelled.
        """
        epoch = member.epoch
        terms = epoch.journal._terms
        for peer in epoch.rows:
            index = epoch.group.acknowledged(peer)
            mark = (epoch.place, epoch.group.term, index)
            if self._acknowledged.get((name, peer)) == mark:
                continue
            self._acknowledged[name, peer] = mark
            at, held, term = self._disks.get(peer, (epoch.place, (), 0))
            if (
                at == epoch.place
                and term <= epoch.group.term
                and index > 1
                and list(held[:index]) != list(terms[:index])
            ):
                raise Failed(f"{name}, leading {epoch.place}, thinks that {peer} holds {index} entries of its log")

    def _require_majority(self, index: int, term: int, name: str, member: Member) -> None:
        """Raise Failed unless entry *index* is on enough disks; whoever is in a later epoch has had all of this one."""
        place = member.epoch.place
        group = {name, *member.epoch.rows} if member.epoch.is_member else set(member.epoch.rows)
        disks = {peer: self._disks[peer][:2] for peer in group if peer in self._disks}
        holding = [
            peer
            for peer, (at, terms) in disks.items()
            if at > place or (at == place and len(terms) >= index and terms[index - 1] == term)
        ]
        alone = len(group) == 1 and member.epoch.journal.entry(index)[0][0] == NO_OP
        # The first entry is everybody's from the start; a group of one may count its own no-op early, which nobody hears of.
        if len(holding) * 2 <= len(group) and index > 1 and not alone:
            raise Failed(
                f"{name} takes entry {index} of {place} for committed, but only {holding} of {len(group)} hold it"
            )

    def _elected(self, name: str, member: Member, now: float) -> None:
        epoch = member.epoch
        log, place, term = epoch.journal, epoch.place, epoch.group.term
        if epoch.wire is not None and self.leaders.setdefault((place, term), name) != name:
            raise Failed(f"term {term} of {place} is led by {self.leaders[place, term]} and {name}")
        group = {name, *epoch.rows}
        voters = [peer for peer in group if self._votes.get((place, term, peer)) == name]
        if len(voters) * 2 <= len(group) and len(group) > 1:
            raise Failed(f"{name} leads term {term} of {place} with the votes of {voters}, of {len(group)}")
        terms = self._committed_in.get(place, [])
        for index, ((found, crc), since) in enumerate(zip(self._committed[place], terms, strict=True), 1):
            if since >= term:
                continue
            if len(log) < index or log.term_of(index) != found or zlib.crc32(log.entry(index)[0]) != crc:
                raise Failed(f"{name} leads term {term} of {place} without the committed entry {index}")
        if not self.changes or self.changes[-1][1] != name:
            self.changes.append((now, name))
