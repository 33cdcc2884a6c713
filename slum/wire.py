"""What an agent and a member say to each other, over one WebSocket that the agent dials: msgpack, one message a frame.

Unknown fields are ignored, new fields have defaults: neighbouring versions understand each other. The agent opens
 ``/v1/agent`` and says Hello; the member answers Desired at once and at each change of that tenement's config. Logs
and shells use streams of their own: the member says OpenStream, the agent dials ``/v1/agent/streams/{id}`` and speaks
StreamData and StreamEnd there. Times are unix seconds.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from slum.frozen import Sparse
from slum.model import Service, Settings, Stamp

PROTOCOL = 1
FRAME_BYTES_MAX = 8 << 20


class Phase(StrEnum):
    """The state of an instance, as people read it in `slum ps`."""

    PENDING = "pending"
    """Desired, nothing started yet: waits for a dependency, a bundle, a build or pre_deploy (see detail)."""
    STARTING = "starting"
    RUNNING = "running"
    """Takes no requests, and its process lives."""
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    BACKOFF = "backoff"
    FAILED = "failed"
    """Given up: tried again on a new release or by `slum restart`."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    """Stopped on purpose, by `slum stop`."""
    EXITED = "exited"
    """Ended by itself and not to be restarted (restart = "never", or "on-failure" after exit 0)."""


SETTLED = frozenset({Phase.RUNNING, Phase.HEALTHY, Phase.FAILED, Phase.STOPPED, Phase.EXITED, Phase.UNHEALTHY})


class Message(Sparse, tag_field="t", tag=str.lower):
    pass


class LevelStatus(Sparse):
    level: str
    available: bool
    detail: str
    """How it was proven, or why not."""
    fix: str = ""


class Exit(Sparse):
    """One end of a process; *status* is None when nobody saw it, negative for a signal."""

    at: float
    generation: int
    status: int | None
    oom: bool = False
    ran_s: float = 0.0


class GenerationReport(Sparse):
    number: int
    release: str
    phase: Phase
    pid: int | None
    started_at: float
    serving: bool = False
    draining: bool = False


class InstanceReport(Sparse):
    service: str
    id: str
    phase: Phase
    release: str | None = None
    """The desired release that this report is about."""
    generation: int | None = None
    """Number of the newest generation of that release, also when it has ended; None before there was one."""
    serving: int | None = None
    """Number of the generation that the route points to (or, without a route, that runs)."""
    serving_release: str | None = None
    generations: tuple[GenerationReport, ...] = ()
    exits: tuple[Exit, ...] = ()
    """The newest ones, oldest first; at most 10."""
    restarts: int = 0
    retry_at: float | None = None
    detail: str = ""
    """Why it is in this phase, in one line: "exit 2, 3 times in 2.1 s", "waits for db", "building"."""
    health: str = ""
    """The last probe's answer: "GET /healthz -> 503 in 4 ms: database is locked"."""
    pid: int | None = None
    since: float = 0.0
    """When this phase began."""
    memory_bytes: int | None = None
    cpu_s: float | None = None
    requests: int | None = None
    url: str | None = None


class Override(Sparse):
    """What `slum stop`, `start` and `restart` asked of one instance, beside its release."""

    service: str
    id: str
    stopped: bool = False
    restarts: int = 0
    """Counts the restarts that were asked for; a higher number than the agent knew means one more."""


# --- agent to member --------------------------------------------------------------------------------------------------


class Hello(Message):
    protocol: int
    version: str
    machine: str
    """The machine's id: "local:m1" for a local operator's machine."""
    tenement: str
    stamp: Stamp
    """Of the config that the agent holds."""
    boot_id: str
    host: str
    cpus: int
    memory_bytes: int
    levels: tuple[LevelStatus, ...] = ()
    limits: str = ""
    """"cgroup v1", "cgroup v2", or "" when none works."""
    dialled_at: float = 0.0
    """When, by the agent's clock: of two connections of one machine the later one counts."""


class Report(Message):
    """Instances whose report changed since the last one (all of them when *full*)."""

    stamp: Stamp
    """The config that the agent acts on."""
    at: float
    full: bool
    instances: tuple[InstanceReport, ...] = ()
    gone: tuple[tuple[str, str], ...] = ()
    """(service, id) of instances that are no longer there."""
    refused: str = ""
    """Why the agent cannot act on the config at all (a level that is missing, say)."""


class Heartbeat(Message):
    """Every 5 s; *stats* holds instances whose figures moved."""

    at: float
    load: float
    memory_available_bytes: int
    rss_bytes: int
    stats: tuple[InstanceStats, ...] = ()


class InstanceStats(Sparse):
    service: str
    id: str
    memory_bytes: int | None = None
    cpu_s: float | None = None
    requests: int | None = None


class Note(Message):
    """Something happened to an instance that people will ask about; becomes an event. *kind* is snake_case, past."""

    kind: str
    service: str
    id: str
    at: float
    detail: str
    generation: int | None = None
    release: str | None = None


class StreamData(Message):
    """Bytes of a stream: log lines (channel 1), or a shell's input (0), output (1), errors (2).

    A logs stream carries whole lines, one or many a frame: ``ID UNIX_SECONDS TEXT\\n``, the id of the instance first.
    """

    data: bytes
    channel: int = 1


class StreamResize(Message):
    rows: int
    columns: int


class StreamEnd(Message):
    """The last frame: *status* is the command's exit status, *error* says why there is none."""

    status: int | None = None
    error: str = ""


# --- member to agent --------------------------------------------------------------------------------------------------


class Desired(Message):
    """All that one tenement shall run. The agent caches it on disk and acts on it until a newer one comes."""

    stamp: Stamp
    cluster: str
    revision: int
    fleet: str
    tenement: str
    domain: str
    settings: Settings
    services: tuple[Service, ...] = ()
    routing_listen: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()


class LogsRequest(Sparse, tag="logs", tag_field="kind"):
    service: str
    id: str | None = None
    """None: all instances of the service."""
    follow: bool = False
    since: float | None = None
    tail: int | None = None
    grep: str | None = None
    """A Python regular expression, searched in each line."""
    generation: int | None = None
    """Only what this generation wrote; None: all."""


class ExecRequest(Sparse, tag="exec", tag_field="kind"):
    """A command inside the wall of a running instance."""

    service: str
    id: str | None = None
    command: tuple[str, ...] = ()
    tty: bool = False
    rows: int = 24
    columns: int = 80


class RunRequest(Sparse, tag="run", tag_field="kind"):
    """A one-off command behind a new wall like the service's, with its data, environment and secrets."""

    service: str
    id: str | None = None
    command: tuple[str, ...] = ()
    tty: bool = False
    rows: int = 24
    columns: int = 80


class OpenStream(Message):
    id: str
    request: LogsRequest | ExecRequest | RunRequest


class Refused(Message):
    """The member will not serve this agent; *fatal* means: do not dial again with this identity."""

    why: str
    fatal: bool = False


class Servers(Message):
    """Where members answer: said at once to an agent that dialled over TLS, and at each change. It keeps them on disk."""

    servers: tuple[str, ...]
    """https://HOST:PORT each."""


FromAgent = Hello | Report | Heartbeat | Note
ToAgent = Desired | OpenStream | Refused | Servers
OnStream = StreamData | StreamResize | StreamEnd

encoder = msgspec.msgpack.Encoder()
from_agent = msgspec.msgpack.Decoder(FromAgent)
to_agent = msgspec.msgpack.Decoder(ToAgent)
on_stream = msgspec.msgpack.Decoder(OnStream)
