"""Makes releases startable: their bundle fetched and unpacked, their build done, their pre_deploy run; each once a release.

What it reaches is a Preparation in the roster. A control plane that cannot be reached is waited for; a build or pre_deploy
that fails breaks the release, with its log in the instance's log. The decision what follows is supervise.py's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec

from slum import log
from slum.errors import SlumError, Unreachable
from slum.model import Key, Level, Service
from slum.node.actions import Broken, Missing, Prepared, Working
from slum.node.describe import Describer
from slum.node.doors import Way
from slum.node.failures import exit_words
from slum.node.fetch import fetch_blob
from slum.node.hands import clear
from slum.node.limits.groups import Limits
from slum.node.oneoff import BUILD, PRE_DEPLOY, Oneoffs
from slum.node.roster import Clock, Roster, releases_in_use
from slum.node.store import Store
from slum.node.types import Instance, Runner
from slum.paths import Home

RETRY_S, RETRY_S_MAX = 1.0, 30.0
SHELL = "/bin/sh"


class Preparer:
    """One agent's."""

    def __init__(
        self,
        home: Home,
        way: Way,
        store: Store,
        roster: Roster,
        describer: Describer,
        runners: Mapping[Level, Runner],
        limits: Limits,
        oneoffs: Oneoffs,
        clock: Clock,
        group: asyncio.TaskGroup,
    ) -> None:
        self._home = home
        self._way = way
        self._store = store
        self._roster = roster
        self._describer = describer
        self._runners = runners
        self._limits = limits
        self._oneoffs = oneoffs
        self._clock = clock
        self._group = group
        self._folders: dict[str, Path] = {}
        self._attempts: dict[str, int] = {}
        self._pre_deployed = store.pre_deployed()
        self._building: dict[Path, asyncio.Lock] = {}

    def folder(self, release: str) -> Path | None:
        """Return where the bundle (or the built copy) of a prepared release lies; None when it has none."""
        return self._folders.get(release)

    def prepare(self, key: Key, release: str) -> None:
        """Begin to fetch and build *release*, unless that is under way."""
        service = self._definition(key, release)
        if service is None or isinstance(self._roster.preparations.get(release), Working):
            return
        self._roster.prepared(release, Working(what="fetching"))
        self._group.create_task(self._prepare(key, release, service), name=f"prepare {service.name}")

    def pre_deploy(self, key: Key, release: str) -> None:
        """Begin the pre_deploy of *release*, unless it is under way."""
        service = self._definition(key, release)
        if service is None or isinstance(self._roster.preparations.get(release), Working):
            return
        self._roster.prepared(release, Working(what="pre_deploy"))
        self._group.create_task(self._pre_deploy(key, release, service), name=f"pre_deploy {service.name}")

    def oneoff(
        self, key: Key, release: str, service: Service, name: str, command: tuple[str, ...], *, cgroup: str
    ) -> Instance:
        """Return a one-off *command* behind a wall like the service's, with the folder of *release*."""
        return self._describer.oneoff(
            key, release, service, self._roster.settings, self._folders.get(release), name, command, cgroup=cgroup
        )

    async def collect(self) -> None:
        """Remove bundles and built copies that no release here may need any more."""
        used = releases_in_use(self._roster.entries.values(), self._roster.wants.values())
        if any(isinstance(state, Working) for state in self._roster.preparations.values()):
            return
        self._folders = {release: folder for release, folder in self._folders.items() if release in used}
        if not self._pre_deployed <= used.keys() and len(self._pre_deployed) > 1000:
            self._pre_deployed &= used.keys()
            self._store.keep_pre_deployed(self._pre_deployed)
        from slum.node import bundles

        await asyncio.to_thread(bundles.collect, self._home, tuple(used.values()))

    def names(self) -> set[str]:
        """Return the names of the children that builds and pre_deploys have which are still to be done here."""
        from slum.node import builds

        used = releases_in_use(self._roster.entries.values(), self._roster.wants.values())
        unbuilt = (service for service in used.values() if service.build and not builds.built(self._home, service))
        return {
            *(self._build_name(service) for service in unbuilt),
            *(_pre_deploy_name(release) for release in used if release not in self._pre_deployed),
        }

    def _definition(self, key: Key, release: str) -> Service | None:
        want, good = self._roster.wants.get(key), self._roster.seen(key).good
        if want is not None and want.release == release:
            return want.service
        return good.service if good is not None and good.release == release else None

    async def _prepare(self, key: Key, release: str, service: Service) -> None:
        try:
            folder = await self._fetched(service)
            if service.build:
                folder = await self._built(key, release, service)
        except Unreachable as error:
            self._attempts[release] = self._attempts.get(release, 0) + 1
            delay_s = min(RETRY_S * 2 ** min(self._attempts[release] - 1, 10), RETRY_S_MAX)
            missing = Missing(retry_at=self._clock.now() + delay_s, why=str(error))
            self._roster.prepared(release, missing)
            return
        except (SlumError, OSError) as error:
            self._break(key, release, "build_failed" if service.build else "bundle_failed", str(error))
            return
        self._attempts.pop(release, None)
        if folder is not None:
            self._folders[release] = folder
        done = not service.pre_deploy or release in self._pre_deployed
        self._roster.prepared(release, Prepared(pre_deployed=done))

    async def _fetched(self, service: Service) -> Path | None:
        if not service.bundle:
            return None
        from slum.node import bundles

        gid = self._describer.uid(service.name)

        async def fetch(digest: str, folder: Path) -> Path:
            return await fetch_blob(self._way, digest, folder)

        return await bundles.ensure(self._home, service.name, service.bundle, gid, fetch)

    async def _built(self, key: Key, release: str, service: Service) -> Path:
        """Return the built copy of the service's bundle, building it now if need be; SlumError when that fails."""
        from slum.node import builds, bundles

        path = bundles.build_path(self._home, service)
        async with self._building.setdefault(path, asyncio.Lock()):
            done = builds.built(self._home, service)
            if done is not None:
                return done
            self._roster.prepared(release, Working(what="building"))
            name, uid = self._build_name(service), self._describer.uid(service.name)
            if not await self._oneoffs.exists(name):
                await asyncio.to_thread(builds.prepare, self._home, service, uid, uid)
            oneoff = self.oneoff(key, release, service, name, (SHELL,), cgroup=f"build-{release[:24]}")
            status = await self._run(builds.as_build(self._home, oneoff), f"build of {service.name}")
            if status != 0:
                await asyncio.to_thread(builds.discard, self._home, service)
                raise SlumError(f"build: {exit_words(status)}")
            return await asyncio.to_thread(builds.finish, self._home, service, uid)

    def _build_name(self, service: Service) -> str:
        from slum.node import bundles

        bundle, _, rest = bundles.build_path(self._home, service).name.rpartition("-")
        return f"{BUILD}{service.name}/{bundle[:16]}-{rest}"

    async def _pre_deploy(self, key: Key, release: str, service: Service) -> None:
        try:
            instance = self.oneoff(
                key,
                release,
                service,
                _pre_deploy_name(release),
                (SHELL, "-c", service.pre_deploy or "true"),
                cgroup=f"pre-{release[:24]}",
            )
            status = await self._run(instance, f"pre_deploy of {service.name}")
        except Unreachable as error:
            self._roster.prepared(release, Missing(retry_at=self._clock.now() + RETRY_S, why=str(error)))
            return
        except (SlumError, OSError) as error:
            self._break(key, release, "pre_deploy_failed", f"pre_deploy: {error}")
            return
        if status != 0:
            self._break(key, release, "pre_deploy_failed", f"pre_deploy: {exit_words(status)}")
            return
        self._pre_deployed.add(release)
        self._store.keep_pre_deployed(self._pre_deployed)
        self._roster.prepared(release, Prepared())

    async def _run(self, instance: Instance, what: str) -> int | None:
        runner = self._runners.get(instance.service.isolation)
        if runner is None:
            raise SlumError(f"level {instance.service.isolation} is not available on this machine", hint="slum doctor")
        log.get().info("oneoff_started", name=instance.name, what=what)
        spawn = msgspec.structs.replace(runner.spawn(instance), meta={"service": instance.service.name})
        try:
            return await self._oneoffs.run(spawn)
        finally:
            if instance.cgroup is not None:
                await clear(self._limits, instance.cgroup.name)

    def _break(self, key: Key, release: str, kind: str, why: str) -> None:
        log.get().warning("release_broken", key=str(key), release=release[:12], why=why)
        self._roster.note(kind, key, why, release=release)
        self._roster.prepared(release, Broken(why=why))


def _pre_deploy_name(release: str) -> str:
    return f"{PRE_DEPLOY}{release[:24]}"
