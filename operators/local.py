"""The local operator: the machine that a member runs on, one tenement a machine. Its provider is the keeper.

Creating writes the agent's identity and makes sure that the keeper has the agent; destroying removes both. The identity
file is the label: it names cluster, key, tenement and machine, and an identity of another cluster is taken over, since a
control plane that was begun anew is the machine's owner. Services are never touched here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path

import msgspec

from slum.errors import OperatorError, Unreachable
from slum.frozen import Frozen
from slum.node.keeperclient import Child, KeeperClient, KeeperError
from slum.node.types import Spawn
from slum.operators.base import Deadlines, Held, Machine, MachineSpec
from slum.operators.ssh_hosts import FreeHosts, KeyBook
from slum.paths import Home

STOP_S = 10.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What operators need to know of the member that calls them: its folders, its id, how its agent is started."""

    home: Home
    member: str
    agent: Spawn
    fence: tuple[int, ...] = ()
    """Of the leader that calls, larger than those of all before it; hosts refuse an older one's steps."""
    held: tuple[Held, ...] = ()
    """What the ledger knew when the operator was made."""
    alive: frozenset[str] = frozenset()
    """The keys of machines whose agents are connected: these need not be looked for."""
    free: FreeHosts | None = None
    """What is remembered of hosts without a machine from one look to the next."""
    keys: KeyBook | None = None
    """Who knows the keys of hosts with SSH; without one each member's own file."""


class Identity(Frozen):
    """The identity file. The agent reads *tenement* (its machine's name in the fleet) and *machine*."""

    tenement: str
    machine: str
    cluster: str = ""
    key: str = ""
    of: str = ""
    """The [tenement.X] that the machine is one of."""


class Local:
    deadlines = Deadlines(observe_s=5.0, create_s=15.0, destroy_s=30.0)

    def __init__(self, site: Site) -> None:
        self._site = site
        self._id = f"local:{site.member}"

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        found = _read(self._site.home.identity)
        if found is None or found.cluster != cluster or found.machine != self._id:
            return ()
        return (Machine(id=self._id, cluster=cluster, key=found.key, machine=found.tenement, tenement=found.of),)

    async def create(self, spec: MachineSpec) -> Machine:
        identity = Identity(
            tenement=spec.machine, machine=self._id, cluster=spec.cluster, key=spec.key, of=spec.tenement
        )
        before = _read(self._site.home.identity)
        if before is not None and before.cluster == spec.cluster and before.key != spec.key:
            raise OperatorError(
                f"this machine is {before.tenement!r} of the fleet already, and holds one tenement",
                hint="it is given up first; see `slum status`",
            )
        if before != identity:
            _write(self._site.home.identity, identity)
        try:
            async with await KeeperClient.connect(self._site.home) as keeper:
                await self._ensure_agent(keeper, restart=before not in (None, identity))
        except (Unreachable, KeeperError) as error:
            raise OperatorError(f"the agent cannot be started: {error.message}", hint=error.hint) from error
        return Machine(id=self._id, cluster=spec.cluster, key=spec.key, machine=spec.machine, tenement=spec.tenement)

    async def destroy(self, machine_id: str) -> None:
        found = _read(self._site.home.identity)
        if found is not None and found.machine != machine_id:
            return
        self._site.home.identity.unlink(missing_ok=True)
        try:
            async with await KeeperClient.connect(self._site.home) as keeper:
                await self._stop_agent(keeper)
        except (Unreachable, KeeperError) as error:
            raise OperatorError(f"the agent cannot be stopped: {error.message}", hint=error.hint) from error

    async def _ensure_agent(self, keeper: KeeperClient, *, restart: bool) -> None:
        """Make sure that the agent runs and has read the identity of now."""
        agent = await self._agent(keeper)
        if agent is not None and agent.running:
            if restart:
                await keeper.signal(agent.name, signal.SIGTERM)
            return
        try:
            await keeper.spawn(self._site.agent)
        except KeeperError as error:
            # Between two lives of its own: the keeper starts it again by itself.
            if error.kind != "exists":
                raise

    async def _stop_agent(self, keeper: KeeperClient) -> None:
        name = self._site.agent.name
        agent = await self._agent(keeper)
        if agent is None:
            return
        await keeper.stop_respawn(name)
        end = asyncio.get_running_loop().time() + STOP_S
        signum = signal.SIGTERM
        while (agent := await self._agent(keeper)) is not None and agent.running:
            try:
                await keeper.signal(name, signum)
            except KeeperError as error:
                if error.kind != "missing":
                    raise
            while (agent := await self._agent(keeper)) is not None and agent.running:
                if asyncio.get_running_loop().time() > end:
                    signum, end = signal.SIGKILL, end + STOP_S
                    break
                await asyncio.sleep(POLL_S)
        if agent is not None:
            await keeper.forget(name)

    async def _agent(self, keeper: KeeperClient) -> Child | None:
        return next((child for child in await keeper.list_children() if child.name == self._site.agent.name), None)


def _read(path: Path) -> Identity | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Identity)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, OSError) as error:
        raise OperatorError(f"{path} cannot be read: {error}", hint="remove it; it is written anew") from error


def _write(path: Path, identity: Identity) -> None:
    """Put *identity* in place whole or not at all, 0600, on disk when this returns."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(msgspec.json.encode(identity))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OperatorError(f"{path} cannot be written: {error.strerror or error}") from error
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
