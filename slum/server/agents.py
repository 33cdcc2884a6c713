"""The agents that dialled this member: one session a machine, what each last said, and the push of what it shall run.

An agent is told its Desired when it connects and whenever that changed; a newer connection of the same machine replaces
the older. What is heard stays in memory: reports, heartbeats. Silence makes a machine "unknown" and causes nothing.
Everything is bounded: a frame's size, the requests that wait to be sent (only the newest Desired waits), the notes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from slum import log, wire
from slum.errors import Unreachable
from slum.ledger.reader import MachineRow
from slum.model import Stamp
from slum.server.desired import advance
from slum.server.notes import Notes
from slum.server.peer import Guest
from slum.server.pulse import Pulse
from slum.server.view import World

if TYPE_CHECKING:
    from slum.server.elsewhere import Away

HELLO_S = 10.0
ADMIT_S = 10.0
"""How long an agent waits for its machine to be committed before it is sent away to dial again."""
SEND_S = 15.0
SILENCE_S = 30.0
"""A session that says nothing for so long is closed; heartbeats come every 5 s."""
UNKNOWN_S = 15.0
OPENS_MAX = 64
ELSEWHERE = "node:"
"""How the id of a machine begins whose agent dials over TLS."""


NONE = Stamp()


@dataclass(slots=True, kw_only=True)
class Seen:
    """The newest that is known of a machine from its agent; kept when the agent goes away."""

    hello: wire.Hello
    session: Session | Away | None
    """Here, or at the member that the agent dialled."""
    contact: float
    """Monotonic, of the last message."""
    instances: dict[tuple[str, str], wire.InstanceReport] = field(default_factory=dict)
    is_reported: bool = False
    """Whether a full report has come over the session of now."""
    stamp: Stamp = NONE
    """Of the config that the agent said it acts on."""
    stamp_at: float = 0.0
    """When that was first heard, in unix seconds."""
    as_of: Stamp = NONE
    """How far the ledger was where the agent dialled, when its config of then was what it acts on; NONE for one here."""
    refused: str = ""
    load: float = 0.0
    memory_available_bytes: int = 0
    rss_bytes: int = 0
    restarted: dict[tuple[str, str], int] = field(default_factory=dict)
    """The generation that each instance had when its restart was pushed: only a higher one is the restarted one."""

    def is_connected(self, now: float) -> bool:
        return self.session is not None and now - self.contact < UNKNOWN_S

    def acts_on(self, desired: wire.Desired) -> bool:
        """Tell whether the agent acts on *desired*, which members may have stamped at different times."""
        return max(self.stamp, self.as_of) >= desired.stamp


class Ear(Protocol):
    """Who wants to hear what the agents that dialled this member say."""

    def joined(self, machine: str, hello: bytes) -> None: ...

    def heard(self, machine: str, message: bytes, *, soon: bool) -> None: ...

    def lost(self, machine: str) -> None: ...

    def moved(self) -> None:
        """The ledger moved, and with it what the agents shall run."""
        ...


class Hub:
    """All sessions of this member, and what is known of the agents of others. *changed* beats at all that happens."""

    def __init__(self, changed: Pulse, notes: Notes) -> None:
        self.seen: dict[str, Seen] = {}
        self.desired: dict[str, wire.Desired] = {}
        self.started = time.monotonic()
        self._encoded: dict[str, bytes] = {}
        self.changed = changed
        self.ears: set[Ear] = set()
        self._notes = notes
        self._world: World | None = None
        self._moved = Pulse()
        self._servers: tuple[str, ...] = ()

    def take(self, world: World) -> None:
        """Accept a newer reading of the ledger: push what changed, let waiting agents in. Cheap when nothing changed."""
        if self._world is not None and self._world.seq == world.seq:
            return
        self._world = world
        if world.paused is not None:
            # What runs goes on as it is, whatever an older state says of it.
            self._moved.beat()
            return
        new = advance(self.desired, world)
        moved = [machine for machine, desired in new.items() if self.desired.get(machine) is not desired]
        old, self.desired = self.desired, new
        self._encoded = {machine: data for machine, data in self._encoded.items() if machine in new}
        for machine in moved:
            self._encoded.pop(machine, None)
            self._mark_restarts(machine, old.get(machine))
            seen = self.seen.get(machine)
            if seen is not None and seen.session is not None:
                seen.session.offer(self._encode(machine))
        former = {m for m, seen in self.seen.items() if _is_former(world.machines.get(m), seen.hello)}
        for machine in (self.seen.keys() - new.keys()) | former:
            seen = self.seen.pop(machine)
            if seen.session is not None:
                seen.session.end("the machine is not part of the fleet any more")
        self._moved.beat()
        self._tell_servers(world)
        for ear in self.ears:
            ear.moved()

    @property
    def stamp(self) -> Stamp:
        """How far the ledger is by what was pushed last."""
        return Stamp(generation=self._world.cluster.generation, seq=self._world.seq) if self._world else NONE

    def session(self, machine: str) -> Session | Away:
        """Return the session of *machine*'s agent, or raise Unreachable."""
        seen = self.seen.get(machine)
        if seen is None or seen.session is None:
            raise Unreachable(
                f"the agent of {machine} is not connected",
                hint="`slum status` tells since when; services go on meanwhile",
            )
        return seen.session

    def own_session(self, machine: str) -> Session:
        """Return the session of *machine*'s agent if it dialled this member, or raise Unreachable."""
        session = self.session(machine)
        if not isinstance(session, Session):
            raise Unreachable(f"the agent of {machine} has dialled another member", hint="try again")
        return session

    async def serve(self, websocket: WebSocket, guest: Guest | None) -> None:
        """Serve one agent's connection to its end; *guest* as in _admit."""
        await websocket.accept()
        try:
            async with asyncio.timeout(HELLO_S):
                hello = wire.from_agent.decode(await websocket.receive_bytes())
            if not isinstance(hello, wire.Hello):
                raise Refusal("the first message must be hello", fatal=True)
            await self._admit(hello, guest)
        except Refusal as refusal:
            log.get().warning("agent_refused", why=refusal.why, fatal=refusal.fatal)
            await websocket.send_bytes(wire.encoder.encode(wire.Refused(why=refusal.why, fatal=refusal.fatal)))
            await websocket.close()
            return
        except (TimeoutError, WebSocketDisconnect):
            return
        except (msgspec.DecodeError, KeyError) as error:
            log.get().warning("agent_not_understood", error=str(error))
            await websocket.close(1003)
            return
        await self._converse(websocket, hello)

    async def _admit(self, hello: wire.Hello, guest: Guest | None) -> None:
        """Return when *hello*'s machine exists by the ledger; Refusal when it does not within ADMIT_S.

        *guest* is whom the agent's certificate names; None for one on this machine's own socket.
        """
        if hello.protocol != wire.PROTOCOL:
            raise Refusal(
                f"this member speaks protocol {wire.PROTOCOL}, the agent {hello.protocol}: upgrade the older one"
            )
        end = asyncio.get_running_loop().time() + ADMIT_S
        while True:
            seen = self._moved.count
            row = self._world.machines.get(hello.tenement) if self._world else None
            if row is not None and _is_of(row, hello, guest):
                return
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                raise Refusal(f"{hello.machine} is not (yet) the machine {hello.tenement!r} of this fleet")
            await self._moved.wait(seen, left)

    def names_bundle(self, guest: Guest, digest: str) -> bool:
        """Tell whether *guest* is the node of a machine of now whose config names the bundle *digest*."""
        row = self._world.machines.get(guest.name) if self._world else None
        desired = self.desired.get(guest.name)
        if row is None or desired is None or guest.key != f"{row.machine}.{row.incarnation}":
            return False
        return any(service.bundle == digest for service in desired.services)

    async def _converse(self, websocket: WebSocket, hello: wire.Hello) -> None:
        session = Session(websocket, hello.tenement)
        seen = self._begin(session, hello)
        log.get().info("agent_connected", machine=hello.tenement, id=hello.machine, version=hello.version)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._listen(session, seen), name=f"agent {session.machine} in")
                group.create_task(session.speak(), name=f"agent {session.machine} out")
        except* Ended as ended:
            log.get().info("agent_disconnected", machine=session.machine, why=str(ended.exceptions[0]))
        finally:
            session.is_open = False
            if seen.session is session:
                seen.session = None
                for ear in self.ears:
                    ear.lost(session.machine)
            self.changed.beat()

    def _begin(self, session: Session, hello: wire.Hello) -> Seen:
        machine = session.machine
        before = self.seen.get(machine)
        if before is not None and before.session is not None:
            before.session.end("a newer connection of the same machine")
        seen = self.adopt(Seen(hello=hello, session=session, contact=time.monotonic()), machine)
        if machine in self.desired:
            session.offer(self._encode(machine))
        if self._servers and hello.machine.startswith(ELSEWHERE):
            session.tell(wire.Servers(servers=self._servers))
        for ear in self.ears:
            ear.joined(machine, wire.encoder.encode(hello))
        self.changed.beat()
        return seen

    def adopt(self, seen: Seen, machine: str) -> Seen:
        """Take *seen* for what is known of *machine*, with what was known of it before."""
        before = self.seen.get(machine)
        if before is not None and before.hello.machine == seen.hello.machine:
            seen.instances = before.instances
            seen.stamp_at, seen.restarted = before.stamp_at, before.restarted
        self.seen[machine] = seen
        return seen

    def _tell_servers(self, world: World) -> None:
        """Tell the agents of machines elsewhere where members answer, when that has changed."""
        servers = tuple(f"https://{member.api}" for member in world.cluster.members if member.api)
        if servers == self._servers:
            return
        self._servers = servers
        for seen in self.seen.values():
            if isinstance(seen.session, Session) and seen.hello.machine.startswith(ELSEWHERE):
                seen.session.tell(wire.Servers(servers=servers))

    def _encode(self, machine: str) -> bytes:
        data = self._encoded.get(machine)
        if data is None:
            data = self._encoded[machine] = wire.encoder.encode(self.desired[machine])
        return data

    def _mark_restarts(self, machine: str, before: wire.Desired | None) -> None:
        """Remember the generation of each instance whose restart is being asked, to tell the new one from it."""
        seen = self.seen.get(machine)
        if seen is None or before is None or not (seen.session is None or isinstance(seen.session, Session)):
            return  # the member that it dialled tells, which knew before the agent
        counts = {(o.service, o.id): o.restarts for o in before.overrides}
        for override in self.desired[machine].overrides:
            key = (override.service, override.id)
            if override.restarts > counts.get(key, 0):
                report = seen.instances.get(key)
                numbers = [g.number for g in report.generations] if report else []
                seen.restarted[key] = max(numbers, default=0)

    async def _listen(self, session: Session, seen: Seen) -> None:
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    data = await session.websocket.receive_bytes()
                    message = wire.from_agent.decode(data)
            except TimeoutError:
                raise Ended(f"silent for {SILENCE_S:g} s") from None
            except WebSocketDisconnect as error:
                raise Ended(f"closed with {error.code}") from error
            except (msgspec.DecodeError, KeyError) as error:
                raise Ended(f"not understood: {error}") from error
            seen.contact = time.monotonic()
            if not session.is_open:
                raise Ended("ended by this member")
            match message:
                case wire.Report():
                    merge(seen, message)
                    self.changed.beat()
                    self._tell(session.machine, data, soon=True)
                case wire.Heartbeat():
                    merge_figures(seen, message)
                    self._tell(session.machine, data, soon=False)
                case wire.Note():
                    self._notes.add(session.machine, message)
                case wire.Hello():
                    raise Ended("a second hello")

    def _tell(self, machine: str, message: bytes, *, soon: bool) -> None:
        for ear in self.ears:
            ear.heard(machine, message, soon=soon)


class Session:
    """One agent's connection, as the rest of the server uses it: what is to be said waits here, bounded."""

    def __init__(self, websocket: WebSocket, machine: str) -> None:
        self.websocket = websocket
        self.machine = machine
        self.is_open = True
        self._desired: bytes | None = None
        self._opens: deque[wire.OpenStream | wire.Servers] = deque()
        self._wake = asyncio.Event()
        self._why = ""

    def offer(self, desired: bytes) -> None:
        """Send *desired* next; one that still waits is replaced by it."""
        self._desired = desired
        self._wake.set()

    def open(self, request: wire.OpenStream) -> None:
        if not self.is_open or len(self._opens) >= OPENS_MAX:
            raise Unreachable(f"the agent of {self.machine} does not take requests now", hint="try again")
        self._opens.append(request)
        self._wake.set()

    def tell(self, servers: wire.Servers) -> None:
        """Say where members answer; what it was not told it learns when it connects again."""
        if len(self._opens) < OPENS_MAX:
            self._opens.append(servers)
            self._wake.set()

    def end(self, why: str) -> None:
        self.is_open = False
        self._why = why
        self._wake.set()

    async def speak(self) -> None:
        """Send what waits until the session ends; raises Ended."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self.is_open:
                await self._close()
            while self._desired is not None or self._opens:
                if self._desired is not None:
                    data, self._desired = self._desired, None
                else:
                    data = wire.encoder.encode(self._opens.popleft())
                try:
                    async with asyncio.timeout(SEND_S):
                        await self.websocket.send_bytes(data)
                except TimeoutError:
                    raise Ended(f"did not read for {SEND_S:g} s") from None
                except (WebSocketDisconnect, RuntimeError) as error:
                    raise Ended("gone while being told") from error

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(1.0):
                await self.websocket.close(1000, self._why)
        except (TimeoutError, WebSocketDisconnect, RuntimeError) as error:
            raise Ended(self._why) from error
        raise Ended(self._why)


class Ended(Exception):
    """A session is over."""


class Refusal(Exception):
    def __init__(self, why: str, *, fatal: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.fatal = fatal


def _is_of(row: MachineRow, hello: wire.Hello, guest: Guest | None) -> bool:
    """Tell whether who says *hello* is the machine that *row* is about, and that is there or may be."""
    if guest is None:
        return row.machine_id == hello.machine and row.state in EXISTING
    # Its agent may be here before whoever made the machine has said that it is made.
    key = f"{row.machine}.{row.incarnation}"
    ours = (guest.name, guest.key, hello.machine) == (row.machine, key, f"{ELSEWHERE}{key}")
    return ours and row.state in (*EXISTING, "creating")


def _is_former(row: MachineRow | None, hello: wire.Hello) -> bool:
    """Tell whether *hello* was said by a machine elsewhere that was given up for a later one of the same name."""
    return (
        hello.machine.startswith(ELSEWHERE)
        and row is not None
        and hello.machine != f"{ELSEWHERE}{row.machine}.{row.incarnation}"
    )


def merge(seen: Seen, report: wire.Report) -> None:
    """Take over what an agent reports."""
    if report.full:
        seen.instances = {}
        seen.is_reported = True
    for instance in report.instances:
        seen.instances[instance.service, instance.id] = instance
    for gone in report.gone:
        seen.instances.pop(gone, None)
    if report.stamp != seen.stamp:
        seen.stamp, seen.stamp_at = report.stamp, time.time()
    seen.refused = report.refused


def merge_figures(seen: Seen, heartbeat: wire.Heartbeat) -> None:
    seen.load = heartbeat.load
    seen.memory_available_bytes = heartbeat.memory_available_bytes
    seen.rss_bytes = heartbeat.rss_bytes
    for stats in heartbeat.stats:
        report = seen.instances.get((stats.service, stats.id))
        if report is not None:
            seen.instances[stats.service, stats.id] = msgspec.structs.replace(
                report, memory_bytes=stats.memory_bytes, cpu_s=stats.cpu_s, requests=stats.requests
            )


def instances_of(seen: Mapping[str, Seen], machine: str) -> Mapping[tuple[str, str], wire.InstanceReport]:
    """Return the newest reports of *machine*'s instances by (service, id)."""
    return seen[machine].instances if machine in seen else {}


EXISTING = frozenset({"created", "destroying"})
