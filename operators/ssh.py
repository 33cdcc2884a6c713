"""The ssh operator: hosts that are there already. A host holds one machine; creating bootstraps it, destroying frees it.

The label of a machine is the claim in /var/lib/slum/host.json on its host, which is read and written under a lock there
together with the leader's fencing token (bootstrap_hand.py). Which host a machine gets is known before the call, since
the machine's id names it. A host that does not answer is no reason for anything: what the ledger believes to be there is
still reported, so that nothing is made twice, and the other hosts go on.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import asyncssh

from slum.errors import OperatorError
from slum.model import SshHost, SshOperator
from slum.operators import naming
from slum.operators.base import Deadlines, Held, Machine, MachineSpec
from slum.operators.bootstrap import LOCK_S, Diary, Facts, Houses, Step, bring_up, check, look, steps, switch
from slum.operators.local import Site
from slum.operators.ssh_hand import Hand, working
from slum.operators.ssh_hosts import address_of, choose_host, host_in, key_file, machine_id
from slum.operators.ssh_link import Dialer
from slum.operators.wheelhouse import Wheelhouse

RESERVED_S = 60.0
"""How long a host stays promised to a machine whose intent is not seen in the ledger yet."""
LOOKS_MAX = 32
LOOK_S, LOOKS_S = 20.0, 45.0
"""For one host, and for all of them: what was not seen by then is believed to be as the ledger has it."""
FREE_S = 600.0
"""How long a host without a machine is not looked at again, give or take a half."""


class Promise(NamedTuple):
    host: str
    until: float


_RESERVED: dict[str, dict[str, Promise]] = {}
"""By cluster and key: promises of this process, which several objects of one operator share."""


CREATE_S = 300.0
"""What is not uploaded by then is at the next try; a longer one would keep the next leader waiting (docs/operators.md)."""


class Ssh:
    # Nothing has to settle: a host refuses a call to make what was destroyed there, however late it arrives.
    deadlines = Deadlines(observe_s=60.0, create_s=CREATE_S, destroy_s=240.0, settle_s=-CREATE_S)

    def __init__(
        self,
        definition: SshOperator,
        site: Site,
        *,
        houses: Houses | None = None,
        tell: Callable[[str, str, str], None] | None = None,
    ) -> None:
        """*tell* hears of each step on each host: (host, step, "" when it begins or what came of it)."""
        self._definition = definition
        self._site = site
        self._book = site.keys or key_file(site.home)
        self._houses = houses or Houses(site.home.data / "wheels")
        self._tell = tell
        self._hosts = {address_of(host, definition).id: host for host in definition.hosts}

    def machine_id(self, spec: MachineSpec) -> str:
        now = time.monotonic()
        promised = _RESERVED.setdefault(spec.cluster, {})
        for key, promise in list(promised.items()):
            if promise.until < now or (key == spec.key and promise.host not in self._hosts):
                del promised[key]
        known = self._taken(spec.cluster)
        taken = {key: promise.host for key, promise in promised.items()} | known
        host = choose_host(self._hosts, spec.key, taken)
        if spec.key not in known:
            promised[spec.key] = Promise(host, now + RESERVED_S)
        return machine_id(host, spec.cluster, spec.key)

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        """Look at the hosts that need it: an agent that is connected is its machine, a host that was free lately is so."""
        looks = asyncio.Semaphore(LOOKS_MAX)
        end = asyncio.get_running_loop().time() + LOOKS_S
        held = self._held(cluster)
        async with self._dialer() as dialer:

            async def one(name: str, host: SshHost) -> Machine | None:
                mine = held.get(name)
                if mine is not None and mine.key in self._site.alive:
                    return _as_held(mine, cluster)
                if mine is None and self._is_free(cluster, name):
                    return None
                try:
                    async with asyncio.timeout_at(end), looks, asyncio.timeout(LOOK_S):
                        async with self._hand(dialer, name, host) as hand:
                            found = _machine(name, cluster, await look(hand))
                except (OperatorError, TimeoutError):
                    return _as_held(mine, cluster) if mine is not None and mine.is_made else None
                if mine is None and found is None:
                    self._found_free(cluster, name)
                return found

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*item), name=f"look at {item[0]}") for item in self._hosts.items()]
        return tuple(machine for task in tasks if (machine := task.result()) is not None)

    async def create(self, spec: MachineSpec) -> Machine:
        made = self.machine_id(spec)
        name, _ = host_in(made) or ("", "")
        host = self._hosts.get(name)
        if host is None:
            raise OperatorError(
                f"{spec.machine} is on {name}, which is not among the hosts of operators.{self._definition.name} any more",
                hint="put it back; to move the machine, remove its tenement, apply, and add it again",
            )
        diary = self._diary(name)
        try:
            async with self._dialer() as dialer, self._hand(dialer, name, host) as hand:
                await bring_up(hand, self._houses, spec, diary, fence=self._site.fence)
                facts = await look(hand)
        except OperatorError as error:
            diary.note("failed", error.message)
            raise
        if not facts.is_machine(spec.cluster, spec.key):
            raise OperatorError(
                f"{name}: {spec.machine} was joined, but its keeper does not run",
                hint=f"look at {diary.path} here, and at /var/lib/slum/logs/_slum there",
            )
        return Machine(id=made, cluster=spec.cluster, key=spec.key, machine=spec.machine, tenement=spec.tenement)

    async def destroy(self, machine_id: str) -> None:
        found = host_in(machine_id)
        host = self._hosts.get(found[0]) if found else None
        if found is None or host is None:
            return
        name, machine = found
        diary = self._diary(name)
        async with self._dialer() as dialer, self._hand(dialer, name, host) as hand:
            facts = await look(hand)
            cluster = facts.cluster
            await hand.ask("take", cluster=cluster, fence=list(self._site.fence), wait_s=LOCK_S)
            done = await hand.ask("leave", name=machine, cluster=cluster)
            diary.note("leave", f"{machine} {'is gone' if done['left'] else 'was not here'}")
        for promised in _RESERVED.values():
            for key in [key for key, promise in promised.items() if promise.host == name and _is_name(machine, key)]:
                del promised[key]

    async def prepare(self, host: str) -> Facts:
        """Install this version of slum on *host* (a name as in ids), whatever runs there, and return what it was before."""
        async with self._dialer() as dialer, self._hand(dialer, host, self._hosts[host]) as hand:
            return await bring_up(hand, self._houses, None, self._diary(host))

    async def plan(self, host: str) -> tuple[Facts, Wheelhouse, tuple[Step, ...]]:
        """Return what *host* says of itself, what it would get, and the steps of preparing it; changes nothing there."""
        async with self._dialer() as dialer, self._hand(dialer, host, self._hosts[host]) as hand:
            facts = await look(hand)
        house = await self._houses.of(facts.target)
        check(host, facts, house)
        return facts, house, steps(facts, house, None)

    async def upgrade(self, host: str) -> bool:
        """Let the machine on *host* go on under this version, services untouched; False when it does or is none."""
        async with self._dialer() as dialer, self._hand(dialer, host, self._hosts[host]) as hand:
            house = await self._houses.of((await look(hand)).target)
            return await switch(hand, house, self._diary(host))

    @asynccontextmanager
    async def shell(self, host: str) -> AsyncIterator[asyncssh.SSHClientConnection]:
        """Yield a connection to *host*, as the operator has it."""
        async with self._dialer() as dialer, dialer.to(self._hosts[host]) as connection:
            yield connection

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of its hosts, as ids have them, in order."""
        return tuple(self._hosts)

    def log_of(self, host: str) -> Path:
        """Return the log of bootstraps of *host*."""
        return host_log(self._site, host)

    def _dialer(self) -> Dialer:
        home = self._site.home
        home.data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        for private in (home.state, home.logs):
            private.mkdir(mode=0o700, exist_ok=True)
        return Dialer(self._definition, self._book)

    def _diary(self, host: str) -> Diary:
        tell = self._tell
        return Diary(host_log(self._site, host), None if tell is None else lambda step, said: tell(host, step, said))

    @asynccontextmanager
    async def _hand(self, dialer: Dialer, name: str, host: SshHost) -> AsyncIterator[Hand]:
        async with dialer.to(host) as connection, working(name, connection) as hand:
            yield hand

    def _taken(self, cluster: str) -> dict[str, str]:
        """Return the host of each key that the ledger knows, whichever operator made it."""
        prefix = naming.prefix_of(cluster)
        found = ((held.key, host_in(held.id)) for held in self._site.held)
        return {key: place[0] for key, place in found if place is not None and place[1].startswith(prefix)}

    def _held(self, cluster: str) -> dict[str, Held]:
        """Return by host what the ledger knows to be there, or to have been asked for."""
        found: dict[str, Held] = {}
        for held in self._site.held:
            place = host_in(held.id)
            if place is not None and held.id == machine_id(place[0], cluster, held.key):
                found[place[0]] = held
        return found

    def _is_free(self, cluster: str, host: str) -> bool:
        free = self._site.free
        return free is not None and free.is_free(self._site.fence, cluster, host, time.monotonic())

    def _found_free(self, cluster: str, host: str) -> None:
        if self._site.free is not None:
            until = time.monotonic() + FREE_S * random.uniform(0.5, 1.5)
            self._site.free.found_free(self._site.fence, cluster, host, until)


def _is_name(machine: str, key: str) -> bool:
    found = naming.key_in(machine)
    return found is not None and found[0] == key


def host_log(site: Site, host: str) -> Path:
    """Return the log of bootstraps of *host*."""
    return site.home.logs / "_slum" / "bootstrap" / f"{re.sub('[^A-Za-z0-9.-]', '_', host)}.log"


def _as_held(held: Held, cluster: str) -> Machine:
    """Return the machine that the ledger knows, without having looked."""
    return Machine(id=held.id, cluster=cluster, key=held.key, machine=held.machine, tenement=held.tenement)


def _machine(host: str, cluster: str, facts: Facts) -> Machine | None:
    claim = facts.claim
    key = str(claim.get("key", ""))
    if not facts.is_machine(cluster, key):
        return None
    return Machine(
        id=machine_id(host, cluster, key),
        cluster=cluster,
        key=key,
        machine=str(claim.get("machine", "")),
        tenement=str(claim.get("tenement", "")),
    )
