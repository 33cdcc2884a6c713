"""One service of a Compose file as slum declares it. Part of compose_import; pure."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Mapping
from typing import Any

import msgspec

from slum.exports.assemble import Found, variables
from slum.exports.base import Losses
from slum.exports.compose import RESTARTS, RUNTIMES, SHARES_PER_WEIGHT, duration
from slum.exports.compose_variables import Project, Variables
from slum.exports.container import APP, DATA, RUN, SOCKET
from slum.exports.dockerfile import read_dockerfile
from slum.exports.foreign import (
    COMMANDS,
    IGNORED,
    PORTS,
    WHY,
    bytes_of,
    read_foreign_dockerfile,
    repository,
    seconds_of,
)
from slum.exports.interpolation import fill
from slum.model import DEFAULT_ID, Deploy, Level, Listen, Restart, Service

Yaml = dict[str, Any]
NOT_KNOWN = ("/bin/sh", "-c", "echo set the command of this service in slum.toml >&2; exit 64")


class Read(msgspec.Struct, frozen=True, kw_only=True):
    found: tuple[Found, ...]
    labels: Mapping[str, str]
    interval_s: float | None


def read_service(
    project: Project, name: str, table: Yaml, names: Mapping[str, str], once: Yaml | None, losses: Losses
) -> Read:
    """Return service *name*; *names* are slum's names of all of them, *once* the service that runs before this one."""
    return _Reader(project, name, table, names, losses).read(once)


class _Reader(Variables):
    def read(self, once: Yaml | None) -> Read:
        self._mounts()
        built = self._built()
        self._secrets()
        self._foreign_names()
        exposed = built.pop("port", None)
        listen = self._listen(exposed if self.table.get("command") is None else None)
        fields: Yaml = {**self._program(built), **listen, **self._limits(), **self._restart(), **built}
        interval = self._health(fields)
        if once is not None:
            words = self._words(once.get("command"))
            fields["pre_deploy"] = words[2] if len(words) == 3 else shlex.join(words)
        needs = self.table.get("depends_on") or {}
        fields["depends_on"] = tuple(
            sorted(
                {
                    self.names[str(n)]
                    for n in needs
                    if self.names.get(str(n), self.names[self.name]) != self.names[self.name]
                }
            )
        )
        for key in self.table:
            if key not in IGNORED and not str(key).startswith("x-"):
                self.lost(str(key), "the key", WHY.get(str(key), "a fleet has nothing like it"))
        fields |= variables({key: self.written(value) for key, value in self.env.items()}, self.secrets)
        ids = [self.own.get("SLUM_INSTANCE", DEFAULT_ID)]
        ids = ids if self.ours else self._replicas(fields)
        service = Service(name=self.names[self.name], **fields)
        found = tuple(Found(tenement=self.project.tenement, id=one, service=service) for one in ids)
        return Read(found=found, labels=self._labels(), interval_s=interval)

    def _mounts(self) -> None:
        """A named volume is the instance's own folder; anything else of the machine is not the service's."""
        if self.ours:
            self.places = {DATA: "{data_dir}"}
            if "SOCKET_PATH" in self.own:
                self.places[self.own["SOCKET_PATH"]] = "{socket}"
            return
        named: list[tuple[str, str]] = []
        for item in self.table.get("volumes") or ():
            source, target, kind = _mount(item)
            if kind == "volume":
                named.append((source, target))
            elif kind == "bind":
                self.lost(
                    "volumes",
                    f"{source} at {target}",
                    "a service sees no folder of the machine",
                    "put it into `source`",
                )
        for source, target in named:
            place = "{data_dir}" if len(named) == 1 else f"{{data_dir}}/{source}"
            self.places[target] = place
            why = "an instance writes into its own folder only"
            self.lost("volumes", f"{source} at {target} becomes {place}", why, "tell the program to use it")

    def _built(self) -> Yaml:
        """Return source, build and image, and what a Dockerfile says of command and port."""
        build, image = self.table.get("build"), self.table.get("image")
        if build is None:
            return {} if image is None else {"image": self.text(image, "image")}
        table: Yaml = dict(build) if isinstance(build, dict) else {"context": build}
        context = self.text(table.get("context", "."), "build.context")
        where = posixpath.normpath(
            posixpath.join(self.project.folder, context, str(table.get("dockerfile", "Dockerfile")))
        )
        text = str(table.get("dockerfile_inline") or self.project.files.get(where, ""))
        ours = read_dockerfile(text)
        if ours is not None:
            contexts = table.get("additional_contexts")
            folder = contexts.get("source") if isinstance(contexts, dict) else None
            found: Yaml = {"image": ours.image, "build": ours.build}
            if ours.has_source and folder is not None:
                found["source"] = self._folder(fill(str(folder)).text)
            return {key: value for key, value in found.items() if value is not None}
        for key in table:
            if key not in ("context", "dockerfile"):
                self.lost(f"build.{key}", "the key", "slum builds with a shell command, not with a Dockerfile")
        found = {"source": self._folder(context)}
        if not text:
            self.lost("build", where, "its Dockerfile was not there to be read", "write `build` and `command`")
        told = read_foreign_dockerfile(text)
        self.lost(
            "build", f"FROM {told.image or '?'}", "a service runs on its machine's own programs", "install them there"
        )
        if told.build:
            found["build"] = told.build
        found |= {"_command": told.command} if told.command else {}
        return found | ({"port": told.port} if told.port else {})

    def _folder(self, folder: str) -> str:
        return folder if folder.startswith("/") else posixpath.normpath(posixpath.join(self.project.folder, folder))

    def _words(self, value: object) -> tuple[str, ...]:
        if value is None:
            return ()
        if isinstance(value, list):
            return tuple(self.text(item, "command") for item in value)
        try:
            return tuple(shlex.split(self.text(value, "command")))
        except ValueError:
            return ("/bin/sh", "-c", self.text(value, "command"))

    def _program(self, built: Yaml) -> Yaml:
        told: tuple[str, ...] = built.pop("_command", ())
        command = (*self._words(self.table.get("entrypoint")), *self._words(self.table.get("command")))
        image = built.get("image")
        if not command:
            command = told or (COMMANDS.get(repository(image), ()) if image else ())
        elif image and not self.ours and "entrypoint" not in self.table:
            entry = COMMANDS.get(repository(image), ())[:1]
            command = (*entry, *command) if entry and entry[0].endswith("entrypoint.sh") else command
        if command and image and not self.ours and command[0].startswith("-"):
            program = repository(image).rpartition("/")[2]
            self.lost("command", program, "the image's entry point is not in this file; its name was taken")
            command = (program, *command)
        if not command:
            self.lost(
                "command", image or "of the image", "the image's own command is not in this file", "write `command`"
            )
            command = NOT_KNOWN
        fields: Yaml = {"command": tuple(self.written(word) for word in command)}
        workdir = self.table.get("working_dir")
        if workdir is not None:
            place = self.text(workdir, "working_dir")
            if self.ours or not built.get("source"):
                fields["workdir"] = self.written(place.removeprefix(f"{APP}/") if self.ours else place)
            else:
                self.lost("working_dir", place, "a service starts in its `source`", "`workdir`, relative to it")
        runtime = self.table.get("runtime")
        by_runtime = {value: level for level, value in RUNTIMES.items()}
        if runtime in by_runtime:
            fields["isolation"] = by_runtime[runtime]
        elif self.ours and "cap_drop" not in self.table:
            fields["isolation"] = Level.PROCESS
        elif image is not None and not self.ours:
            fields["isolation"] = Level.SANDBOX
        if runtime is not None and runtime not in by_runtime:
            self.lost("runtime", str(runtime), "it is none of slum's levels")
        return fields

    def _listen(self, exposed: int | None) -> Yaml:
        if self.ours:
            return self._own_listen()
        ports = [_target(port) for port in (*(self.table.get("ports") or ()), *(self.table.get("expose") or ()))]
        known = [port for port in ports if port is not None]
        image = self.table.get("image")
        usual = PORTS.get(repository(str(image)), 0) if image and not self.table.get("build") else 0
        port = next(iter(known), None) or exposed or usual or None
        if port is None:
            return {"listen": Listen.NONE, "deploy": Deploy.REPLACE}
        if self.table.get("ports"):
            why = "slum's router serves every service by its host name"
            self.lost("ports", ", ".join(str(p) for p in self.table["ports"]), why, "`[routing] listen`")
        if len(set(known)) > 1:
            self.lost("ports", str(sorted(set(known) - {port})), "a service has one port", "a service for each")
        return {"listen": Listen.PORT, "port": port, "deploy": Deploy.REPLACE}

    def _own_listen(self) -> Yaml:
        fields: Yaml = {"deploy": Deploy.REPLACE}
        if "PORT" in self.own:
            return (
                fields
                | {"listen": Listen.PORT, "port": self.whole(self.own["PORT"], "environment.PORT")}
                | self._timeout(f"127.0.0.1:{self.own['PORT']}")
            )
        path = self.own.get("SOCKET_PATH")
        if path is None:
            return fields | {"listen": Listen.NONE}
        fields["listen"] = Listen.FD if "LISTEN_FDS" in self.own else Listen.SOCKET
        if path != SOCKET:
            fields["socket"] = "{data_dir}" + path.removeprefix(DATA)
        base = RUN if path == SOCKET else DATA
        return fields | self._timeout(f"unix//run/slum/{self.name}{path.removeprefix(base)}")

    def _timeout(self, upstream: str) -> Yaml:
        for to in (upstream, f"{self.name}:8080", f"{self.name}:8081"):
            if to in self.project.timeouts:
                return {"request_timeout_s": self.project.timeouts[to]}
        return {}

    def _limits(self) -> Yaml:
        limits = ((self.table.get("deploy") or {}).get("resources") or {}).get("limits") or {}
        memory, pids = (
            self.table.get("mem_limit", limits.get("memory")),
            self.table.get("pids_limit", limits.get("pids")),
        )
        cpus = self.table.get("cpus", limits.get("cpus"))
        vm = self.table.get("runtime") == RUNTIMES[Level.VM]
        fields: Yaml = {}
        if memory is not None and (count := bytes_of(self.text(memory, "mem_limit"))):
            fields["memory_mb" if vm else "memory_limit_mb"] = max(1, round(count / (1 << 20)))
        if pids is not None and (most := self.whole(pids, "pids_limit")) > 0:
            fields["pids_limit"] = most
        if cpus is not None and vm:
            fields["vcpus"] = max(1, self.whole(cpus, "cpus"))
        elif cpus is not None:
            self.lost("cpus", str(cpus), "slum weighs services against each other and caps none", "`cpu_shares`")
        if (shares := self.table.get("cpu_shares")) is not None:
            fields["cpu_shares"] = min(10_000, max(1, round(self.whole(shares, "cpu_shares") / SHARES_PER_WEIGHT)))
        return fields

    def _restart(self) -> Yaml:
        policy = self.text(self.table.get("restart", "no"), "restart")
        if policy.startswith("on-failure:"):
            self.lost("restart", policy, "slum counts restarts within a time", "`[settings] max_restarts`")
        word = policy.partition(":")[0].replace("unless-stopped", "always").replace("false", "no")
        kinds = {value: kind for kind, value in RESTARTS.items()}
        fields: Yaml = {"restart": kinds.get(word, Restart.ALWAYS)}
        if (grace := self.table.get("stop_grace_period")) is not None:
            fields["stop_timeout_s"] = min(3600.0, seconds_of(self.text(grace, "stop_grace_period")))
        return fields

    def _health(self, fields: Yaml) -> float | None:
        """Add health and startup_timeout to *fields*; return the interval."""
        check = self.table.get("healthcheck") or {}
        test = check.get("test")
        words = [self.text(word, "healthcheck.test") for word in test] if isinstance(test, list) else [str(test or "")]
        if fields["listen"] is not Listen.NONE and test is not None:
            if words[:2] == ["CMD", "slum-health"]:
                fields |= {"health": words[2]} if len(words) > 2 else {}
            elif found := re.search(r"https?://[^/\s\"']+(/[!-~]*?)(?=[\s\"']|$)", " ".join(words)):
                fields["health"] = found[1]
            else:
                why = "slum asks over HTTP, or whether the port answers"
                self.lost("healthcheck", " ".join(words)[:80], why, "`health` names a path")
        elif test is not None:
            self.lost("healthcheck", " ".join(words)[:80], "a service that takes no requests is not probed")
        if (start := check.get("start_period")) is not None:
            fields["startup_timeout_s"] = min(
                3600.0, max(0.1, seconds_of(self.text(start, "healthcheck.start_period")))
            )
        interval = check.get("interval")
        if interval is None:
            return None
        seconds = min(3600.0, max(0.1, seconds_of(self.text(interval, "healthcheck.interval"))))
        if not self.ours:
            self.lost("healthcheck.interval", duration(seconds), "a tenement has one interval for all", "`[settings]`")
        return seconds

    def _labels(self) -> dict[str, str]:
        labels = self.table.get("labels") or {}
        if self.ours and isinstance(labels, dict):
            return {str(key): fill(str(value)).text for key, value in labels.items()}
        if labels:
            self.lost("labels", f"{len(labels)} of them", "labels belong to a tenement")
        return {}

    def _replicas(self, fields: Yaml) -> list[str]:
        wanted = (self.table.get("deploy") or {}).get("replicas", self.table.get("scale", 1))
        count = self.whole(wanted, "deploy.replicas")
        if count > 1 and fields["listen"] is Listen.PORT:
            self.lost("deploy.replicas", str(count), "instances of one service cannot share one port", 'listen = "fd"')
            return [DEFAULT_ID]
        return [DEFAULT_ID] if count <= 1 else [str(number) for number in range(1, min(count, 1000) + 1)]


def _mount(item: object) -> tuple[str, str, str]:
    """Return (source, target, kind) of a volume in either syntax."""
    if isinstance(item, dict):
        return str(item.get("source", "")), str(item.get("target", "")), str(item.get("type", "volume"))
    parts = fill(str(item)).text.split(":")
    if len(parts) == 1:
        return "data", parts[0], "volume"
    return parts[0], parts[1], "bind" if parts[0].startswith((".", "/", "~")) else "volume"


def _target(port: object) -> int | None:
    """Return the container's port of an entry of `ports` or `expose`."""
    text = str(port.get("target")) if isinstance(port, dict) else fill(str(port)).text
    found = re.search(r"(\d{1,5})(?:-\d+)?(?:/(?:tcp|udp))?$", text)
    return int(found[1]) if found and 0 < int(found[1]) <= 65535 and not text.endswith("/udp") else None
