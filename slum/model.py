"""What a fleet is: the frozen types that every other module speaks, and the names and digests derived from them.

Pure data; the words are those of docs/architecture.md. A Fleet is fully resolved: fleetfile has done aliases and
defaults, so equal fleets mean equal machines. Everything here is a msgspec.Struct and so travels as JSON or
msgpack as it stands. Tuples are sorted by name, so that the same fleet has the same bytes.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec

from slum.frozen import Sparse

NAME_PATTERN = r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
"""Service, tenement, operator and fleet names: 1 to 32 of a-z, 0-9 and inner dashes."""
ID_PATTERN = r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?"
"""Instance ids: 1 to 40, so that a UUID fits."""
DEFAULT_ID = "main"


class Level(StrEnum):
    """The five isolation levels, weakest wall first; docs/isolation.md says what each means."""

    PROCESS = "process"
    NAMESPACE = "namespace"
    SANDBOX = "sandbox"
    WASM = "wasm"
    VM = "vm"


class Listen(StrEnum):
    """How a service takes requests: binds $SOCKET_PATH, is passed fd 3, binds $PORT, or takes none."""

    SOCKET = "socket"
    FD = "fd"
    PORT = "port"
    NONE = "none"


class Restart(StrEnum):
    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


class Deploy(StrEnum):
    OVERLAP = "overlap"
    REPLACE = "replace"


class Secret(Sparse):
    """Where a secret's value is found on the node: ``file:/abs`` or ``env:NAME``. Never the value."""

    name: str
    source: str


class EnvVar(Sparse):
    name: str
    value: str


class Service(Sparse):
    """One program. Durations are seconds, sizes MiB; None means no limit, or not used."""

    name: str
    command: tuple[str, ...]
    instances: tuple[str, ...] = (DEFAULT_ID,)
    isolation: Level = Level.NAMESPACE
    workdir: str | None = None
    source: str | None = None
    """The folder as the file names it, for people and exports; what runs is *bundle*."""
    bundle: str | None = None
    """sha256 of the packed source; None before packing and without a source."""
    build: str | None = None
    pre_deploy: str | None = None
    env: tuple[EnvVar, ...] = ()
    secrets: tuple[Secret, ...] = ()
    listen: Listen = Listen.SOCKET
    socket: str | None = None
    """A socket path of the service's own choosing (interpolated); None means the generation's default."""
    port: int | None = None
    health: str | None = None
    """Path of the health probe, e.g. "/healthz"; None means: accepting connections is healthy."""
    depends_on: tuple[str, ...] = ()
    deploy: Deploy = Deploy.OVERLAP
    drain_timeout_s: float = 30.0
    restart: Restart = Restart.ALWAYS
    startup_timeout_s: float = 30.0
    stop_timeout_s: float = 10.0
    request_timeout_s: float | None = None
    idle_timeout_s: float | None = None
    memory_limit_mb: int | None = None
    cpu_shares: int | None = None
    pids_limit: int | None = None
    storage_quota_mb: int | None = None
    image: str | None = None
    rootfs: str | None = None
    kernel: str | None = None
    memory_mb: int | None = None
    vcpus: int | None = None


class Settings(Sparse):
    """A tenement's [settings]."""

    data_dir: str | None = None
    """Base of the instances' own folders; None means the node's default (Home.services)."""
    health_check_interval_s: float = 10.0
    max_restarts: int = 5
    restart_window_s: float = 60.0
    backoff_base_ms: int = 500
    backoff_max_ms: int = 30_000


class Label(Sparse):
    name: str
    value: str


class Tenement(Sparse):
    """A machine (or *count* like ones) and the services that it runs."""

    name: str
    operator: str
    config: str | None = None
    """The tenement.toml it came from, as named in the file; for people and exports."""
    count: int = 1
    labels: tuple[Label, ...] = ()
    settings: Settings = Settings()
    services: tuple[Service, ...] = ()
    routing_listen: tuple[str, ...] = ("127.0.0.1:8080", "[::1]:8080")

    @property
    def machine_names(self) -> tuple[str, ...]:
        """The names of its machines: its own, or NAME-1..NAME-count when count is above 1."""
        return (self.name,) if self.count == 1 else tuple(f"{self.name}-{n}" for n in range(1, self.count + 1))

    @property
    def public_ports(self) -> tuple[int, ...]:
        """The ports on which its router takes requests from other machines, in order."""
        outside = (text for text in self.routing_listen if not text.startswith(("127.", "[::1]")))
        return tuple(sorted({int(text.rpartition(":")[2]) for text in outside}))


class LocalOperator(Sparse, tag="local", tag_field="type"):
    """This machine, or the one that runs member *member*."""

    name: str
    member: str | None = None


class SshHost(Sparse):
    host: str
    user: str | None = None
    port: int = 22
    labels: tuple[Label, ...] = ()
    fingerprint: str | None = None
    """``SHA256:...`` of the host key; wins over the operator's policy."""


class HostKeyPolicy(StrEnum):
    KNOWN_HOSTS = "known_hosts"
    ACCEPT_NEW = "accept-new"
    PINNED = "pinned"


class SshOperator(Sparse, tag="ssh", tag_field="type"):
    name: str
    hosts: tuple[SshHost, ...]
    user: str = "root"
    key: str | None = None
    jump: str | None = None
    jump_fingerprint: str | None = None
    """As a host's; the jump host obeys *host_key* else."""
    host_key: HostKeyPolicy = HostKeyPolicy.ACCEPT_NEW
    known_hosts: str | None = None


class FlyOperator(Sparse, tag="fly", tag_field="type"):
    name: str
    org: str
    region: str
    image: str | None = None
    cpu_kind: str = "shared"
    cpus: int = 1
    memory_mb: int = 512
    volume_gb: int = 3
    token_env: str = "FLY_API_TOKEN"
    secrets_ref: str | None = None


class HetznerOperator(Sparse, tag="hetzner", tag_field="type"):
    name: str
    location: str
    server_type: str
    image: str = "debian-12"
    ssh_keys: tuple[str, ...] = ()
    token_env: str = "HCLOUD_TOKEN"
    secrets_ref: str | None = None


class JoinOperator(Sparse, tag="join", tag_field="type"):
    """Machines that somebody else makes, and that join by themselves with a token."""

    name: str


Operator = LocalOperator | SshOperator | FlyOperator | HetznerOperator | JoinOperator


class Fleet(Sparse):
    """All that one slum.toml declares."""

    name: str = "default"
    domain: str = "localhost"
    operators: tuple[Operator, ...] = ()
    tenements: tuple[Tenement, ...] = ()

    def tenement(self, name: str) -> Tenement | None:
        return next((t for t in self.tenements if t.name == name), None)


class Key(Sparse, order=True, omit_defaults=False):
    """An instance's identity: (tenement machine, service, id)."""

    tenement: str
    service: str
    id: str

    def __str__(self) -> str:
        return f"{self.tenement}/{self.service}/{self.id}"

    def __hash__(self) -> int:
        return hash((self.tenement, self.service, self.id))


class Stamp(Sparse, order=True, omit_defaults=False):
    """What a pushed config is as new as; an agent ignores an older one."""

    generation: int = 0
    seq: int = 0


def operator_type(operator: Operator) -> str:
    """Return "local", "ssh", "fly", "hetzner" or "join"."""
    return str(operator.__struct_config__.tag)


def release_of(service: Service) -> str:
    """Return the 64-hex digest that names a service's release.

    It covers all that a running copy of it depends on; not which copies there are (*instances*), nor the name of the
    folder that its bundle was packed from, so neither restarts anything.
    """
    body = msgspec.structs.replace(service, instances=(), source=None)
    return hashlib.sha256(msgspec.json.encode(body, order="sorted")).hexdigest()


def host_name(service: str, instance: str | None, domain: str) -> str:
    """Return the name that routes to *service* (its first instance) or to one instance of it."""
    return f"{service}.{domain}" if instance is None else f"{instance}.{service}.{domain}"
