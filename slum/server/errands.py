"""What another member's server may ask of this one: the answering side of memberwire, one errand a connection.

Its caller has proven by its certificate that it is a member. An errand that changes a machine is done only for a leader that
is not older than what this member has applied. Errors are answers, not broken connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from slum import log
from slum.errors import ConfigError, QuorumLost, SlumError
from slum.operators.base import Machine
from slum.operators.local import Local
from slum.server import memberwire
from slum.server.boot import operator_site
from slum.server.cluster import change_here
from slum.server.feed import Feeder
from slum.server.problems import BUG, Missing, problem_of
from slum.server.route import Call
from slum.server.routes_pause import get_pause
from slum.server.routes_read import get_machines
from slum.server.streams import close, pipe

if TYPE_CHECKING:
    from slum.server.control import Control

ASK_S = 10.0
CHUNK_S = 60.0
READABLE = {"machines": get_machines, "pause": get_pause}


async def serve(control: Control, websocket: WebSocket) -> None:
    """Do the one errand that *websocket* brings."""
    await websocket.accept()
    try:
        async with asyncio.timeout(ASK_S):
            asked = memberwire.ask.decode(await websocket.receive_bytes())
    except (TimeoutError, WebSocketDisconnect, KeyError):
        return
    except msgspec.DecodeError as error:
        log.get().warning("errand_not_understood", error=str(error))
        await websocket.close(1003)
        return
    try:
        await _serve(control, websocket, asked)
    except (WebSocketDisconnect, RuntimeError) as error:
        log.get().info("errand_cut_short", errand=type(asked).__name__, why=str(error))
        return
    await close(websocket)


async def _serve(control: Control, websocket: WebSocket, asked: memberwire.AnyAsk) -> None:
    match asked:
        case memberwire.Feed():
            await Feeder(control).run(websocket)
        case memberwire.Open():
            await _open(control, websocket, asked)
        case memberwire.Fetch():
            await _fetch(control, websocket, asked)
        case _:
            await _say(websocket, await _answer(control, websocket, asked))


async def _answer(control: Control, websocket: WebSocket, asked: memberwire.AnyAsk) -> memberwire.Answer:
    try:
        match asked:
            case memberwire.Observe(cluster=cluster, fence=fence):
                return memberwire.Answer(machines=await _local(control, fence).observe(cluster))
            case memberwire.Create(spec=spec, fence=fence):
                machine: Machine = await _local(control, fence).create(spec)
                return memberwire.Answer(machines=(machine,))
            case memberwire.Destroy(machine_id=machine_id, fence=fence):
                await _local(control, fence).destroy(machine_id)
            case memberwire.Change():
                return memberwire.Answer(members=await change_here(control, asked))
            case memberwire.Read(what=what):
                return memberwire.Answer(body=msgspec.json.encode(await _read(control, websocket, what)))
            case memberwire.Store(digest=digest):
                await control.blobs.put(digest, _chunks(websocket))
    except SlumError as error:
        return memberwire.Answer(problem=problem_of(error))
    except (WebSocketDisconnect, RuntimeError):
        raise
    except Exception:  # noqa: BLE001  the edge: a bug is answered as one, with its traceback in the log
        log.get().exception("errand_failed", errand=type(asked).__name__)
        return memberwire.Answer(problem=BUG)
    return memberwire.Answer()


def _local(control: Control, fence: memberwire.Fence) -> Local:
    """Return the operator of this machine for a leader of *fence*; QuorumLost for one that a newer one has replaced."""
    cluster = control.world().cluster
    if fence < (cluster.generation, cluster.epoch, cluster.term):
        raise QuorumLost("another leader has been elected since", hint="it goes on with this")
    return Local(operator_site(control.home, control.me))


async def _read(control: Control, websocket: WebSocket, what: str) -> object:
    leader = await control.link.leader()
    if not leader.is_self or what not in READABLE:
        raise QuorumLost(f"{control.me} does not lead, or knows no {what!r}", hint="try again")
    return await READABLE[what](Call(control=control, connection=websocket))


async def _open(control: Control, websocket: WebSocket, asked: memberwire.Open) -> None:
    try:
        session = control.hub.own_session(asked.machine)
        async with control.streams.open(session, asked.request) as end:
            await _say(websocket, memberwire.Answer())
            await pipe(websocket, end)
    except SlumError as error:
        await _say(websocket, memberwire.Answer(problem=problem_of(error)))


async def _fetch(control: Control, websocket: WebSocket, asked: memberwire.Fetch) -> None:
    try:
        if not control.blobs.touch(asked.digest):
            raise Missing(f"no blob {asked.digest}")
        with control.blobs.path(asked.digest).open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, memberwire.CHUNK_BYTES):
                async with asyncio.timeout(CHUNK_S):
                    await websocket.send_bytes(b"\x00" + chunk)
    except SlumError as error:
        await websocket.send_bytes(b"\x01" + memberwire.encode(memberwire.Answer(problem=problem_of(error))))
        return
    except TimeoutError:
        return
    await websocket.send_bytes(b"\x01" + memberwire.encode(memberwire.Answer()))


async def _chunks(websocket: WebSocket) -> AsyncIterator[bytes]:
    while True:
        try:
            async with asyncio.timeout(CHUNK_S):
                chunk = await websocket.receive_bytes()
        except TimeoutError:
            raise ConfigError("the bundle stopped coming") from None
        if not chunk:
            return
        yield chunk


async def _say(websocket: WebSocket, answer: memberwire.Answer) -> None:
    async with asyncio.timeout(ASK_S):
        await websocket.send_bytes(memberwire.encode(answer))
