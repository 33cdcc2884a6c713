"""`slum run` and `slum exec` on the node: one command, its input and output joined to a stream, its status at the end.

A stream that breaks ends the command. Everything is carried as it comes, with back-pressure both ways.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping

import msgspec

from slum.errors import ConfigError, SlumError, Unreachable
from slum.model import Key, Level, Service
from slum.node.actions import PREPARED, Prepared
from slum.node.adopt import child_name
from slum.node.describe import Describer
from slum.node.enter import entering
from slum.node.hands import clear
from slum.node.limits.groups import Limits
from slum.node.observed import Ready, Starting
from slum.node.oneoff import RUN, Oneoffs
from slum.node.prepare import Preparer
from slum.node.pump import Stdio
from slum.node.roster import Roster
from slum.node.types import Runner, Spawn
from slum.node.websocket import WebSocket
from slum.wire import ExecRequest, RunRequest, StreamData, StreamEnd, StreamResize, encoder, on_stream

LINGER_S = 1.0
"""How long output may follow the command's end: its children may still hold it."""
COMMAND = ("/bin/sh", "-c", 'exec "$@"', "slum")
"""Before the command, inside the wall: what cannot be executed ends with 127 (not there) or 126 and one message, at every level."""
TERMINAL = ("/usr/bin/setsid", "--ctty", "--wait", "/bin/sh", "-c", 'trap : INT QUIT; (exec "$@"); exit $?', "slum")
"""The same with a terminal: its own session with it, so that ctrl-C reaches the command and not the wall.

The shell makes 128 + n of a signal that ends the command: setsid would complain, and end with n.
"""


class Shells:
    """One agent's."""

    def __init__(
        self,
        roster: Roster,
        describer: Describer,
        preparer: Preparer,
        oneoffs: Oneoffs,
        runners: Mapping[Level, Runner],
        limits: Limits,
    ) -> None:
        self._roster = roster
        self._describer = describer
        self._preparer = preparer
        self._oneoffs = oneoffs
        self._runners = runners
        self._limits = limits

    async def serve(self, request: ExecRequest | RunRequest, socket: WebSocket) -> None:
        """Run what *request* asks for over *socket*, to its end or that of the stream."""
        token = secrets.token_hex(6)
        try:
            if not request.command:
                raise ConfigError("no command was given")
            before = TERMINAL if request.tty else COMMAND
            request = msgspec.structs.replace(request, command=(*before, *request.command))
            key = self._key(request.service, request.id)
            if isinstance(request, RunRequest):
                spawn = self._run_spawn(key, request, token)
            else:
                spawn = await self._exec_spawn(key, request, token)
            status = await self._converse(spawn, request, socket)
            end = StreamEnd(status=status, error="" if status is not None else "the command ended unseen")
        except (SlumError, OSError) as error:
            end = StreamEnd(error=str(error))
        finally:
            await clear(self._limits, f"run-{token}")
        await socket.send(encoder.encode(end))

    def _key(self, service: str, instance: str | None) -> Key:
        keys = [k for k in self._roster.wants if k.service == service and instance in (None, k.id)]
        if not keys:
            raise ConfigError(f"no instance {service}/{instance or ''} is declared on this machine")
        return keys[0]

    def _run_spawn(self, key: Key, request: RunRequest, token: str) -> Spawn:
        release, service = self._runnable(key)
        instance = self._preparer.oneoff(key, release, service, f"{RUN}{token}", request.command, cgroup=f"run-{token}")
        return msgspec.structs.replace(self._runner(service).spawn(instance), log=None)

    def _runnable(self, key: Key) -> tuple[str, Service]:
        """Return the wanted release when it is prepared, else the one that runs or was last healthy."""
        want, seen = self._roster.wants[key], self._roster.seen(key)
        state = self._roster.preparations.get(want.release, PREPARED)
        if isinstance(state, Prepared) or self._preparer.folder(want.release) is not None:
            return want.release, want.service
        for generation in reversed(seen.living):
            return generation.release, generation.service
        if seen.good is not None:
            return seen.good.release, seen.good.service
        raise SlumError(f"{key.service} is not prepared yet: its bundle or build is missing", hint="slum ps")

    async def _exec_spawn(self, key: Key, request: ExecRequest, token: str) -> Spawn:
        seen = self._roster.seen(key)
        running = [g for g in seen.living if isinstance(g.stage, Ready | Starting)]
        generation = next((g for g in running if g.socket == seen.serving), running[-1] if running else None)
        keeper = self._oneoffs.keeper
        if generation is None:
            raise SlumError(
                f"{key.service}/{key.id} does not run", hint="`slum run` starts a command behind a wall of its own"
            )
        if keeper is None:
            raise Unreachable("the keeper is gone")
        name = child_name(key, generation.number)
        child = next((c for c in await keeper.list_children() if c.name == name and c.running), None)
        if child is None:
            raise SlumError(f"{key.service}/{key.id} has just ended", hint="slum ps")
        folder = self._preparer.folder(generation.release)
        instance = self._describer.describe(key, generation, self._roster.settings, folder)
        runner = self._runner(generation.service)
        return entering(instance, child, runner, f"{RUN}{token}", request.command)

    def _runner(self, service: Service) -> Runner:
        runner = self._runners.get(service.isolation)
        if runner is None:
            raise SlumError(f"level {service.isolation} is not available on this machine", hint="slum doctor")
        return runner

    async def _converse(self, spawn: Spawn, request: ExecRequest | RunRequest, socket: WebSocket) -> int | None:
        stdio = Stdio(tty=request.tty, rows=request.rows, columns=request.columns)
        try:
            async with asyncio.TaskGroup() as group:
                ended = group.create_task(
                    self._oneoffs.run(spawn, stdio.theirs, stdio.close_theirs), name=f"command {spawn.name}"
                )
                inward = group.create_task(_inward(socket, stdio), name=f"input {spawn.name}")
                outward = [
                    group.create_task(_outward(socket, stdio, channel), name=f"output {spawn.name}")
                    for channel in stdio.channels
                ]
                done, _ = await asyncio.wait((ended, inward), return_when=asyncio.FIRST_COMPLETED)
                if ended not in done:
                    raise Unreachable("the client went away")
                inward.cancel()
                await asyncio.wait(outward, timeout=LINGER_S)
                for task in outward:
                    task.cancel()
            return ended.result()
        except BaseExceptionGroup as errors:
            # Not except*: what is raised in one is wrapped in a group again by Python before 3.11.4.
            ours, others = errors.split(SlumError)
            if ours is None or others is not None:
                raise
            raise _first(ours) from None
        finally:
            stdio.close()


def _first(errors: BaseExceptionGroup[SlumError]) -> SlumError:
    inner = errors.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


async def _inward(socket: WebSocket, stdio: Stdio) -> None:
    """Carry input until the stream breaks."""
    while True:
        try:
            message = on_stream.decode(await socket.receive())
        except (Unreachable, msgspec.DecodeError):
            return
        match message:
            case StreamData(data=data, channel=0):
                await stdio.write(data)
            case StreamResize(rows=rows, columns=columns):
                stdio.resize(rows, columns)
            case StreamEnd():
                return


async def _outward(socket: WebSocket, stdio: Stdio, channel: int) -> None:
    async for data in stdio.read(channel):
        await socket.send(encoder.encode(StreamData(data=data, channel=channel)))
