"""Local machines of members: whose machine an operator means, and how the leader has another member's made and destroyed.

The leader decides, that member's own server acts. Each verb is one errand and carries the leader's (generation, epoch, term), so that one who leads no more is not obeyed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slum.errors import OperatorError, SlumError
from slum.ledger.reader import MachineRow
from slum.model import LocalOperator
from slum.operators.base import Machine, MachineSpec
from slum.operators.local import Local
from slum.server import memberwire
from slum.server.relay import Relay

LOCAL = "local:"


def member_of(definition: LocalOperator, rows: Iterable[MachineRow], members: Sequence[str]) -> str:
    """Return the member whose machine *definition* means: the named one, else the one it has had, else the only one; or ""."""
    if definition.member is not None:
        return definition.member
    for row in rows:
        if row.operator == definition.name and row.state != "destroyed" and row.machine_id.startswith(LOCAL):
            return row.machine_id.removeprefix(LOCAL)
    return members[0] if len(members) == 1 else ""


class LocalOfMember:
    """An Operator: the machine of *member*, asked of its server over *relay*.

    A member that was removed has no machine any more, and takes none.
    """

    deadlines = Local.deadlines

    def __init__(self, relay: Relay, member: str, fence: memberwire.Fence) -> None:
        self._relay = relay
        self._member = member
        self._fence = fence

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        if not self._relay.knows(self._member):
            return ()
        asked = memberwire.Observe(cluster=cluster, fence=self._fence)
        return (await self._call(asked, self.deadlines.observe_s)).machines

    async def create(self, spec: MachineSpec) -> Machine:
        asked = memberwire.Create(spec=spec, fence=self._fence)
        return (await self._call(asked, self.deadlines.create_s)).machines[0]

    async def destroy(self, machine_id: str) -> None:
        if not self._relay.knows(self._member):
            return
        await self._call(memberwire.Destroy(machine_id=machine_id, fence=self._fence), self.deadlines.destroy_s)

    async def _call(self, asked: memberwire.AnyAsk, deadline_s: float) -> memberwire.Answer:
        try:
            return await self._relay.call(self._member, asked, deadline_s)
        except OperatorError:
            raise
        except SlumError as error:
            raise OperatorError(
                f"the member {self._member} cannot be asked for its machine: {error.message}", hint=error.hint
            ) from error
