"""The Fly operator: one app a machine, with one volume and one machine in it, through the Machines API.

An app's name is unique at Fly, so the app is the machine's id here; and since it holds nothing else, deleting it leaves
nothing behind, whatever was made in it without our hearing of it. Volumes have no unique names: one is made at once only in
an app that this very call has made, otherwise what is there is looked for first, twice, as lists may be some seconds old.
A machine that is changed or destroyed is leased, so that two leaders do not work on it at a time. No connection is used for
a second request: an answer that arrives twice would be taken for that one's.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Generator, Mapping
from contextlib import asynccontextmanager
from functools import cache
from typing import Any
from urllib.parse import quote

import httpx

from slum import __version__
from slum.errors import ConfigError, OperatorError
from slum.model import FlyOperator
from slum.operators import naming
from slum.operators.account import (
    CALL_S,
    REAL,
    SETTLE_S,
    Clock,
    Hidden,
    Token,
    Variables,
    budget_of,
    checked_endpoint,
    pauses,
    read_token,
)
from slum.operators.base import NO_WAY_HOME, Deadlines, Machine, MachineSpec
from slum.operators.fly_api import Account, App, Apps, FlyMachine, Lease, Volume

ENDPOINT = "https://api.machines.dev"
ENDPOINT_ENV = "FLY_FLAPS_BASE_URL"
WAIT_S = 30
"""How long one /wait may hang; Fly allows a minute."""
LEASE_S = 60
AT_A_TIME = 4
DATA = "/var/lib/slum"
VOLUME = "slum"
GONE = ("destroyed", "destroying")
ENDED = ("stopped", "failed", "suspended")
_TAKEN_BY = re.compile(r"machine ID ([0-9A-Za-z_-]+)")


class Fly:
    deadlines = Deadlines(observe_s=60.0, create_s=300.0, destroy_s=180.0, settle_s=CALL_S + SETTLE_S)

    def __init__(self, definition: FlyOperator, *, clock: Clock = REAL, env: Mapping[str, str] = os.environ) -> None:
        self._definition = definition
        self._clock = clock
        self._variables = Variables(env)

    def machine_id(self, spec: MachineSpec) -> str:
        return naming.name_of(spec.cluster, spec.key)

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        prefix = naming.prefix_of(cluster)
        async with self._account() as account:
            names = {name for name in await self._apps(account) if name.startswith(prefix)}
            at_a_time = asyncio.Semaphore(AT_A_TIME)

            async def look(app: str) -> Machine | OperatorError | None:
                async with at_a_time:
                    try:
                        there = await self._machine_of(account, app)
                    except (
                        OperatorError
                    ) as error:  # one that fails must not cancel the others: data until all have ended
                        return error
                return None if there is None else _seen(app, there, cluster)

            async with asyncio.TaskGroup() as group:
                looks = [group.create_task(look(app), name=f"look at {app}") for app in sorted(names)]
        found = [task.result() for task in looks]
        for one in found:
            if isinstance(one, OperatorError):
                raise one
        return tuple(one for one in found if isinstance(one, Machine))

    async def create(self, spec: MachineSpec) -> Machine:
        if self._definition.image is None:
            raise ConfigError(
                f"operators.{self._definition.name}.image: which image has slum inside is not said",
                hint="build one from the Dockerfile of the node image, push it, and name it",
            )
        if spec.join is None:
            raise OperatorError(f"Fly: {spec.machine} would not know how to join home", hint=NO_WAY_HOME)
        app = self.machine_id(spec)
        async with self._account() as account:
            is_new = await self._ensure_app(account, app)
            there = None if is_new else await self._settled_machine(account, app)
            if there is None:
                volume = await self._volume(account, app, is_new=is_new)
                there = await self._launch(account, app, spec, volume)
            await self._started(account, app, there)
            await self._label(account, app, there, spec)
            if not is_new:
                await self._prune(account, app, there)
            if there.nonce:
                await self._release(account, app, there)
        return Machine(
            id=app,
            cluster=spec.cluster,
            key=spec.key,
            machine=spec.machine,
            tenement=spec.tenement,
            created_at=there.created_at.timestamp() if there.created_at else None,
        )

    async def destroy(self, machine_id: str) -> None:
        app = machine_id
        if naming.key_in(app) is None:
            return
        async with self._account() as account:
            if await self._app(account, app) is None:
                return
            for machine in await self._machines(account, app):
                await self._destroy_machine(account, app, machine)
            for volume in await self._volumes(account, app):
                await account.gone(f"delete volume {volume.id} of {app}", _at(app, "volumes", volume.id))
            await account.gone(f"delete app {app}", _at(app))
            for pause in pauses(self._clock, "Fly", self.deadlines.create_s):
                await self._clock.sleep(pause)
                if await self._app(account, app) is None:
                    return

    async def problems(self) -> tuple[str, ...]:
        """Ask whether the token sees the organisation; which regions there are, this API does not tell."""
        found = [] if self._definition.image else ["image: is needed: which image has slum inside"]
        async with self._account() as account:
            try:
                await self._apps(account)
            except OperatorError as error:
                if error.status not in (403, 404):
                    raise
                found.append(f'org: "{self._definition.org}" is not there, or this token may not see it')
        return tuple(found)

    # --- apps ---------------------------------------------------------------------------------------------------------

    async def _apps(self, account: Account) -> tuple[str, ...]:
        path = f"/apps?org_slug={quote(self._definition.org, safe='')}"
        return tuple(app.name for app in (await account.ask("list apps", "GET", path, Apps)).apps)

    async def _app(self, account: Account, app: str) -> App | None:
        try:
            return await account.ask(f"look at app {app}", "GET", _at(app), App)
        except OperatorError as error:
            if error.status == 404:
                return None
            raise

    async def _ensure_app(self, account: Account, app: str) -> bool:
        """Make sure that *app* is there and ours; tell whether this call has made it."""
        body = {"app_name": app, "org_slug": self._definition.org}
        try:
            await account.tell(f"create app {app}", "POST", "/apps", body=body)
        except OperatorError as error:
            if error.status not in (409, 422):
                raise
            there = await self._app(account, app)
            if there is None or there.organization.slug not in ("", self._definition.org):
                raise
            return False
        return True

    # --- machines -----------------------------------------------------------------------------------------------------

    async def _machines(self, account: Account, app: str) -> tuple[FlyMachine, ...]:
        listed = await account.ask(f"list machines of {app}", "GET", _at(app, "machines"), tuple[FlyMachine, ...])
        return tuple({one.id: one for one in listed if one.state not in GONE}.values())

    async def _machine_of(self, account: Account, app: str) -> FlyMachine | None:
        """Return the machine in *app*; None without one, or without the app."""
        try:
            machines = await self._machines(account, app)
        except OperatorError as error:
            if error.status == 404:
                return None
            raise
        return next((one for one in machines if one.name == app), None)

    async def _settled_machine(self, account: Account, app: str) -> FlyMachine | None:
        """Return the machine in an app that was there before; None only when the list had time to show it."""
        there = await self._machine_of(account, app)
        if there is None:
            await self._clock.sleep(SETTLE_S)
            there = await self._machine_of(account, app)
        return there

    async def _launch(self, account: Account, app: str, spec: MachineSpec, volume: Volume) -> FlyMachine:
        wanted = self._definition
        body = {
            "name": app,
            "region": volume.region or wanted.region,
            "lease_ttl": LEASE_S,
            "config": {
                "image": wanted.image,
                "env": _env(spec),
                "guest": {"cpu_kind": wanted.cpu_kind, "cpus": wanted.cpus, "memory_mb": wanted.memory_mb},
                "mounts": [{"volume": volume.id, "path": DATA}],
                "metadata": naming.labels_of(spec),
                "restart": {"policy": "always"},
                "services": [_service(port) for port in spec.ports],
            },
        }
        try:
            return await account.ask(f"create machine of {app}", "POST", _at(app, "machines"), FlyMachine, body)
        except OperatorError as error:
            taken = _TAKEN_BY.search(error.message) if error.status in (409, 422) else None
            if taken is None:
                raise
            return await account.ask(f"look at machine {app}", "GET", _at(app, "machines", taken[1]), FlyMachine)

    async def _started(self, account: Account, app: str, machine: FlyMachine) -> None:
        """Return when *machine* has started."""
        version = f"&instance_id={quote(machine.instance_id, safe='')}" if machine.instance_id else ""
        at = _at(app, "machines", machine.id)
        path = f"{at}/wait?state=started&timeout={WAIT_S}{version}"
        for pause in pauses(self._clock, "Fly", self.deadlines.create_s):
            await self._clock.sleep(pause)
            try:
                now = await account.ask(f"look at machine {app}", "GET", at, FlyMachine)
                if now.state in ENDED:
                    await account.tell(f"start machine {app}", "POST", f"{at}/start", nonce=machine.nonce)
                await account.tell(f"wait for machine {app}", "GET", path, timeout_s=WAIT_S + CALL_S)
                return
            except OperatorError as error:
                if error.status not in (None, 408, 429) and (error.status or 0) < 500:
                    raise
                await self._clock.sleep(error.retry_after_s or 0.0)

    async def _label(self, account: Account, app: str, machine: FlyMachine, spec: MachineSpec) -> None:
        path = f"{_at(app, 'machines', machine.id)}/metadata"
        for key, value in naming.labels_of(spec).items():
            if machine.config.metadata.get(key) != value:
                body = {"value": value}
                await account.tell(f"label machine {app}", "POST", f"{path}/{key}", body=body, nonce=machine.nonce)

    async def _destroy_machine(self, account: Account, app: str, machine: FlyMachine) -> None:
        """Take *machine* off the proxy, then end it, under a lease."""
        path = _at(app, "machines", machine.id)
        try:
            body = {"description": "slum", "ttl": LEASE_S}
            lease = await account.ask(f"lease machine {app}", "POST", f"{path}/lease", Lease, body)
            nonce = (lease.data or lease).nonce
            await account.tell(f"cordon machine {app}", "POST", f"{path}/cordon", nonce=nonce)
        except OperatorError as error:
            if error.status == 404:
                return
            raise
        await account.gone(f"destroy machine {app}", f"{path}?force=true", nonce=nonce)

    async def _release(self, account: Account, app: str, machine: FlyMachine) -> None:
        await account.gone(f"release machine {app}", f"{_at(app, 'machines', machine.id)}/lease", nonce=machine.nonce)

    # --- volumes ------------------------------------------------------------------------------------------------------

    async def _volumes(self, account: Account, app: str) -> tuple[Volume, ...]:
        listed = await account.ask(f"list volumes of {app}", "GET", _at(app, "volumes"), tuple[Volume, ...])
        ours = {
            one.id: one for one in listed if one.name == VOLUME and not one.state.endswith(("destroy", "destroyed"))
        }
        return tuple(ours[volume] for volume in sorted(ours))

    async def _volume(self, account: Account, app: str, *, is_new: bool) -> Volume:
        """Return the volume of *app*, with what an earlier machine left on it; made when there is surely none."""
        wanted = self._definition
        there = () if is_new else await self._volumes(account, app)
        if there:
            return next((one for one in there if one.attached_machine_id), there[0])
        body = {"name": VOLUME, "region": wanted.region, "size_gb": wanted.volume_gb, "encrypted": True}
        return await account.ask(f"create volume of {app}", "POST", _at(app, "volumes"), Volume, body)

    async def _prune(self, account: Account, app: str, machine: FlyMachine) -> None:
        """Delete the volumes beside the machine's own, of calls whose answer was lost."""
        volumes = await self._volumes(account, app)
        if any(one.attached_machine_id == machine.id for one in volumes):
            for one in volumes:
                if not one.attached_machine_id:
                    await account.gone(f"delete volume {one.id} of {app}", _at(app, "volumes", one.id))

    # ------------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _account(self) -> AsyncIterator[Account]:
        wanted = self._definition
        token = read_token(wanted.name, wanted.token_env, wanted.secrets_ref, self._variables)
        endpoint = checked_endpoint(self._variables.get(ENDPOINT_ENV) or ENDPOINT)
        async with httpx.AsyncClient(
            verify=_tls(),
            base_url=f"{endpoint}/v1",
            auth=_Signed(token),
            headers={"User-Agent": f"slum/{__version__}"},
            timeout=CALL_S,
            trust_env=False,
            limits=httpx.Limits(max_connections=AT_A_TIME, max_keepalive_connections=0),
        ) as http:
            yield Account(http, token, budget_of(endpoint, token, self._clock))


class _Signed(httpx.Auth):
    """Puts the token into each request; in no variable that a traceback might show."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        scheme = "" if self._token.reveal().startswith("FlyV1 ") else "Bearer "
        request.headers["Authorization"] = scheme + self._token.reveal()
        yield request


@cache
def _tls() -> ssl.SSLContext:
    """Return what is known of certificates; reading them takes longer than a call does."""
    return ssl.create_default_context()


def _at(app: str, *parts: str) -> str:
    return "/apps/" + "/".join(quote(part, safe="") for part in (app, *parts))


def _seen(app: str, machine: FlyMachine, cluster: str) -> Machine | None:
    """Return what is in *app* as a machine of *cluster*; labels that got lost are taken from its name."""
    labels = machine.config.metadata
    named = naming.key_in(app)
    if named is None or labels.get(naming.CLUSTER, cluster) != cluster:
        return None
    key, name = named
    return Machine(
        id=app,
        cluster=cluster,
        key=key,
        machine=labels.get(naming.MACHINE, name),
        tenement=labels.get(naming.TENEMENT, ""),
        created_at=machine.created_at.timestamp() if machine.created_at else None,
    )


def _env(spec: MachineSpec) -> dict[str, str]:
    env = {"SLUM_MACHINE": spec.machine, "SLUM_TENEMENT": spec.tenement}
    if spec.join is not None:
        env |= {"SLUM_SERVER": spec.join.server, "SLUM_JOIN_TOKEN": Hidden(spec.join.token)}
    return env


def _service(port: int) -> dict[str, Any]:
    """Return the way in from the proxy, which speaks TLS and HTTP outside, to the router's *port*."""
    outside = [{"port": 80, "handlers": ["http"]}, {"port": 443, "handlers": ["tls", "http"]}]
    return {"protocol": "tcp", "internal_port": port, "autostart": True, "autostop": False, "ports": outside}
