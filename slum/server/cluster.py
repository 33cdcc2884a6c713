"""How the control plane stands, and changes of who its members are: what is behind `slum status --cluster` and `slum server`.

What is shown is this member's own knowledge and says its age. A change is made by the leader's ledger; any member's server
passes it there. Who left loses its certificate, and the authority's key is sealed to those that stay.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from slum import api, log
from slum.errors import ConfigError, Conflict, QuorumLost, SlumError, Unreachable
from slum.ledger import changes, clocks
from slum.ledger.client import change_members
from slum.ledger.commands import Member, Revoke, new_request_id
from slum.ledger.status import DOWN, FOLLOWER, LEADER
from slum.server import trust
from slum.server.memberwire import Change

if TYPE_CHECKING:
    from slum.server.control import Control

CHANGE_S = 65.0
"""A little more than the ledger's own patience."""
LOOK_S = 30.0
ADD_S = 300.0
AGAIN_S = 0.5
REMOVED = "removed"
REMOVED_HINT = "`slum server leave` ends it here, `slum server join` with a new token makes it a new member"


async def cluster_view(control: Control) -> api.ClusterView:
    """Return how all members stand, as this one knows."""
    status = await control.link.status()
    rows = {row.id: row for row in await control.link.members()}
    ends = _certificate_ends(control)
    now = time.time()
    return api.ClusterView(
        member=status.member,
        cluster=status.cluster,
        role=status.role,
        leader=status.leader,
        generation=status.generation,
        epoch=status.epoch,
        term=status.term,
        seq=status.seq,
        age_s=round(status.age_s, 3),
        majority=status.majority,
        protocol=status.protocol,
        members=tuple(
            api.ClusterMember(
                id=member.id,
                role=member.role,
                address=member.address,
                api=rows[member.id].api if member.id in rows else "",
                epoch=member.epoch,
                seq=member.seq,
                lag=member.lag,
                contact_s=None if member.contact_s is None else round(member.contact_s, 3),
                clock_off_s=None if member.clock_off_s is None else round(member.clock_off_s, 3),
                protocol=member.protocol,
                certificate_s=None if member.id not in ends else round(ends[member.id] - now, 1),
                followed=member.id == control.me or member.id in control.relay.up,
            )
            for member in status.members
            if member.id in rows or member.role != DOWN  # one that left and is gone is nobody's business
        ),
        alarms=_removed(control, rows, status.majority)
        or tuple(
            api.ClusterAlarm(kind=one.kind, member=one.member, why=one.why, hint=one.hint) for one in status.alarms
        ),
    )


def _removed(control: Control, members: Collection[str], majority: bool) -> tuple[api.ClusterAlarm, ...]:
    """Say that this member is none any more, if so: then nothing else of what its ledger misses matters.

    One that was away meanwhile may hear it from the others' fronts alone: to their ledgers it is a stranger.
    """
    refusing = ", ".join(sorted(control.relay.refusing))
    if control.me not in members:
        why = "it is none of the members: it was removed while it was away, or has not been let in yet"
    elif refusing and not majority:
        why = f"{refusing} take it for no member any more: it was removed while it was away"
    else:
        return ()
    return (api.ClusterAlarm(kind=REMOVED, member=control.me, why=why, hint=REMOVED_HINT),)


async def time_of_members(control: Control) -> float | None:
    """Return the time by this member's clock, put right by the others' where theirs show that it is wrong (unix seconds).

    None while too few clocks are known, or two differ and nobody can tell which is right.
    """
    status = await control.link.status()
    members = {row.id for row in await control.link.members()}
    offsets = {
        one.id: one.clock_off_s
        for one in status.members
        if one.id in members and one.id != status.member and one.clock_off_s is not None
    }
    if len({status.member, *offsets}) * 2 <= len(members) or clocks.differ(offsets, status.member):
        return None
    return time.time() - clocks.wrong(offsets, status.member).get(status.member, 0.0)


def _certificate_ends(control: Control) -> dict[str, float]:
    """Return when each member's newest certificate that is not revoked ends."""
    ends: dict[str, float] = {}
    for row in control.view.reader.certificates():
        kind, _, name = row.subject.partition("/")
        if kind == "member" and not row.revoked_at:
            ends[name] = max(ends.get(name, 0.0), row.not_after)
    return ends


async def change(control: Control, add: Member | None, remove: str | None) -> tuple[Member, ...]:
    """Add or remove one member, at the leader, and return who votes then. May be repeated: what is so already is success."""
    members = await control.link.members()
    if add is not None and add in members:
        return members
    if remove is not None and all(row.id != remove for row in members):
        return members
    leader = (await control.link.leader()).member
    if leader is None:
        raise QuorumLost(
            "nobody leads: the members cannot be changed", hint="`slum status --cluster` shows who is there"
        )
    if leader != control.me:
        return (await control.relay.call(leader, Change(add=add, remove=remove), CHANGE_S + 5.0)).members
    return await change_here(control, Change(add=add, remove=remove))


async def change_here(control: Control, asked: Change) -> tuple[Member, ...]:
    """Make a change of the members at this member, which leads; QuorumLost, naming the leader, when it does not."""
    changed = await change_members(control.home.ledger_socket, add=asked.add, remove=asked.remove, deadline_s=CHANGE_S)
    names = [row.id for row in changed]
    log.get().info("members_changed", added=asked.add.id if asked.add else None, removed=asked.remove, members=names)
    return changed


def row_of(offer: api.MemberOffer) -> Member:
    """Return *offer* as a row of the members list."""
    return Member(**{name: getattr(offer, name) for name in offer.__struct_fields__})


async def check_addition(control: Control, row: Member) -> None:
    """Return when *row* can become a member, or is one; ConfigError when not. For who is about to let it in."""
    members = control.world().cluster.members
    if row in members:
        return
    why = changes.problem(changes.Change(add=row), members)
    if why:
        raise ConfigError(f"{row.id} cannot become a member: {why}", hint="choose another name with --member")
    # One that is gone may have had the address.
    there = {one.id for one in (await control.link.status()).members if one.role in (LEADER, FOLLOWER)}
    for other in members:
        if other.id in there and (other.address == row.address or other.api == row.api):
            raise ConfigError(
                f"{row.id} cannot be at {row.api}, ledger {row.address}: {other.id} is found there",
                hint="--address is how the others reach this machine",
            )


class Adding:
    """Those who were let in and shall become members: each is added once it has connected to the leader and is close behind.

    Kept in memory only: who joins asks again until it is a member.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._asked: asyncio.Queue[Member] = asyncio.Queue(64)
        self._under_way: set[Member] = set()

    def begin(self, row: Member) -> None:
        """Make *row* a member as soon as that can be. May be repeated."""
        if row not in self._under_way and not self._asked.full():
            self._under_way.add(row)
            self._asked.put_nowait(row)

    async def run(self) -> None:
        """Add who was let in, until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                row = await self._asked.get()
                group.create_task(self._add(row), name=f"add {row.id}")

    async def _add(self, row: Member) -> None:
        end = time.monotonic() + ADD_S
        try:
            while time.monotonic() < end:
                try:
                    await change(self._control, row, None)
                    return
                except (QuorumLost, Unreachable, Conflict) as error:
                    log.get().info("member_not_added_yet", member=row.id, why=error.message)
                    await asyncio.sleep(AGAIN_S)
        except SlumError as error:
            log.get().warning("member_not_added", member=row.id, why=error.message)
        finally:
            self._under_way.discard(row)


async def shut_out_who_left(control: Control) -> None:
    """Take from each that leaves what it could still use, where the leader is, until cancelled."""
    known: tuple[Member, ...] = ()
    gone: tuple[Member, ...] = ()
    while True:
        seen = control.committed.count
        try:
            members = control.world().cluster.members
            names = {member.id for member in members}
            gone = tuple(row for row in {*gone, *known} if row.id not in names)
            known = members
            leader = await control.link.leader() if gone else None
            if leader is not None and leader.is_self:
                await _shut_out(control, gone)
            if leader is not None and leader.member is not None:
                gone = ()
        except SlumError as error:
            log.get().warning("members_not_shut_out", why=error.message)
            await asyncio.sleep(AGAIN_S)
        await control.committed.wait(seen, LOOK_S)


async def _shut_out(control: Control, gone: tuple[Member, ...]) -> None:
    """Revoke the certificates of *gone*, and seal the authority's key without them.

    These open nothing any more in any case: the guard knows who the members are.
    """
    actor, reader = f"slum@{control.me}", control.view.reader
    subjects = {f"member/{row.id}" for row in gone}
    serials = [row.serial for row in reader.certificates() if row.subject in subjects and not row.revoked_at]
    for serial in serials:
        command = Revoke(serial=serial, why="it is no member any more")
        await control.commit(command, new_request_id(reader.seq()), actor)
    if reader.authority() is not None:
        drop = [row.recipient for row in gone if row.recipient]
        await trust.seal_to(control.link, reader, control.home, drop=drop, actor=actor)


def checked_removal(control: Control, member: str, *, by_itself: bool) -> None:
    """Raise Conflict when *member* would leave *by_itself* while a machine of the fleet is its own.

    One that is gone may be removed all the same; its machine goes with it.
    """
    if not by_itself:
        return
    local = f"local:{member}"
    held = [row.machine for row in control.world().machines.values() if row.machine_id == local]
    if held:
        raise Conflict(
            f"the machine of {member} is the tenement {held[0]!r} of the fleet",
            hint="take it out of slum.toml and apply that first; nothing was changed",
        )
