"""Fly Machines as the operator meets them: apps, machines, volumes and leases, with their rules.

App names are unique in all of Fly, machine names in their app, volume names nowhere. A leased machine is changed only with
the lease's nonce; /wait ends in 408 while the state is another; an app with machines in it is not deleted. A lease comes
wrapped in "data" and what is not set is null, as the service has it; *as_described* asks for what its description says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fakes.cloud import Answer, Call, Cloud, Liar, Refused, Seen

from slum.operators.account import Clock

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,60}[a-z0-9])?")
VOLUME_NAME = re.compile(r"[a-z0-9_]{1,30}")
NONCE = "fly-machine-lease-nonce"


@dataclass
class FakeMachine:
    body: dict[str, Any]
    seen: Seen
    started: float
    nonce: str = ""
    leased_until: float = 0.0


@dataclass
class FakeVolume:
    body: dict[str, Any]
    seen: Seen


@dataclass
class FakeApp:
    org: str
    seen: Seen
    machines: dict[str, FakeMachine] = field(default_factory=dict)
    volumes: dict[str, FakeVolume] = field(default_factory=dict)


class FakeFly(Cloud):
    provider = "fly"
    never_again = (r"/volumes$",)

    def __init__(
        self,
        token: str = "F" * 64,
        liar: Liar | None = None,
        clock: Clock | None = None,
        *,
        org: str = "mine",
        as_described: bool = False,
    ) -> None:
        super().__init__(token, liar, clock)
        self.org = org
        self.as_described = as_described
        self.apps: dict[str, FakeApp] = {}
        self.dead: list[tuple[str, FakeApp]] = []
        self._last = 0x1000

    # --- for tests ----------------------------------------------------------------------------------------------------

    def alive(self) -> dict[str, dict[str, Any]]:
        """Return the machines that exist, by the name of their app; of an app with two, both are named."""
        return {
            f"{name}{'' if n == 0 else f'#{n}'}": machine.body
            for name, app in self.apps.items()
            for n, machine in enumerate(m for m in app.machines.values() if m.seen.died is None)
        }

    def leftovers(self) -> list[str]:
        """Return whatever costs or confuses without belonging to a machine."""
        found = []
        for name, app in self.apps.items():
            living = {ident for ident, m in app.machines.items() if m.seen.died is None}
            if not living:
                found.append(f"app {name}")
            for ident, volume in app.volumes.items():
                if volume.seen.died is None and volume.body["attached_machine_id"] not in living:
                    found.append(f"volume {ident} of {name}")
        return found

    def add_server(self, name: str, labels: dict[str, str]) -> None:
        """Put an app with a machine there, as somebody else would have."""
        app = self.apps[name] = FakeApp(self.org, Seen(self.at()))
        volume = self._new_volume(app, {"name": "slum", "region": "iad", "size_gb": 1})
        config = {"image": "x", "metadata": labels, "mounts": [{"volume": volume.body["id"], "path": "/d"}]}
        self._new_machine(name, app, {"name": name, "config": config}, self.at())

    def remove_server(self, name: str) -> None:
        """Destroy the machine in an app by hand; its volume stays, as it does there."""
        app = self.apps[name]
        self._end(app, next(m for m in app.machines.values() if m.seen.died is None))

    # --- the service --------------------------------------------------------------------------------------------------

    def error(self, status: int, code: str, message: str) -> Answer:
        return Answer(status, {"error": f"{message}"}, {"Fly-Request-Id": f"01F{len(self.calls):x}-iad"})

    def refuse(self, status: int, message: str) -> Refused:
        return Refused(self.error(status, "", message))

    def handle(self, call: Call) -> Answer:
        answer = self._answer_to(call)
        return Answer(answer.status, _without_nulls(answer.body), answer.headers) if self.as_described else answer

    def _answer_to(self, call: Call) -> Answer:
        match call.method, call.path.removeprefix("/v1").strip("/").split("/"):
            case "GET", ["apps"]:
                return self._list_apps(call.query.get("org_slug", ""))
            case "POST", ["apps"]:
                return self._create_app(call.body)
            case "GET", ["apps", name]:
                app = self._app(name)
                organization = {"name": app.org, "slug": app.org}
                return Answer(200, {"id": name, "name": name, "organization": organization, "status": "deployed"})
            case "DELETE", ["apps", name]:
                return self._delete_app(name)
            case "GET", ["apps", name, "machines"]:
                return Answer(200, self._listed(self._app(name).machines))
            case "POST", ["apps", name, "machines"]:
                return self._create_machine(name, self._app(name), call.body)
            case "GET", ["apps", name, "volumes"]:
                return Answer(200, self._listed(self._app(name).volumes))
            case "POST", ["apps", name, "volumes"]:
                return self._create_volume(self._app(name), call.body)
            case "DELETE", ["apps", name, "volumes", ident]:
                return self._delete_volume(self._app(name), ident)
            case method, ["apps", name, "machines", ident, *rest]:
                app = self._app(name)
                return self._on_machine(method, app, self._machine(app, ident), rest, call)
        raise self.refuse(404, "no such path")

    def _on_machine(self, method: str, app: FakeApp, machine: FakeMachine, rest: list[str], call: Call) -> Answer:
        match method, rest:
            case "GET", []:
                return Answer(200, self._now(machine))
            case "GET", ["wait"]:
                if self._state(machine) != call.query.get("state", "started"):
                    raise self.refuse(408, "deadline_exceeded: machine not in requested state")
                return Answer(200, {"ok": True})
            case "POST", ["lease"]:
                return self._lease(machine, call)
        self._check_lease(machine, call)
        match method, rest:
            case "DELETE", []:
                if self._state(machine) == "started" and call.query.get("force") != "true":
                    raise self.refuse(412, "failed_precondition: machine is running")
                self._end(app, machine)
                return Answer(200, {"ok": True})
            case "DELETE", ["lease"]:
                machine.leased_until = 0.0
                return Answer(200, {"ok": True})
            case "POST", ["cordon"]:
                machine.body["cordoned"] = True
                return Answer(200, {"ok": True})
            case "POST", ["start"]:
                machine.started = self.at()
                machine.body["state"] = "started"
                return Answer(200, {"ok": True})
            case "POST", ["metadata", key]:
                machine.body["config"]["metadata"][key] = call.body["value"]
                return Answer(204)
        raise self.refuse(404, "no such path")

    # --- apps ---------------------------------------------------------------------------------------------------------

    def _list_apps(self, org: str) -> Answer:
        if org != self.org:
            raise self.refuse(404, "organization not found")
        at = self.at()
        names = [name for name, app in self.apps.items() if app.org == org and app.seen.is_listed(at)]
        names += [name for name, app in self.dead if app.seen.is_listed(at) and name not in names]
        names += [name for name in names if self.liar.says(self.liar.twice, "listed twice", name, len(self.calls))]
        apps = [{"id": name, "name": name, "machine_count": 1, "network": "default"} for name in names]
        return Answer(200, {"total_apps": len(apps), "apps": apps})

    def _create_app(self, body: dict[str, Any]) -> Answer:
        name = body["app_name"]
        if not NAME.fullmatch(name):
            raise self.refuse(400, "Name under 63 chars using numbers, lowercase letters and dashes")
        if body["org_slug"] != self.org:
            raise self.refuse(404, "organization not found")
        if name in self.apps:
            raise self.refuse(422, "Validation failed: Name has already been taken")
        self.apps[name] = FakeApp(self.org, Seen(self.at(), self.liar.lag("app", name)))
        return Answer(201, {"id": name, "created_at": 1})

    def _app(self, name: str) -> FakeApp:
        if name not in self.apps:
            raise self.refuse(404, "app not found")
        if self.apps[name].org != self.org:
            raise self.refuse(403, "unauthorized")
        return self.apps[name]

    def _delete_app(self, name: str) -> Answer:
        app = self._app(name)
        if any(machine.seen.died is None for machine in app.machines.values()):
            raise self.refuse(409, "app still has machines")
        app.seen.died = self.at()
        self.dead.append((name, self.apps.pop(name)))
        return Answer(202)

    # --- machines -----------------------------------------------------------------------------------------------------

    def _listed(self, things: Any) -> list[dict[str, Any]]:
        found = []
        for ident, thing in things.items():
            if thing.seen.is_listed(self.at()):
                found.append(self._now(thing))
                if self.liar.says(self.liar.twice, "listed twice", ident, len(self.calls)):
                    found.append(self._now(thing))
        return found

    def _now(self, thing: Any) -> dict[str, Any]:
        return {**thing.body, "state": self._state(thing)} if isinstance(thing, FakeMachine) else dict(thing.body)

    def _state(self, machine: FakeMachine) -> str:
        if machine.seen.died is not None:
            return "destroyed"
        return "starting" if self.at() < machine.started else str(machine.body["state"])

    def _machine(self, app: FakeApp, ident: str) -> FakeMachine:
        if ident not in app.machines or app.machines[ident].seen.died is not None:
            raise self.refuse(404, "machine not found")
        return app.machines[ident]

    def _create_machine(self, name: str, app: FakeApp, body: dict[str, Any]) -> Answer:
        at = self.at()
        for ident, machine in app.machines.items():
            if machine.seen.died is None and machine.body["name"] == body["name"]:
                why = f"unique machine name violation, machine ID {ident} already exists with name {body['name']!r}"
                raise self.refuse(409, f"already_exists: {why}")
        for mount in body["config"].get("mounts", ()):
            volume = app.volumes.get(mount["volume"])
            if volume is None or volume.seen.died is not None:
                raise self.refuse(400, "invalid_argument: volume not found")
            if volume.body["attached_machine_id"]:
                raise self.refuse(412, "failed_precondition: volume is attached to another machine")
        if self.liar.says(self.liar.short_of, "room", name, len(self.calls)):
            raise self.refuse(412, "aborted: insufficient resources available to fulfill request")
        machine = self._new_machine(name, app, body, at)
        self.on_boot(name, machine.body["config"].get("env", {}))
        answer = self._now(machine)
        if body.get("lease_ttl"):
            machine.nonce, machine.leased_until = self._new_id(), at + body["lease_ttl"]
            answer["nonce"] = machine.nonce
        return Answer(200, answer)

    def _new_machine(self, name: str, app: FakeApp, body: dict[str, Any], at: float) -> FakeMachine:
        ident, config = self._new_id(), dict(body["config"])
        config["metadata"] = dict(config.get("metadata", {}))
        if self.liar.says(self.liar.forget_labels, "labels", name, len(app.machines)):
            config["metadata"] = {}
        slow = self.liar.says(self.liar.slow, "slow", name)
        takes = self.liar.random("how slow", name).uniform(20, 60) if slow else 2.0
        when = datetime.fromtimestamp(1_800_000_000 + at % 1_000_000_000, UTC).isoformat()
        made = {
            "id": ident,
            "name": body["name"],
            "state": "started",
            "region": body.get("region", "iad"),
            "instance_id": f"01{ident.upper()}",
            "private_ip": "fdaa:0:1::2",
            "config": config,
            "image_ref": {
                "registry": "registry.fly.io",
                "repository": "slum",
                "tag": "1",
                "digest": "sha256:0",
                "labels": {},
            },
            "created_at": when,
            "updated_at": when,
            "events": [],
            "checks": [],
        }
        machine = app.machines[ident] = FakeMachine(made, Seen(at, self.liar.lag("machine", ident)), at + takes)
        for mount in config.get("mounts", ()):
            app.volumes[mount["volume"]].body["attached_machine_id"] = ident
        return machine

    def _end(self, app: FakeApp, machine: FakeMachine) -> None:
        self.on_end(str(machine.body["name"]))
        machine.seen.died = self.at()
        for volume in app.volumes.values():
            if volume.body["attached_machine_id"] == machine.body["id"]:
                volume.body["attached_machine_id"] = None

    def _lease(self, machine: FakeMachine, call: Call) -> Answer:
        self._check_lease(machine, call)
        machine.nonce, machine.leased_until = self._new_id(), self.at() + call.body.get("ttl", 60)
        lease = {
            "nonce": machine.nonce,
            "expires_at": int(1_800_000_000 + machine.leased_until) % 10**10,
            "owner": "me@example.com",
            "description": call.body.get("description", ""),
            "version": "1",
        }
        return Answer(200, lease if self.as_described else {"status": "success", "data": lease})

    def _check_lease(self, machine: FakeMachine, call: Call) -> None:
        if machine.leased_until > self.at() and call.headers.get(NONCE) != machine.nonce:
            raise self.refuse(409, "failed to get lease on VM: lease currently held")

    # --- volumes ------------------------------------------------------------------------------------------------------

    def _create_volume(self, app: FakeApp, body: dict[str, Any]) -> Answer:
        if not VOLUME_NAME.fullmatch(body["name"]):
            raise self.refuse(400, "invalid_argument: volume name")
        return Answer(200, dict(self._new_volume(app, body).body))

    def _new_volume(self, app: FakeApp, body: dict[str, Any]) -> FakeVolume:
        ident = f"vol_{self._new_id()}"
        made = {
            "id": ident,
            "name": body["name"],
            "state": "created",
            "size_gb": body.get("size_gb", 1),
            "region": body["region"],
            "zone": "c0ff",
            "encrypted": body.get("encrypted", True),
            "attached_machine_id": None,
            "attached_alloc_id": None,
            "created_at": "2026-01-01T00:00:00Z",
            "blocks": 0,
            "block_size": 4096,
            "blocks_free": 0,
            "blocks_avail": 0,
            "fstype": "ext4",
            "snapshot_retention": 5,
        }
        app.volumes[ident] = FakeVolume(made, Seen(self.at(), self.liar.lag("volume", ident)))
        return app.volumes[ident]

    def _delete_volume(self, app: FakeApp, ident: str) -> Answer:
        volume = app.volumes.get(ident)
        if volume is None or volume.seen.died is not None:
            raise self.refuse(404, "volume not found")
        if volume.body["attached_machine_id"]:
            raise self.refuse(412, "failed_precondition: volume is attached")
        volume.seen.died = self.at()
        return Answer(200, dict(volume.body))

    def _new_id(self) -> str:
        self._last += 1
        return f"{self._last:014x}"


def _without_nulls(body: Any) -> Any:
    if isinstance(body, list):
        return [_without_nulls(one) for one in body]
    return {k: _without_nulls(v) for k, v in body.items() if v is not None} if isinstance(body, dict) else body
