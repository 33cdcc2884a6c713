"""The Hetzner operator: servers of one project, made with cloud-init that joins home, through the official client.

A server's name is unique in its project, so the name is the machine's id here: a create that was in fact done answers
`uniqueness_error` and is looked up, and destroying by name also meets a server that no answer ever told us of. Lists may
be some seconds old; only what is still not in one after SETTLE_S is not there. The client's own retries and waits are off:
one call is one request, in a thread, within the budget of the account.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from slum import __version__
from slum.cloudinit import BYTES_MAX, cloud_init, quoted
from slum.errors import ConfigError, OperatorError
from slum.model import HetznerOperator
from slum.operators import naming
from slum.operators.account import (
    CALL_S,
    REAL,
    SETTLE_S,
    Clock,
    Hidden,
    Variables,
    budget_of,
    checked_endpoint,
    pauses,
    read_token,
    refusal,
)
from slum.operators.base import NO_WAY_HOME, Deadlines, Machine, MachineSpec
from slum.operators.hetzner_api import Project
from slum.operators.nearest import missing

if TYPE_CHECKING:
    from hcloud import Client
    from hcloud.actions import BoundAction
    from hcloud.firewalls import BoundFirewall
    from hcloud.server_types import BoundServerType
    from hcloud.servers import BoundServer

ENDPOINT = "https://api.hetzner.cloud/v1"
ENDPOINT_ENV = "HCLOUD_ENDPOINT"
AGAIN_S = 2.0
PER_PAGE = 50
EVERYWHERE = ["0.0.0.0/0", "::/0"]
UNFINISHED = ("initializing", "starting", "migrating", "rebuilding")
T = TypeVar("T")


class Hetzner:
    deadlines = Deadlines(observe_s=60.0, create_s=300.0, destroy_s=180.0, settle_s=CALL_S + SETTLE_S)

    def __init__(
        self, definition: HetznerOperator, *, clock: Clock = REAL, env: Mapping[str, str] = os.environ
    ) -> None:
        self._definition = definition
        self._clock = clock
        self._variables = Variables(env)

    def machine_id(self, spec: MachineSpec) -> str:
        return naming.name_of(spec.cluster, spec.key)

    async def observe(self, cluster: str) -> tuple[Machine, ...]:
        async with self._project() as project:
            servers = await project.all(
                "list servers",
                lambda c, page: c.servers.get_list(
                    label_selector=f"{naming.CLUSTER}={cluster}", page=page, per_page=PER_PAGE
                ),
            )
        there = {server.id: _machine(server, cluster) for server in servers if server.status != "deleting"}
        return tuple(machine for _, machine in sorted(there.items()))

    async def create(self, spec: MachineSpec) -> Machine:
        from hcloud.images import Image
        from hcloud.locations import Location
        from hcloud.server_types import ServerType
        from hcloud.ssh_keys import SSHKey

        name, labels, user_data = self.machine_id(spec), naming.labels_of(spec), _user_data(spec)
        async with self._project() as project:
            firewall = await self._firewall(project, spec)
            try:
                made = await project.call(
                    f"create server {name}",
                    lambda c: c.servers.create(
                        name=name,
                        server_type=ServerType(name=self._definition.server_type),
                        image=Image(name=self._definition.image),
                        location=Location(name=self._definition.location),
                        ssh_keys=[SSHKey(name=key) for key in self._definition.ssh_keys],
                        firewalls=[firewall],
                        labels=labels,
                        user_data=user_data,
                    ),
                )
                server, actions = made.server, [made.action, *made.next_actions]
            except OperatorError as error:
                if error.provider_code != "uniqueness_error":
                    raise
                server, actions = await self._named(project, name, error), []
            _check_ours(server, name)
            for action in actions:
                await self._finished(project, action)
            server = await self._running(project, server)
            if server.labels != labels:
                await project.call(f"label server {name}", lambda c: c.servers.update(server, labels=labels))
        return Machine(
            id=name,
            cluster=spec.cluster,
            key=spec.key,
            machine=spec.machine,
            tenement=spec.tenement,
            created_at=server.created.timestamp() if server.created else None,
        )

    async def destroy(self, machine_id: str) -> None:
        if naming.key_in(machine_id) is None:
            return
        async with self._project() as project:
            server = await self._look(project, machine_id)
            if server is None:
                await self._clock.sleep(SETTLE_S)
                server = await self._look(project, machine_id)
            if server is not None:
                _check_ours(server, machine_id)
                await self._delete(project, server)
            await self._tidy(project, machine_id, gone=server.id if server is not None else None)

    async def problems(self) -> tuple[str, ...]:
        wanted, found = self._definition, list[str]()
        async with self._project() as project:
            types = await project.all(
                "list server types", lambda c, page: c.server_types.get_list(page=page, per_page=PER_PAGE)
            )
            locations = await project.all(
                "list locations", lambda c, page: c.locations.get_list(page=page, per_page=PER_PAGE)
            )
            images = await project.all(
                "list images",
                lambda c, page: c.images.get_list(type=["system", "snapshot"], page=page, per_page=PER_PAGE),
            )
            keys = await project.all("list SSH keys", lambda c, page: c.ssh_keys.get_list(page=page, per_page=PER_PAGE))
        kind = next((one for one in types if one.name == wanted.server_type), None)
        places = [one.name for one in locations]
        if kind is None:
            usable = [one.name for one in types if wanted.location in _places(one) or wanted.location not in places]
            found.append(missing("server_type", wanted.server_type, usable))
        if wanted.location not in places:
            found.append(missing("location", wanted.location, places))
        elif kind is not None and wanted.location not in _places(kind):
            found.append(missing("location", wanted.location, _places(kind), f"has no {kind.name} to order"))
        fitting = [one for one in images if kind is None or one.architecture == kind.architecture]
        if not any(wanted.image in (one.name, str(one.id)) for one in fitting):
            why = f"is no image for {kind.architecture}" if kind is not None and len(fitting) < len(images) else ""
            found.append(
                missing("image", wanted.image, [one.name for one in fitting if one.name], why or "is not known")
            )
        names = [one.name for one in keys]
        found += [missing("ssh_keys", key, names) for key in wanted.ssh_keys if key not in names]
        return tuple(found)

    async def _firewall(self, project: Project, spec: MachineSpec) -> BoundFirewall:
        """Return the firewall that lets in *spec*'s ports, SSH when there is a key for it, and nothing else."""
        from hcloud.firewalls import FirewallRule

        ports = sorted({*spec.ports, *((22,) if self._definition.ssh_keys else ())})
        name = naming.prefix_of(spec.cluster) + "-".join(["in", *map(str, ports)])
        rules = [FirewallRule(direction="in", protocol="icmp", source_ips=EVERYWHERE)]
        rules += [FirewallRule(direction="in", protocol="tcp", port=str(port), source_ips=EVERYWHERE) for port in ports]

        async def look() -> BoundFirewall | None:
            firewalls = await project.call(f"find firewall {name}", lambda c: c.firewalls.get_list(name=name).firewalls)
            return firewalls[0] if firewalls else None

        if (there := await look()) is not None:
            return there
        labels = {naming.CLUSTER: spec.cluster}
        try:
            made = await project.call(
                f"create firewall {name}",
                lambda c: c.firewalls.create(name=name, rules=rules, labels=labels),  # type: ignore[arg-type]  # its annotation errs: labels are a mapping
            )
        except OperatorError as error:
            if error.provider_code != "uniqueness_error":
                raise
            return await self._until_listed(look, error)
        return made.firewall

    async def _named(self, project: Project, name: str, error: OperatorError) -> BoundServer:
        return await self._until_listed(lambda: self._look(project, name), error)

    async def _until_listed(self, look: Callable[[], Awaitable[T | None]], error: OperatorError) -> T:
        """Return what *look* finds as soon as the list has it; raise *error*, by which it exists, if it stays away."""
        end = self._clock.now() + SETTLE_S
        while (there := await look()) is None:
            if self._clock.now() >= end:
                raise error
            await self._clock.sleep(AGAIN_S)
        return there

    async def _look(self, project: Project, name: str) -> BoundServer | None:
        servers = await project.call(f"find server {name}", lambda c: c.servers.get_list(name=name).servers)
        return servers[0] if servers else None

    async def _finished(self, project: Project, action: BoundAction) -> None:
        """Return when *action* has ended well."""
        for pause in pauses(self._clock, "Hetzner", self.deadlines.create_s):
            await self._clock.sleep(pause)
            if action.status != "running":
                break
            try:
                action = await project.call(f"wait for {action.command}", partial(_action, number=action.id))
            except OperatorError as error:
                await self._bear(error)
        if action.status == "error":
            said: Mapping[str, Any] = action.error or {}
            why = str(said.get("message") or "it failed")
            raise refusal("Hetzner", str(action.command), why, code=str(said.get("code") or "action_failed"))

    async def _running(self, project: Project, server: BoundServer) -> BoundServer:
        """Return *server* as it is once nothing is being done to it, started if it was off."""
        for pause in pauses(self._clock, "Hetzner", self.deadlines.create_s):
            await self._clock.sleep(pause)
            try:
                server = await project.call(f"look at server {server.name}", partial(_server, number=server.id or 0))
                if server.status == "off":
                    await self._finished(project, await project.call("power on", partial(_power_on, server=server)))
                elif server.status not in UNFINISHED:
                    break
            except OperatorError as error:
                await self._bear(error)
        return server

    async def _delete(self, project: Project, server: BoundServer) -> None:
        """Return when *server* is gone."""
        asked = False
        for pause in pauses(self._clock, "Hetzner", self.deadlines.create_s):
            await self._clock.sleep(pause)
            try:
                if not asked:
                    await project.call(f"delete server {server.name}", lambda c: c.servers.delete(server))
                    asked = True
                await project.call(f"look at server {server.name}", partial(_server, number=server.id or 0))
            except OperatorError as error:
                if error.status == 404:
                    return
                if not asked:
                    raise
                await self._bear(error)

    async def _tidy(self, project: Project, machine_id: str, gone: int | None) -> None:
        """Delete the firewalls of the same cluster that no server has any more."""
        prefix = "-".join(machine_id.split("-")[:2]) + "-in"
        end = self._clock.now() + SETTLE_S
        while True:
            held = None
            for firewall in await project.all(
                "list firewalls", lambda c, page: c.firewalls.get_list(page=page, per_page=PER_PAGE)
            ):
                if firewall.name.startswith(prefix) and not await self._is_used(project, firewall, gone):
                    held = await self._dropped(project, firewall) or held
            if held is None:
                return
            if self._clock.now() >= end:
                raise held
            await self._clock.sleep(AGAIN_S)

    async def _is_used(self, project: Project, firewall: BoundFirewall, gone: int | None) -> bool:
        """Tell whether a server has *firewall*; the list may still name some that are gone, so they are looked at."""
        for resource in firewall.applied_to or ():
            if resource.server is None:
                return True
            if resource.server.id == gone:
                continue
            try:
                ask = partial(_server, number=resource.server.id or 0)
                if (await project.call(f"look at a server of firewall {firewall.name}", ask)).status != "deleting":
                    return True
            except OperatorError as error:
                if error.status != 404:
                    raise
        return False

    async def _dropped(self, project: Project, firewall: BoundFirewall) -> OperatorError | None:
        """Delete *firewall* and return None, or the refusal when a server still has it."""
        try:
            await project.call(f"delete firewall {firewall.name}", lambda c: c.firewalls.delete(firewall))
        except OperatorError as error:
            if error.provider_code == "resource_in_use":
                return error
            if error.status != 404:
                raise
        return None

    async def _bear(self, error: OperatorError) -> None:
        """Wait as long as *error* asks while something is only watched; raise it when watching on is of no use."""
        if error.retry_after_s is None and error.status is not None and error.status < 500 and error.status != 423:
            raise error
        await self._clock.sleep(error.retry_after_s or 0.0)

    @asynccontextmanager
    async def _project(self) -> AsyncIterator[Project]:
        wanted = self._definition
        token = read_token(wanted.name, wanted.token_env, wanted.secrets_ref, self._variables)
        endpoint = checked_endpoint(self._variables.get(ENDPOINT_ENV) or ENDPOINT)
        project = Project(endpoint, token, budget_of(endpoint, token, self._clock))
        try:
            yield project
        finally:
            project.close()


def _action(client: Client, number: int) -> BoundAction:
    return client.actions.get_by_id(number)


def _server(client: Client, number: int) -> BoundServer:
    return client.servers.get_by_id(number)


def _power_on(client: Client, server: BoundServer) -> BoundAction:
    return client.servers.power_on(server)


def _user_data(spec: MachineSpec) -> str:
    if spec.join is None:
        raise OperatorError(f"Hetzner: {spec.machine} would not know how to join home", hint=NO_WAY_HOME)
    text = Hidden(
        cloud_init(
            server=quoted(spec.join.server),
            machine=quoted(spec.machine),
            token=quoted(spec.join.token),
            version=quoted(__version__),
        )
    )
    if len(text.encode()) > BYTES_MAX:
        raise ConfigError(f"{spec.machine}: its user data takes more than {BYTES_MAX} bytes")
    return text


def _machine(server: BoundServer, cluster: str) -> Machine:
    """Return the server as a machine; one that carries our labels under another name (a clone) has no key of ours."""
    labels = server.labels or {}
    key = labels.get(naming.KEY, "")
    return Machine(
        id=str(server.name),
        cluster=cluster,
        key=key if server.name == naming.name_of(cluster, key) else "",
        machine=labels.get(naming.MACHINE, ""),
        tenement=labels.get(naming.TENEMENT, ""),
        created_at=server.created.timestamp() if server.created else None,
    )


def _check_ours(server: BoundServer, name: str) -> None:
    """Raise unless *server* is the one of *name* and its labels, where it has any, say so too."""
    labels = server.labels or {}
    said = naming.name_of(labels[naming.CLUSTER], labels.get(naming.KEY, "")) if naming.CLUSTER in labels else name
    if server.name != name or said != name:
        raise OperatorError(
            f"Hetzner: the server {name} is labelled as another fleet's", hint="rename that server; it is not touched"
        )


def _places(kind: BoundServerType) -> list[str]:
    """Return where *kind* can be ordered."""
    return [str(one.location.name) for one in kind.locations or () if one.deprecation is None]
