"""The join operator: machines that somebody else makes and that join by themselves (Terraform's, an image's, yours).

It makes nothing and destroys nothing. A machine is there as soon as the fleet wants it, so that `slum token new node` can
make its token; one that the fleet gives up is told to run nothing, and its certificate opens nothing any more.
"""

from __future__ import annotations

from slum.operators.base import Deadlines, Machine, MachineSpec
from slum.operators.local import Site


class Join:
    deadlines = Deadlines(observe_s=5.0, create_s=5.0, destroy_s=5.0)

    def __init__(self, site: Site) -> None:
        self._site = site

    def machine_id(self, spec: MachineSpec) -> str:
        return f"node:{spec.key}"

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        """Return what the ledger holds as ours: there is nobody else to ask."""
        return tuple(
            Machine(id=one.id, cluster=cluster, key=one.key, machine=one.machine, tenement=one.tenement)
            for one in self._site.held
            if one.id == f"node:{one.key}"
        )

    async def create(self, spec: MachineSpec) -> Machine:
        return Machine(
            id=self.machine_id(spec),
            cluster=spec.cluster,
            key=spec.key,
            machine=spec.machine,
            tenement=spec.tenement,
        )

    async def destroy(self, machine_id: str) -> None:
        """Nothing is to be done: the one who made the machine takes it away."""
