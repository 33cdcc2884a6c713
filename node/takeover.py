"""Taking over what runs: after its start, and after each loss of the keeper, the agent compares its roster with the keeper.

Living generations are adopted as they are; ends that nobody told are folded; routes, listeners, sockets and folders are made
to fit what lives, and what belongs to nobody is taken away. May be repeated at any time while no action is under way.
"""

from __future__ import annotations

import os

import msgspec

from slum import log
from slum.model import Key
from slum.node.adopt import adopt, key_of, listener_name
from slum.node.describe import cgroup_name
from slum.node.hands import Hands
from slum.node.keeperclient import Child, KeeperClient, KeeperError
from slum.node.limits.groups import Limits
from slum.node.observed import routed
from slum.node.oneoff import Oneoffs
from slum.node.prepare import Preparer
from slum.node.roster import Clock, Roster
from slum.node.sockets import remove_folder
from slum.node.watch import Watch
from slum.paths import Home, short_key

SOCKET_NAME_MAX = 16
"""The folder is the service's: a longer name is none of ours, and its number could be any."""
ONEOFF_CGROUPS = ("pre-", "run-", "build-")


class Takeover:
    """One agent's."""

    def __init__(
        self,
        home: Home,
        roster: Roster,
        hands: Hands,
        watch: Watch,
        preparer: Preparer,
        oneoffs: Oneoffs,
        limits: Limits,
        clock: Clock,
    ) -> None:
        self._home = home
        self._roster = roster
        self._hands = hands
        self._watch = watch
        self._preparer = preparer
        self._oneoffs = oneoffs
        self._limits = limits
        self._clock = clock

    async def run(self, keeper: KeeperClient) -> None:
        """Make the roster say what *keeper* knows. Unreachable when it is lost meanwhile."""
        children = await keeper.list_children()
        by_key: dict[Key, list[Child]] = {}
        for child in children:
            key = key_of(child)
            if key is not None:
                by_key.setdefault(key, []).append(child)
        listeners = {listener.name for listener in await keeper.listeners() if listener.name.startswith("i/")}
        adopted = 0
        for key in {*self._roster.entries, *by_key}:
            adopted += await self._adopt(key, by_key.get(key, []), listeners)
        await self._close_strangers(keeper, listeners)
        self._remove_strangers()
        await self._oneoffs.sweep(self._oneoffs.listed(children), self._preparer.names())
        log.get().info("keeper_taken_over", instances=len(self._roster.entries), generations=adopted)

    async def _adopt(self, key: Key, children: list[Child], listeners: set[str]) -> int:
        roster = self._roster
        seen, ends = adopt(roster.seen(key), children, roster.define, self._clock.now())
        sockets = self._sockets(key, listeners) | {g.socket for g in seen.living if routed(g.service)}
        roster.fold(msgspec.structs.replace(seen, sockets=tuple(sorted(sockets))))
        for end in ends:
            self._hands.ended(key, end.number, end.status, end.at)
        seen = roster.seen(key)
        for generation in seen.living:
            try:
                await self._hands.settle_listener(key, generation)
            except KeeperError as error:
                log.get().warning("listener_not_settled", key=str(key), why=str(error))
            if generation.socket == seen.serving:
                self._hands.point(key, generation)
            self._watch.started(key, generation.number)
        return len(seen.living)

    def _sockets(self, key: Key, listeners: set[str]) -> set[int]:
        """Return the numbers of the sockets that are there, held by the keeper or left in the run folder."""
        folder = self._home.instance_run(str(key))
        names = os.listdir(folder) if folder.is_dir() else []
        numbers = {
            int(name[1:-5])
            for name in names
            if name[:1] == "g" and name[-5:] == ".sock" and name[1:-5].isdecimal() and len(name) < SOCKET_NAME_MAX
        }
        prefix = listener_name(key, 0)[:-1]
        return numbers | {int(name.removeprefix(prefix)) for name in listeners if name.startswith(prefix)}

    async def _close_strangers(self, keeper: KeeperClient, listeners: set[str]) -> None:
        known = {
            listener_name(key, socket) for key, entry in self._roster.entries.items() for socket in entry.seen.sockets
        }
        for name in sorted(listeners - known):
            try:
                await keeper.close_listener(name)
            except KeeperError as error:
                log.get().warning("listener_not_closed", name=name, why=str(error))

    def _remove_strangers(self) -> None:
        """Withdraw routes, and remove run folders and cgroups, that belong to nothing that is known."""
        serving: dict[str, list[str]] = {}
        for key, entry in self._roster.entries.items():
            if entry.seen.serving is not None:
                serving.setdefault(key.service, []).append(key.id)
        self._hands.routes.prune(serving)
        shorts = {short_key(str(key)) for key in self._roster.entries}
        folder = self._home.run / "i"
        for name in os.listdir(folder) if folder.is_dir() else ():
            if name not in shorts:
                remove_folder(folder / name)
        self.sweep_cgroups()

    def sweep_cgroups(self) -> None:
        """Kill and remove the cgroups of generations that are no more, and remove empty ones of one-offs."""
        alive = {
            cgroup_name(key, generation.number)
            for key, entry in self._roster.entries.items()
            for generation in entry.seen.generations
        }
        for name in self._limits.list():
            if name.startswith(ONEOFF_CGROUPS):
                if not self._oneoffs.busy:
                    self._limits.remove(name)
            elif name not in alive:
                self._limits.kill(name)
                self._limits.remove(name)
