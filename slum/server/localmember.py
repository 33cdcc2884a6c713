"""The local operator of another member's machine: the leader decides, that member's own server makes and destroys.

Each verb is one errand and carries the leader's (generation, epoch, term), so that one who leads no more is not obeyed.
"""

from __future__ import annotations

from slum.errors import OperatorError, SlumError
from slum.operators.base import Machine, MachineSpec
from slum.operators.local import Local
from slum.server import memberwire
from slum.server.relay import Relay


class LocalOfMember:
    """An Operator."""

    deadlines = Local.deadlines

    def __init__(self, relay: Relay, member: str, fence: memberwire.Fence) -> None:
        self._relay = relay
        self._member = member
        self._fence = fence

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        asked = memberwire.Observe(cluster=cluster, fence=self._fence)
        return (await self._call(asked, self.deadlines.observe_s)).machines

    async def create(self, spec: MachineSpec) -> Machine:
        asked = memberwire.Create(spec=spec, fence=self._fence)
        return (await self._call(asked, self.deadlines.create_s)).machines[0]

    async def destroy(self, machine_id: str) -> None:
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
