"""From a declared service to an Instance: its folders, sockets, environment, command and secrets, all filled in.

Inputs: the model, this machine's folders, uids and limits. It makes the instance's folders and its cgroup, and reads secrets
at their sources, on this machine, at each start: their values exist only in the Instance that it returns, and must never be
logged or stored. Starts nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from slum.errors import ConfigError, SlumError
from slum.interpolate import interpolate
from slum.model import Key, Listen, Secret, Service, Settings
from slum.node.adopt import listener_name
from slum.node.limits.groups import Limits
from slum.node.observed import Generation
from slum.node.secretenv import lookup, secret_file
from slum.node.sockets import make_data_folder, make_run_folder, open_to_traversal
from slum.node.types import Instance
from slum.node.uids import ROUTER_UID, Uids
from slum.paths import Home, short_key

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SECRET_BYTES_MAX = 64 << 10


class Describer:
    """Describes instances of one machine. *environ* is where ``env:NAME`` secrets are found."""

    def __init__(self, home: Home, limits: Limits, environ: Mapping[str, str]) -> None:
        self.home = home
        self.uids = Uids(home.agent / "uids.json") if os.geteuid() == 0 else None
        self._limits = limits
        self._environ = environ

    def uid(self, service: str) -> int | None:
        return self.uids.uid_of(service) if self.uids else None

    def give_uids(self, services: Iterable[str]) -> None:
        """Have a uid for each of *services*, with one write for all."""
        if self.uids is not None:
            self.uids.give(services)

    def data_folder(self, key: Key, settings: Settings) -> Path:
        base = Path(settings.data_dir) if settings.data_dir else self.home.services
        return base / key.service / key.id

    def misplaced(self, services: Iterable[str], settings: Settings) -> str:
        """Return why ``data_dir`` cannot be used, in words: what lies below it would be slum's own; empty when it can."""
        if settings.data_dir is None:
            return ""
        base = Path(os.path.realpath(settings.data_dir))
        own, free = [Path(os.path.realpath(each)) for each in (self.home.data, self.home.run)], self.home.services
        for name in services:
            folder = base / name
            if any(folder.is_relative_to(each) for each in own) and base != Path(os.path.realpath(free)):
                return f"data_dir: {folder} would lie in slum's own folder; choose another, or leave it out"
        return ""

    def socket_path(self, key: Key, service: Service, socket: int, settings: Settings) -> Path:
        """Return the path of socket number *socket*: the generation's own, or the fixed one that the service chose."""
        own = self.home.generation_socket(str(key), socket)
        if service.socket is None:
            return own
        data = self.data_folder(key, settings)
        text = interpolate(
            service.socket, name=service.name, id=key.id, data_dir=str(data), socket=str(own), port=service.port
        )
        return data / text

    def trusted_base(self, key: Key, path: Path, settings: Settings) -> Path:
        """Return the folder above *path* that the service cannot replace, from which links are refused."""
        for folder in (self.home.instance_run(str(key)), self.data_folder(key, settings)):
            if path.is_relative_to(folder):
                return folder
        return Path("/")

    def describe(self, key: Key, generation: Generation, settings: Settings, bundle: Path | None) -> Instance:
        """Return the Instance of *generation*, whose folders and cgroup are there; SlumError or OSError says why not."""
        service, uid = generation.service, self.uid(generation.service.name)
        path = self.socket_path(key, service, generation.socket, settings)
        data, run = self.make_folders(key, service, settings, path)
        name = f"i/{short_key(str(key))}/{generation.number}"
        cgroup = self._limits.prepare(
            cgroup_name(key, generation.number), service.memory_limit_mb, service.cpu_shares, service.pids_limit
        )
        fill = Filler(key, service, data, path)
        return Instance(
            key=key,
            service=service,
            release=generation.release,
            generation=generation.number,
            name=name,
            command=tuple(fill(word) for word in service.command),
            env=self.environment(key, service, data, path),
            uid=uid,
            gid=uid,
            bundle=bundle,
            data=data,
            run=run,
            workdir=workdir(service, fill, bundle or data),
            log=self.home.instance_log(key.service, key.id),
            listener=listener_name(key, generation.socket) if service.listen is Listen.FD else None,
            cgroup=cgroup,
        )

    def oneoff(
        self,
        key: Key,
        release: str,
        service: Service,
        settings: Settings,
        bundle: Path | None,
        name: str,
        command: tuple[str, ...],
        *,
        cgroup: str,
    ) -> Instance:
        """Return *command* behind a wall of its own like the service's: same user, folders, environment and limits."""
        uid = self.uid(service.name)
        path = self.home.generation_socket(str(key), 0)
        data, run = self.make_folders(key, service, settings, path)
        env = self.environment(key, service, data, path)
        env.pop("SOCKET_PATH", None)
        return Instance(
            key=key,
            service=service,
            release=release,
            generation=0,
            name=name,
            command=command,
            env=env,
            uid=uid,
            gid=uid,
            bundle=bundle,
            data=data,
            run=run,
            workdir=workdir(service, Filler(key, service, data, path), bundle or data),
            log=self.home.instance_log(key.service, key.id),
            cgroup=self._limits.prepare(cgroup, service.memory_limit_mb, service.cpu_shares, service.pids_limit),
        )

    def make_folders(self, key: Key, service: Service, settings: Settings, path: Path) -> tuple[Path, Path]:
        """Return the instance's data and run folders, which exist with the right owners."""
        uid = self.uid(service.name)
        data, run = self.data_folder(key, settings), self.home.instance_run(str(key))
        make_run_folder(run, uid=uid, router_gid=ROUTER_UID)
        make_data_folder(data, uid=uid, gid=uid)
        if uid is not None and path.is_relative_to(data):
            open_to_traversal(data, ROUTER_UID)
        return data, run

    def environment(self, key: Key, service: Service, data: Path, path: Path) -> dict[str, str]:
        """Return the service's whole environment, the values of its secrets included."""
        fill = Filler(key, service, data, path)
        env = {"PATH": PATH, "HOME": str(data)}
        env |= {"SLUM_SERVICE": service.name, "SLUM_INSTANCE": key.id, "SLUM_TENEMENT": key.tenement}
        if service.listen in (Listen.SOCKET, Listen.FD):
            env["SOCKET_PATH"] = str(path)
        if service.port is not None:
            env["PORT"] = str(service.port)
        env |= {entry.name: fill(entry.value) for entry in service.env}
        env |= {secret.name: self._secret(service, secret) for secret in service.secrets}
        return env

    def _secret(self, service: Service, secret: Secret) -> str:
        kind, _, where = secret.source.partition(":")
        if kind == "env":
            value = lookup(self.home, where, self._environ)
            if value is None:
                place = secret_file(self.home)
                raise ConfigError(
                    f"secret {secret.name} of {service.name}: there is no {where} in {place} nor in the agent's environment",
                    hint=f"add the line {where}=... to {place} (mode 0600), then `slum restart {service.name}`",
                )
            return value
        try:
            with open(where, "rb", opener=_at_once) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ConfigError(f"secret {secret.name} of {service.name}: {where} is no file")
                data = file.read(SECRET_BYTES_MAX + 1)
            if len(data) > SECRET_BYTES_MAX or b"\0" in data:
                raise ConfigError(f"secret {secret.name} of {service.name}: {where} is no short text")
            return data.decode().removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise SlumError(f"secret {secret.name} of {service.name}: {where} cannot be read: {why}") from None


class Filler:
    """Fills in the placeholders of one instance's texts."""

    def __init__(self, key: Key, service: Service, data: Path, path: Path) -> None:
        self._values = {"name": service.name, "id": key.id, "data_dir": str(data), "socket": str(path)}
        self._port = service.port

    def __call__(self, text: str) -> str:
        return interpolate(text, **self._values, port=self._port)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a FIFO in the place of a file would hold up the whole agent."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def workdir(service: Service, fill: Filler, base: Path) -> Path:
    return base / fill(service.workdir) if service.workdir else base


def cgroup_name(key: Key, number: int | str) -> str:
    """Return the name of a generation's own cgroup: overlapping ones are measured and killed apart."""
    return f"{short_key(str(key))}-{number}"
