"""A control plane in memory, behind the real HTTP API on a real unix socket: what the command line is tested against.

It keeps what the server promises: revisions and conflicts, request ids that count once, blobs verified by digest, events as
pages and as a stream, progress that arrives, shells that really run. Faults are asked for by attribute: answers cut after
the commit, 503, services that fail, a progress that never arrives.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import os
import pty
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from slum import api, wire
from slum.errors import ConfigError, Conflict, QuorumLost, SlumError
from slum.model import Fleet, release_of

START = 1_700_000_000.0


class FakeFleet:
    """The state, and the faults that a test wants."""

    def __init__(self) -> None:
        self.revision = 0
        self.fleets: dict[int, api.FleetDoc] = {0: api.FleetDoc(revision=0, fleet=Fleet())}
        self.views: dict[str, api.InstanceView] = {}
        self.overrides: dict[str, tuple[wire.Override, ...]] = {}
        self.event_list: list[api.Event] = []
        self.lines: list[api.LogLine] = []
        self.blobs: dict[str, bytes] = {}
        self.answers: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: set[str] = set()
        self.faults: list[tuple[str, str]] = []
        """(what "METHOD path" begins with, "busy" | "cut before" | "cut after"), each used once."""
        self.stuck = False
        self.now = START + 3600
        self.changed = threading.Event()

    @property
    def fleet(self) -> Fleet:
        return self.fleets[self.revision].fleet

    @property
    def seq(self) -> int:
        return 100 + len(self.event_list)

    def event(self, kind: str, subject: str, **more: Any) -> None:
        number = len(self.event_list) + 1
        seq = more.pop("seq", 100 + number)
        event = api.Event(
            seq=seq, number=number, at=START + number, actor="root@test", kind=kind, subject=subject, **more
        )
        self.event_list.append(event)

    def set_fleet(self, fleet: Fleet) -> None:
        """Make *fleet* the next revision, and what runs like it at once."""
        before = {key: view.report.release for key, view in self.views.items()}
        self.revision += 1
        at = START + 10 * self.revision
        self.fleets[self.revision] = api.FleetDoc(revision=self.revision, fleet=fleet, at=at, actor="root@test")
        self.event("fleet_applied", f"fleet:{fleet.name}", why="apply", after={"revision": self.revision})
        views = {}
        for tenement in fleet.tenements:
            for machine in tenement.machine_names:
                for service in tenement.services:
                    for instance in service.instances:
                        key = f"{machine}/{service.name}/{instance}"
                        old = self.views.get(key)
                        if old is not None and before[key] == release_of(service):
                            views[key] = old
                        else:
                            number = 1 + (old.report.serving or 0 if old else 0)
                            views[key] = self._view(machine, service, instance, number, fleet.domain, at)
        self.views = views

    def _view(self, machine: str, service: Any, instance: str, number: int, domain: str, at: float) -> api.InstanceView:
        routed = service.listen != "none"
        phase = wire.Phase.HEALTHY if routed else wire.Phase.RUNNING
        release = release_of(service)
        exits: tuple[wire.Exit, ...] = ()
        serving: int | None = number
        detail = ""
        if service.name in self.broken:
            phase, detail = wire.Phase.FAILED, "exit 2, 3 times in 2.1 s"
            exits = tuple(wire.Exit(at=at + n, generation=number + n, status=2, ran_s=0.1) for n in range(3))
            serving = number - 1 or None
            self.lines.append(
                api.LogLine(tenement=machine, service=service.name, id=instance, at=at, text="no module named 'ap'")
            )
        report = wire.InstanceReport(
            service=service.name,
            id=instance,
            phase=phase,
            release=release,
            serving=serving,
            serving_release=release if serving == number else "0" * 64,
            generations=(wire.GenerationReport(number=number, release=release, phase=phase, pid=4121, started_at=at),),
            exits=exits,
            restarts=max(0, len(exits) - 1),
            detail=detail,
            pid=4121,
            since=at,
            memory_bytes=14 << 20,
            cpu_s=36.0,
            requests=7 if routed else None,
            url=f"http://{service.name}.{domain}:8080" if routed else None,
        )
        return api.InstanceView(tenement=machine, isolation=service.isolation, report=report)

    def status(self) -> api.Status:
        counts: dict[str, int] = {}
        for view in self.views.values():
            counts[view.report.phase] = counts.get(view.report.phase, 0) + 1
        members = (api.MemberView(id="m1", role="leader"), api.MemberView(id="m2", role="down", lag=35, contact_s=14.0))
        return api.Status(
            version="0.1.0",
            fleet=self.fleet.name if self.revision else "",
            domain=self.fleet.domain,
            revision=self.revision,
            pid=4242,
            data_dir="/var/lib/slum",
            started_at=START,
            now=self.now,
            ledger=api.LedgerView(
                cluster="c1", generation=1, epoch=4, term=2, seq=self.seq, leader="m1", members=members
            ),
            tenements=self.tenements(),
            counts=counts,
        )

    def cluster(self) -> api.ClusterView:
        """A leader, and one that has been away for a while."""
        return api.ClusterView(
            member="m1",
            cluster="c1",
            role="leader",
            leader="m1",
            generation=1,
            epoch=4,
            term=2,
            seq=self.seq,
            age_s=0.0,
            majority=True,
            protocol=1,
            members=(
                api.ClusterMember(
                    id="m1", role="leader", address="10.0.0.1:7444", epoch=4, seq=self.seq, lag=0, contact_s=0.0
                ),
                api.ClusterMember(
                    id="m2", role="down", address="10.0.0.2:7444", api="10.0.0.2:7443", lag=35, contact_s=14.0
                ),
            ),
        )

    def tenements(self) -> tuple[api.TenementView, ...]:
        return tuple(
            api.TenementView(
                name=machine,
                tenement=tenement.name,
                operator=tenement.operator,
                state="ready",
                machine="local:m1",
                host="box",
                contact_s=0.2,
                cpus=2,
                memory_bytes=4 << 30,
                load=0.25,
                memory_available_bytes=3 << 30,
                instances=sum(view.tenement == machine for view in self.views.values()),
            )
            for tenement in self.fleet.tenements
            for machine in tenement.machine_names
        )


class FakeApi:
    """The server; use it in a with statement. *fleet* may be touched from the test's thread."""

    def __init__(self, socket: Path, fleet: FakeFleet) -> None:
        self.socket = socket
        self.fleet = fleet
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FakeApi:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = uvicorn.Config(
            self._guarded,
            uds=str(self.socket),
            ws="wsproto",
            loop="asyncio",
            interface="asgi3",
            proxy_headers=False,
            lifespan="off",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="fake-api")
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the fake API did not start")

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            self._thread.join(10)
            assert not self._thread.is_alive()
            self.socket.unlink(missing_ok=True)

    async def _guarded(self, scope: Any, receive: Any, send: Any) -> None:
        """Note the request, and play the fault that is asked for."""
        if scope["type"] != "http":
            await self._app()(scope, receive, send)
            return
        line = f"{scope['method']} {scope['path']}"
        self.fleet.requests.append(line)
        fault = next((f for f in self.fleet.faults if line.startswith(f[0])), None)
        if fault is not None:
            self.fleet.faults.remove(fault)
        if fault is None:
            await self._app()(scope, receive, send)
        elif fault[1] == "busy":
            await _answer_error(QuorumLost("the ledger has no leader"))(scope, receive, send)
        else:
            if fault[1] == "cut after":
                await self._app()(scope, receive, _swallow)
            send.__self__.transport.abort()

    def _app(self) -> Starlette:
        f = self.fleet

        async def put_fleet(request: Request) -> Response:
            wanted = msgspec.json.decode(await request.body(), type=api.ApplyRequest)
            if wanted.request_id in f.answers:
                return Response(f.answers[wanted.request_id], media_type="application/json")
            if wanted.base_revision != f.revision:
                return _answer_error(
                    Conflict(
                        f"revision is {f.revision}, your plan was made on {wanted.base_revision}",
                        hint="look at `slum plan` and apply again",
                        changes=("root@ops changed service notes.memory_limit_mb 256 -> 512",),
                    )
                )
            f.set_fleet(wanted.fleet)
            done = api.Applied(revision=f.revision, seq=f.seq, changed=True)
            f.answers[wanted.request_id] = msgspec.json.encode(done)
            f.changed.set()
            return _answer(done)

        async def actions(request: Request) -> Response:
            wanted = msgspec.json.decode(await request.body(), type=api.ActionRequest)
            if wanted.request_id not in f.answers:
                keys = [
                    key
                    for key, view in f.views.items()
                    if wanted.service in ("", view.report.service)
                    and wanted.id in (None, view.report.id)
                    and wanted.tenement in (None, view.tenement)
                ]
                for key in keys:
                    phase = wire.Phase.STOPPED if wanted.verb in ("stop", "drain") else wire.Phase.HEALTHY
                    report = msgspec.structs.replace(f.views[key].report, phase=phase)
                    f.views[key] = msgspec.structs.replace(f.views[key], report=report)
                    f.event({"stop": "instance_stopped"}.get(wanted.verb, "instance_started"), f"instance:{key}")
                f.answers[wanted.request_id] = msgspec.json.encode(api.Acted(seq=f.seq, instances=tuple(keys)))
            return Response(f.answers[wanted.request_id], media_type="application/json")

        async def progress(request: Request) -> Response:
            async def steps() -> AsyncIterator[api.Progress]:
                for view in f.tenements():
                    yield api.Progress(what="tenement", name=view.name, state="agent ready", took_s=0.4, final=True)
                failed = []
                for key, view in sorted(f.views.items()):
                    report = view.report
                    yield api.Progress(what="instance", name=key, service=report.service, state="starting")
                    if f.stuck:
                        continue
                    ok = report.phase != wire.Phase.FAILED
                    failed += [] if ok else [key]
                    yield api.Progress(
                        what="instance",
                        name=key,
                        service=report.service,
                        state=report.phase,
                        detail=report.detail,
                        took_s=0.3,
                        ok=ok,
                        final=True,
                        serving=report.serving,
                        logs=tuple(line.text for line in f.lines if line.service == report.service) if not ok else (),
                    )
                while f.stuck:  # noqa: ASYNC110 - it is set by another thread
                    await asyncio.sleep(0.05)
                yield api.Progress(what="done", ok=not failed, failed=tuple(failed), final=True)

            return _stream(steps())

        async def events(request: Request) -> Response:
            query = request.query_params
            after = int(query.get("after", 0))

            def matching(cursor: int) -> list[api.Event]:
                return [
                    e
                    for e in f.event_list
                    if e.number > cursor
                    and query.get("kind") in (None, e.kind)
                    and query.get("actor") in (None, e.actor)
                    and (query.get("service") is None or query["service"] in re.split("[:/]", e.subject))
                ]

            async def following() -> AsyncIterator[api.Event]:
                cursor = after
                while True:
                    for event in matching(cursor):
                        cursor = event.number
                        yield event
                    await asyncio.sleep(0.02)

            if "text/event-stream" in request.headers.get("accept", ""):
                return _stream(following())
            found, limit = matching(after), int(query.get("limit", 100))
            return _answer(found[-limit:] if query.get("newest") else found[:limit])

        async def logs(request: Request) -> Response:
            query = request.query_params
            found = [
                line
                for line in f.lines
                if line.service == query["service"]
                and query.get("id") in (None, line.id)
                and line.at >= float(query.get("since", 0))
                and ("grep" not in query or re.search(query["grep"], line.text))
            ]
            if "tail" in query:
                found = found[-int(query["tail"]) :] if query["tail"] != "0" else []

            async def lines() -> AsyncIterator[api.LogLine]:
                for line in found:
                    yield line
                told = len(f.lines)
                while query.get("follow"):
                    for line in f.lines[told:]:
                        yield line
                    told = len(f.lines)
                    await asyncio.sleep(0.02)

            return _stream(lines())

        async def explain(request: Request) -> Response:
            name = request.path_params["service"]
            views = tuple(view for view in f.views.values() if view.report.service == name)
            if not views and not any(name in re.split("[:/]", e.subject) for e in f.event_list):
                near = difflib.get_close_matches(name, [view.report.service for view in f.views.values()], n=1)
                return _answer_error(ConfigError(f"no service {name!r}; did you mean {near[0]!r}?" if near else "none"))
            found = tuple(e for e in f.event_list if e.kind == "fleet_applied" or name in re.split("[:/]", e.subject))
            unwell = tuple(line for line in f.lines if line.service == name)
            desired = f"revision {f.revision}, by root@test" if views else ""
            return _answer(
                api.Explanation(
                    service=name, instances=views, events=found if views else (), logs=unwell, desired=desired
                )
            )

        async def blob(request: Request) -> Response:
            digest = request.path_params["digest"]
            if request.method == "HEAD":
                return Response(status_code=200 if digest in f.blobs else 404)
            body = await request.body()
            if hashlib.sha256(body).hexdigest() != digest:
                return _answer_error(ConfigError("the blob does not have that digest"))
            f.blobs[digest] = body
            return Response(status_code=201)

        async def fleet_doc(request: Request) -> Response:
            revision = int(request.query_params.get("revision", f.revision))
            if revision not in f.fleets:
                return _answer_error(ConfigError(f"there is no revision {revision}"))
            return _answer(f.fleets[revision])

        async def state(request: Request) -> Response:
            return _answer(
                api.State(
                    revision=f.revision,
                    fleet=f.fleet,
                    seq=f.seq,
                    tenements=f.tenements(),
                    instances=tuple(f.views.values()),
                    overrides=f.overrides,
                )
            )

        async def revisions(request: Request) -> Response:
            return _answer(
                [
                    api.Revision(revision=n, at=doc.at, actor=doc.actor, why="apply", summary="", digest="")
                    for n, doc in f.fleets.items()
                ]
            )

        async def machines(request: Request) -> Response:
            return _answer(
                [
                    api.MachineView(
                        name=t.name, tenement=t.tenement, operator=t.operator, id=t.machine, state="created"
                    )
                    for t in f.tenements()
                ]
            )

        async def check(request: Request) -> Response:
            return _answer(api.FleetCheck())

        async def simple(request: Request) -> Response:
            if request.url.path == "/v1/status":
                return _answer(f.status())
            if request.url.path == "/v1/cluster":
                return _answer(f.cluster())
            if request.url.path == "/v1/instances":
                return _answer(list(f.views.values()))
            if request.url.path == "/v1/events/verify":
                return _answer(api.Verified(ok=True, events=len(f.event_list), seq=f.seq))
            return _answer({"ok": True})

        return Starlette(
            routes=[
                *(
                    Route(f"/v1/{path}", simple)
                    for path in ("health", "status", "cluster", "instances", "events/verify")
                ),
                Route("/v1/state", state),
                Route("/v1/machines", machines),
                Route("/v1/fleet/check", check, methods=["POST"]),
                Route("/v1/fleet", fleet_doc),
                Route("/v1/fleet", put_fleet, methods=["PUT"]),
                Route("/v1/revisions", revisions),
                Route("/v1/explain/{service}", explain),
                Route("/v1/actions", actions, methods=["POST"]),
                Route("/v1/progress", progress),
                Route("/v1/events", events),
                Route("/v1/logs", logs),
                Route("/v1/blobs/{digest}", blob, methods=["PUT", "HEAD"]),
                WebSocketRoute("/v1/exec", shell),
                WebSocketRoute("/v1/run", shell),
            ]
        )


async def shell(socket: WebSocket) -> None:
    """Run the command for real, at a pseudo terminal when *tty* is asked for."""
    query = socket.query_params
    command = query.getlist("command")
    if command[:1] == ["refused"]:
        await socket.send_denial_response(_answer_error(ConfigError("that instance does not run", hint="start it")))
        return
    await socket.accept()
    if query.get("tty"):
        await _terminal(socket, command, int(query["rows"]), int(query["columns"]))
        return
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    except OSError as error:
        await _send(socket, wire.StreamEnd(error=f"cannot run {command[0]}: {error.strerror}"))
        return
    stdin = child.stdin
    assert stdin is not None

    async def give_input() -> None:
        try:
            while True:
                message = wire.on_stream.decode(await socket.receive_bytes())
                if isinstance(message, wire.StreamData) and not stdin.is_closing():
                    stdin.write(message.data)
                    if not message.data:
                        stdin.close()
        except WebSocketDisconnect:
            if child.returncode is None:
                child.kill()

    async def take(stream: asyncio.StreamReader | None, channel: int) -> None:
        assert stream is not None
        while data := await stream.read(65536):
            await _send(socket, wire.StreamData(data=data, channel=channel))

    feeding = asyncio.create_task(give_input(), name="input")
    await asyncio.gather(take(child.stdout, 1), take(child.stderr, 2))
    status = await child.wait()
    await _send(socket, wire.StreamEnd(status=status))
    await _stop(feeding)
    stdin.close()


async def _stop(feeding: asyncio.Task[None]) -> None:
    feeding.cancel()
    await asyncio.gather(feeding, return_exceptions=True)


async def _terminal(socket: WebSocket, command: list[str], rows: int, columns: int) -> None:
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    child = await asyncio.create_subprocess_exec(
        *command, stdin=follower, stdout=follower, stderr=follower, preexec_fn=lambda: _own_terminal(follower)
    )
    os.close(follower)
    loop = asyncio.get_running_loop()

    async def give_input() -> None:
        try:
            while True:
                message = wire.on_stream.decode(await socket.receive_bytes())
                if isinstance(message, wire.StreamResize):
                    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", message.rows, message.columns, 0, 0))
                elif isinstance(message, wire.StreamData):
                    os.write(leader, message.data or b"\x04")
        except WebSocketDisconnect:
            if child.returncode is None:
                child.kill()

    out: asyncio.Queue[bytes] = asyncio.Queue()

    def readable() -> None:
        try:
            data = os.read(leader, 65536)
        except OSError:
            loop.remove_reader(leader)
            data = b""
        out.put_nowait(data)

    loop.add_reader(leader, readable)
    feeding = asyncio.create_task(give_input(), name="input")
    while data := await out.get():
        await _send(socket, wire.StreamData(data=data))
    await _send(socket, wire.StreamEnd(status=await child.wait()))
    await _stop(feeding)
    os.close(leader)


def _own_terminal(follower: int) -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)


async def _send(socket: WebSocket, message: wire.OnStream) -> None:
    try:
        await socket.send_bytes(wire.encoder.encode(message))
    except (WebSocketDisconnect, RuntimeError):
        return  # the client has gone


async def _swallow(message: object) -> None:
    return


def _answer(document: object) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


def _answer_error(error: SlumError) -> Response:
    details = error.problems if isinstance(error, ConfigError) else getattr(error, "changes", ())
    problem = api.Problem(code=error.code, message=error.message, hint=error.hint, details=tuple(details))
    return Response(
        msgspec.json.encode({"error": problem}), status_code=api.STATUS[error.code], media_type="application/json"
    )


def _stream(documents: AsyncIterator[Any]) -> Response:
    async def body() -> AsyncIterator[bytes]:
        yield b": hello\n\n"
        async for document in documents:
            yield b"data: " + msgspec.json.encode(document) + b"\n\n"

    return StreamingResponse(body(), media_type="text/event-stream")
