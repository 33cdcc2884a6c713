"""Read fly.toml files as a fleet: those of `slum export fly` give the same fleet, a stranger's the nearest one.

An app that slum did not write is one tenement's services, a service for each process group. Pure.
"""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from slum import tomlfile
from slum.exports.assemble import RESERVED, VARIABLE, Found, name_of, tenement_of, variables
from slum.exports.base import Imported, Losses
from slum.exports.container import APP, DATA, OWN, SOCKET, as_written
from slum.exports.dockerfile import read_dockerfile
from slum.exports.flyrules import CHDIR, OPERATOR, ORG, USUAL, fleet_of
from slum.exports.foreign import bytes_of, read_foreign_dockerfile, seconds_of
from slum.model import (
    DEFAULT_ID,
    Deploy,
    Fleet,
    FlyOperator,
    Level,
    Listen,
    Restart,
    Service,
    Settings,
    Tenement,
)

IDLE_S = 300.0
"""About what Fly's proxy waits before it stops a machine without requests."""
_NO_FOLDER = Path()
READ = frozenset(
    [
        "app",
        "primary_region",
        "kill_signal",
        "kill_timeout",
        "build",
        "deploy",
        "env",
        "processes",
        "mounts",
        "http_service",
        "services",
        "checks",
        "restart",
        "vm",
    ]
)
ADDRESS = frozenset(
    [
        "internal_port",
        "force_https",
        "auto_stop_machines",
        "auto_start_machines",
        "min_machines_running",
        "processes",
        "checks",
        "http_checks",
        "tcp_checks",
        "protocol",
        "ports",
    ]
)
Toml = dict[str, Any]


class Machine(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """What an app says of the machines it wants."""

    region: str
    cpu_kind: str
    cpus: int
    memory_mb: int
    volume_gb: int


class App(msgspec.Struct, frozen=True, kw_only=True):
    tenement: str
    fleet: str
    machine: Machine
    found: tuple[Found, ...]
    settings: Settings


def import_fly(files: Mapping[str, str]) -> Imported:
    """Return the fleet that the fly.toml files in *files* declare; the Dockerfiles lie beside them."""
    losses = Losses()
    apps = [_App(path, files, losses).read() for path in files if path.endswith(".toml")]
    by_tenement: dict[str, list[App]] = {}
    for app in apps:
        by_tenement.setdefault(app.tenement, []).append(app)
    operators: dict[Machine, str] = {}
    volumes: dict[str, int] = {}
    tenements = []
    for name, members in sorted(by_tenement.items()):
        # Only an app with a mount tells the size of its volume, so that alone makes no other operator.
        machine = msgspec.structs.replace(max(app.machine for app in members), volume_gb=0)
        operator = operators.setdefault(machine, OPERATOR if not operators else f"{OPERATOR}-{len(operators) + 1}")
        volumes[operator] = max(volumes.get(operator, 0), *(app.machine.volume_gb for app in members))
        tenements.append(_tenement(name, operator, members, losses))
    fleet = Fleet(
        name=next((app.fleet for app in apps if app.fleet), "default"),
        operators=tuple(
            _operator(name, machine, volumes[name])
            for machine, name in sorted(operators.items(), key=lambda item: item[1])
        ),
        tenements=tuple(tenements),
    )
    return Imported(fleet=fleet, losses=losses.all())


def companions(path: str, text: str) -> tuple[str, ...]:
    """Return the Dockerfile that *path* names, relative to its folder, when it lies below it."""
    build = _dict(tomlfile.parse(text.encode(), path, _NO_FOLDER).data.get("build"))
    name = posixpath.normpath(str(build.get("dockerfile", "Dockerfile")))
    return () if posixpath.isabs(name) or name.startswith("../") else (name,)


def _operator(name: str, machine: Machine, volume_gb: int) -> FlyOperator:
    return FlyOperator(
        name=name,
        org=ORG,
        region=machine.region,
        cpu_kind=machine.cpu_kind,
        cpus=machine.cpus,
        memory_mb=machine.memory_mb,
        volume_gb=volume_gb or USUAL.volume_gb,
    )


def _tenement(name: str, operator: str, members: list[App], losses: Losses) -> Tenement:
    found = sorted((item for app in members for item in app.found), key=lambda item: (item.service.name, item.id))
    plain = Settings()
    settings = Settings(
        health_check_interval_s=next(
            (s for app in members if (s := app.settings.health_check_interval_s) != plain.health_check_interval_s),
            plain.health_check_interval_s,
        ),
        max_restarts=next(
            (n for app in members if (n := app.settings.max_restarts) != plain.max_restarts), plain.max_restarts
        ),
    )
    made = tenement_of(name, operator, found, losses, settings=settings, labels={})
    usual = Tenement(name="x", operator="x").routing_listen
    return msgspec.structs.replace(made, routing_listen=usual) if _is_free(made, 8080) else made


def _is_free(tenement: Tenement, port: int) -> bool:
    return all(service.port != port for service in tenement.services)


class _App:
    def __init__(self, path: str, files: Mapping[str, str], losses: Losses) -> None:
        self.path, self.files, self.losses = path, files, losses
        self.folder = posixpath.dirname(path)
        self.table: Toml = dict(tomlfile.parse(files[path].encode(), path, _NO_FOLDER).data)
        env = {str(key): str(value) for key, value in _dict(self.table.get("env")).items()}
        self.ours = "SLUM_TENEMENT" in env and "SLUM_INSTANCE" in env
        self.own = {key: env.pop(key) for key in OWN if key in env} if self.ours else {}
        self.env = self._plain(env)
        mounts = _list(self.table.get("mounts"))
        self.places = {str(m.get("destination", DATA)): "{data_dir}" for m in mounts}
        if not self.ours:
            for mount in mounts:
                why = "an instance's own folder is {data_dir}"
                self.lost("mounts", str(mount.get("destination")), why, "tell the program to use it")
        if "SOCKET_PATH" in self.own:
            self.places[self.own["SOCKET_PATH"]] = "{socket}"

    def lost(self, key: str, what: str, why: str, instead: str = "") -> None:
        self.losses.add(f"{self.table.get('app', self.path)}.{key}", what, why, instead)

    def read(self) -> App:
        for key in self.table:
            if key not in READ:
                self.lost(key, "the section", "a fleet has nothing like it")
        tenement = self.own.get("SLUM_TENEMENT") or name_of(str(self.table.get("app", "here")))
        groups: dict[str, str | None] = {str(k): str(v) for k, v in _dict(self.table.get("processes")).items()}
        groups = groups or {"app": None}
        names = {group: group if self.ours else self._service_name(group, groups) for group in groups}
        found = tuple(
            Found(
                tenement=tenement,
                id=self.own.get("SLUM_INSTANCE", DEFAULT_ID),
                service=self._service(group, command, names),
            )
            for group, command in groups.items()
        )
        return App(
            tenement=tenement,
            fleet=self._fleet(tenement, names),
            machine=self._machine(),
            found=found,
            settings=self._settings(),
        )

    def _service_name(self, group: str, groups: Mapping[str, object]) -> str:
        only = list(groups) == ["app"]
        return name_of(str(self.table.get("app", "app")) if only else group)

    def _fleet(self, tenement: str, names: Mapping[str, str]) -> str:
        if not self.ours:
            return ""
        lead = next(iter(names.values()))
        return fleet_of(str(self.table.get("app", "")), tenement, lead, self.own["SLUM_INSTANCE"])

    def _plain(self, env: dict[str, str]) -> dict[str, str]:
        for key in list(env):
            if RESERVED.fullmatch(key) or not VARIABLE.fullmatch(key):
                self.lost(f"env.{key}", env.pop(key), "slum sets it itself, or it is no variable's name")
        return env

    def _machine(self) -> Machine:
        vms = [vm for vm in _list(self.table.get("vm")) if not vm.get("processes")]
        vm = vms[-1] if vms else {}
        sizes = [str(mount.get("initial_size", "")) for mount in _list(self.table.get("mounts"))]
        volume = max((bytes_of(size) >> 30 for size in sizes), default=0)
        memory = vm.get("memory_mb") or _megabytes(vm.get("memory"))
        size = str(vm.get("size", ""))
        return Machine(
            region=str(self.table.get("primary_region", USUAL.region)),
            cpu_kind=str(vm.get("cpu_kind") or ("performance" if size.startswith("performance") else "shared")),
            cpus=int(vm.get("cpus") or _cpus(size)),
            memory_mb=max(256, int(memory or USUAL.memory_mb)),
            volume_gb=volume,
        )

    def _settings(self) -> Settings:
        plain = Settings()
        checks = [
            *_list(_dict(self.table.get("http_service")).get("checks")),
            *_dict(self.table.get("checks")).values(),
        ]
        interval = next(
            (seconds_of(str(c["interval"])) for c in checks if "interval" in c), plain.health_check_interval_s
        )
        retries = next(
            (int(r["retries"]) for r in _list(self.table.get("restart")) if "retries" in r), plain.max_restarts
        )
        return Settings(health_check_interval_s=max(0.1, interval), max_restarts=min(1000, retries))

    def _service(self, group: str, command: str | None, names: Mapping[str, str]) -> Service:
        fields: Toml = self._built()
        told: tuple[str, ...] = fields.pop("_command", ())
        exposed: int | None = fields.pop("_port", None)
        fields |= self._command(command, told)
        http = self._address(group)
        fields |= self._listen(http, exposed)
        fields["deploy"] = Deploy.REPLACE
        if self.ours and _dict(self.table.get("deploy")).get("strategy") == "bluegreen":
            fields["deploy"] = Deploy.OVERLAP
        elif not self.ours and fields["listen"] is not Listen.NONE:
            fields.pop("deploy")
            fields["deploy"] = Deploy.REPLACE
        fields["restart"] = self._restart(group)
        release = _dict(self.table.get("deploy")).get("release_command")
        if release:
            words = shlex.split(str(release))
            fields["pre_deploy"] = words[2] if words[:2] == ["/bin/sh", "-c"] and len(words) == 3 else str(release)
        if (timeout := self.table.get("kill_timeout")) is not None:
            fields["stop_timeout_s"] = min(3600.0, seconds_of(str(timeout)))
        for vm in _list(self.table.get("vm")):
            if group in (vm.get("processes") or ()):
                memory = vm.get("memory_mb") or _megabytes(vm.get("memory"))
                fields |= {"memory_limit_mb": int(memory)} if memory else {}
        if "image" in fields:
            fields["isolation"] = Level.SANDBOX
        env = {key: as_written(value, places=self.places) for key, value in self.env.items()}
        return Service(name=names[group], **fields, **variables(env, {}))

    def _built(self) -> Toml:
        build = _dict(self.table.get("build"))
        name = str(build.get("dockerfile", "Dockerfile"))
        text = self.files.get(posixpath.normpath(posixpath.join(self.folder, name)), "")
        ours = read_dockerfile(text)
        if ours is not None:
            found: Toml = {"image": ours.image, "build": ours.build}
            if ours.has_source and ours.context is not None:
                context = ours.context
                found["source"] = (
                    context if context.startswith("/") else posixpath.normpath(posixpath.join(self.folder, context))
                )
            return {key: value for key, value in found.items() if value is not None}
        if build.get("image"):
            return {"image": str(build["image"])}
        if not text:
            self.lost("build", name, "its Dockerfile was not there to be read", "write `build` and `command`")
        told = read_foreign_dockerfile(text)
        self.lost(
            "build", f"FROM {told.image or '?'}", "a service runs on its machine's own programs", "install them there"
        )
        fields: Toml = {"source": self.folder or "."}
        fields |= {"build": told.build} if told.build else {}
        return fields | {"_command": told.command, "_port": told.port}

    def _command(self, line: str | None, told: tuple[str, ...]) -> Toml:
        words = tuple(shlex.split(line)) if line else told
        fields: Toml = {}
        if words[:3] == CHDIR and len(words) > 4 and self.ours:
            fields["workdir"] = as_written(words[3].removeprefix(f"{APP}/"), places=self.places)
            words = words[4:]
        if not words:
            self.lost("processes", "the image's command", "it is not in this file", "write `command`")
            words = ("/bin/sh", "-c", "echo set the command of this service in slum.toml >&2; exit 64")
        return fields | {"command": tuple(as_written(word, places=self.places) for word in words)}

    def _address(self, group: str) -> Toml | None:
        """Return the http_service or service that *group* answers for."""
        for table in (
            *_list([self.table["http_service"]] if "http_service" in self.table else []),
            *_list(self.table.get("services")),
        ):
            if group in (table.get("processes") or [group]):
                return table
        return None

    def _listen(self, http: Toml | None, exposed: int | None) -> Toml:
        if http is None:
            return {"listen": Listen.NONE}
        fields: Toml = {}
        for key in http:
            if key not in ADDRESS and not self.ours:
                self.lost(f"http_service.{key}", str(http[key]), "slum's router has nothing like it")
        if not self.ours:
            port = int(http.get("internal_port", exposed or 8080))
            fields |= {"listen": Listen.PORT, "port": port}
        elif "PORT" in self.own:
            fields |= {"listen": Listen.PORT, "port": int(self.own["PORT"])}
        else:
            fields["listen"] = Listen.FD if "LISTEN_FDS" in self.own else Listen.SOCKET
            path = self.own.get("SOCKET_PATH", SOCKET)
            fields |= {"socket": "{data_dir}" + path.removeprefix(DATA)} if path != SOCKET else {}
        checks = [*_list(http.get("checks")), *_list(http.get("http_checks"))]
        grace = [*checks, *_dict(self.table.get("checks")).values()]
        for check in checks[:1]:
            fields["health"] = str(check.get("path", "/"))
        for check in grace[:1]:
            if "grace_period" in check:
                fields["startup_timeout_s"] = min(3600.0, max(0.1, seconds_of(str(check["grace_period"]))))
        sleeps = str(http.get("auto_stop_machines", "off")).lower() in ("stop", "suspend", "true")
        if sleeps and fields["listen"] is Listen.FD:
            fields["idle_timeout_s"] = IDLE_S
        elif sleeps:
            self.lost(
                "http_service.auto_stop_machines", "stop", 'a service that sleeps needs listen = "fd"', "`idle_timeout`"
            )
        return fields

    def _restart(self, group: str) -> Restart:
        kinds = {"always": Restart.ALWAYS, "on-failure": Restart.ON_FAILURE, "never": Restart.NEVER}
        for policy in _list(self.table.get("restart")):
            if group in (policy.get("processes") or [group]):
                return kinds.get(str(policy.get("policy")), Restart.ALWAYS)
        return Restart.ON_FAILURE


def _dict(value: object) -> Toml:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Toml]:
    """Return a list of tables; fly.toml takes one table for a list of one."""
    items = value if isinstance(value, list) else [value] if isinstance(value, dict) else []
    return [item for item in items if isinstance(item, dict)]


def _megabytes(text: object) -> int:
    if isinstance(text, int) or (isinstance(text, str) and text.isdigit()):
        return int(text)
    return bytes_of(str(text or "")) >> 20


def _cpus(size: str) -> int:
    tail = size.rpartition("-")[2].removesuffix("x")
    return int(tail) if tail.isdigit() else 1
