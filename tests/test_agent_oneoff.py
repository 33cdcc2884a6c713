"""`slum run`, `slum exec`, builds and bundles through a real agent: status, input, terminal, walls, a stream that breaks."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import signal
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zstandard
from agent_support import Site, alive, site, until, worker
from fakes.member import Connection

from slum.model import Level, Service
from slum.wire import (
    ExecRequest,
    LogsRequest,
    Phase,
    RunRequest,
    StreamData,
    StreamEnd,
    StreamResize,
    on_stream,
)

BOTH = pytest.mark.parametrize("level", [Level.PROCESS, Level.NAMESPACE])


@pytest.fixture
async def here() -> AsyncIterator[Site]:
    async with site() as running:
        yield running


def bundle(**files: str) -> tuple[str, bytes]:
    """A packed source folder: its digest and its bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in sorted(files.items()):
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size, info.mode = len(text), 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
    data = zstandard.ZstdCompressor().compress(out.getvalue())
    return hashlib.sha256(data).hexdigest(), data


async def result(stream: Connection, given: bytes | None = b"") -> tuple[int | None, dict[int, str], str]:
    """Status, output by channel, and error of a command; *given* is its whole input, None leaves it open."""
    if given is not None:
        if given:
            stream.send(StreamData(data=given, channel=0))
        stream.send(StreamData(data=b"", channel=0))
    said = {1: b"", 2: b""}
    async with asyncio.timeout(20):
        while True:
            data = await stream.received.get()
            assert data is not None, said
            message = on_stream.decode(data)
            if isinstance(message, StreamEnd):
                stream.close()
                return message.status, {c: d.decode() for c, d in said.items()}, message.error
            assert isinstance(message, StreamData)
            said[message.channel] += message.data


async def run(
    here: Site, *command: str, name: str = "web", given: bytes | None = b""
) -> tuple[int | None, dict[int, str], str]:
    return await result(await here.member.stream(RunRequest(service=name, command=command)), given)


async def enter(
    here: Site, *command: str, name: str = "web", given: bytes | None = b""
) -> tuple[int | None, dict[int, str], str]:
    return await result(await here.member.stream(ExecRequest(service=name, command=command)), given)


def shell(level: Level, **changes: object) -> Service:
    return worker("web", **{"isolation": level, "env": {"COLOUR": "blue"}, **changes})


@BOTH
async def test_run_has_the_services_wall_data_and_environment(here: Site, level: Level) -> None:
    here.push(shell(level))
    await here.healthy()
    script = "echo $COLOUR $SLUM_INSTANCE; pwd; echo oops >&2; cat > $HOME/said; exit 7"
    status, said, error = await run(here, "sh", "-c", script, given=b"hello")
    data = here.home.services / "web" / "main"
    assert (status, said[2], error) == (7, "oops\n", "")
    assert said[1].split() == ["blue", "main", str(data)]
    assert (data / "said").read_text() == "hello"
    status, said, _ = await run(here, "sh", "-c", "kill -9 $$")
    assert status in (-9, 137)
    await until_gone(here)


@BOTH
async def test_exec_is_inside_the_running_instance(here: Site, level: Level) -> None:
    here.push(
        shell(
            level,
            command=("/bin/sh", "-c", "echo $$ > /tmp/mark-$SLUM_TEST; while :; do sleep 1; done"),
            env={"SLUM_TEST": here.home.run.parent.name},
        )
    )
    await here.healthy()
    mark = f"/tmp/mark-{here.home.run.parent.name}"
    status, said, error = await enter(
        here,
        "sh",
        "-c",
        f"cat {mark}; id -u; echo $SLUM_SERVICE; grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status | cut -f2; pwd",
    )
    assert (status, error) == (0, ""), said
    pid, uid, name, capabilities, no_new_privs, filtered, folder = said[1].split()
    assert (name, folder) == ("web", str(here.home.services / "web" / "main"))
    assert (int(capabilities, 16), no_new_privs) == (0, "1")
    assert filtered == ("2" if level is Level.NAMESPACE else "0")
    report = here.report()
    if level is Level.NAMESPACE:
        assert pid == "2"
    else:
        assert int(pid) == report.pid
        Path(mark).unlink()  # noqa: ASYNC240 - the service's own file
    assert int(uid) == (here.home.services / "web" / "main").stat().st_uid
    status, _, _ = await enter(here, "false")
    assert status == 1
    assert here.report().pid == report.pid
    await until_gone(here)


@BOTH
async def test_a_terminal_has_a_size_job_control_and_ctrl_c(here: Site, level: Level) -> None:
    here.push(shell(level))
    await here.healthy()
    for kind in (RunRequest, ExecRequest):
        request = kind(
            service="web",
            command=("sh", "-c", "stty size; trap 'echo caught; exit 5' INT; while :; do read x; stty size; done"),
            tty=True,
            rows=33,
            columns=99,
        )
        stream = await here.member.stream(request)
        assert (await read_until(stream, b"\n")).endswith(b"33 99\r\n")
        stream.send(StreamResize(rows=44, columns=111))
        stream.send(StreamData(data=b"\n", channel=0))
        await read_until(stream, b"44 111\r\n")
        stream.send(StreamData(data=b"\x03", channel=0))
        await read_until(stream, b"caught")
        status, _, error = await result(stream, None)
        assert (status, error) == (5, "")
    await until_gone(here)


@BOTH
async def test_a_signal_that_ends_a_command_at_a_terminal_is_its_status(here: Site, level: Level) -> None:
    here.push(shell(level))
    await here.healthy()
    for kind in (RunRequest, ExecRequest):
        stream = await here.member.stream(
            kind(service="web", command=("sh", "-c", "echo up; exec sleep 1000"), tty=True)
        )
        await read_until(stream, b"up\r\n")
        stream.send(StreamData(data=b"\x03", channel=0))
        status, said, error = await result(stream, None)
        assert (status, said[1].replace("^C", "").strip(), error) == (130, "", "")
    await until_gone(here)


async def read_until(stream: Connection, ending: bytes) -> bytes:
    said = b""
    async with asyncio.timeout(20):
        while ending not in said:
            data = await stream.received.get()
            assert data is not None, said
            message = on_stream.decode(data)
            assert isinstance(message, StreamData), (message, said)
            said += message.data
    return said


@BOTH
async def test_a_stream_that_breaks_ends_its_command(here: Site, level: Level) -> None:
    here.push(shell(level))
    await here.healthy()
    for kind in (RunRequest, ExecRequest):
        stream = await here.member.stream(kind(service="web", command=("sh", "-c", "echo up; sleep 1000")))
        await read_until(stream, b"up\n")
        child = next(c for n, c in (await here.children()).items() if n.startswith("x/run-"))
        stream.close()
        await until(lambda pid=child.pid: not alive(pid))
    await until_gone(here)
    assert here.report().phase is Phase.RUNNING
    assert here.report().restarts == 0


async def test_runs_die_with_the_agent(here: Site) -> None:
    here.push(shell(Level.PROCESS))
    await here.healthy()
    stream = await here.member.stream(RunRequest(service="web", command=("sh", "-c", "echo up; sleep 1000")))
    await read_until(stream, b"up\n")
    child = next(c for n, c in (await here.children()).items() if n.startswith("x/run-"))
    await here.kill_agent()
    await until(lambda: not alive(child.pid), 20)
    await until_gone(here)


async def until_gone(here: Site) -> None:
    """No one-off is left in the keeper."""
    async with asyncio.timeout(10):
        while any(n.startswith(("x/", "b/")) for n in await here.children()):  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.02)


async def test_what_cannot_be_run_says_why(here: Site) -> None:
    here.push(
        shell(Level.PROCESS),
        worker("walled", isolation=Level.NAMESPACE),
        worker("gone", script="exit 0", restart="never"),
    )
    await here.healthy("web", "walled")
    for name in ("web", "walled"):
        for request in (RunRequest, ExecRequest):
            for command, status, why in (
                ("frobnicate", 127, "frobnicate: not found"),
                ("./frobnicate", 127, "./frobnicate: not found"),
                ("/etc/passwd", 126, "/etc/passwd: Permission denied"),
            ):
                for tty in (False, True):
                    stream = await here.member.stream(request(service=name, command=(command,), tty=tty))
                    ended, said, error = await result(stream, None)
                    assert (ended, error) == (status, ""), (name, request, command, tty)
                    assert why in said[1 if tty else 2], (name, request, command, tty)
    await here.member.until(lambda: here.phase("gone") is Phase.EXITED)
    assert "does not run" in (await enter(here, "true", name="gone", given=None))[2]
    assert "is declared on this machine" in (await run(here, "true", name="nobody", given=None))[2]


@BOTH
async def test_a_bundle_is_fetched_built_once_and_run(here: Site, level: Level) -> None:
    digest, data = bundle(hello="hi from the bundle\n")
    here.member.blobs[digest] = data
    made = shell(level, bundle=digest, build="cat hello > built; echo was here >> built; echo building loudly")
    here.push(made)
    await here.healthy()
    status, said, error = await run(here, "sh", "-c", "cat built; touch built 2>&1 || echo sealed")
    assert (status, error) == (0, ""), said
    assert said[1].splitlines()[:2] == ["hi from the bundle", "was here"]
    if os.geteuid() == 0 or level is Level.NAMESPACE:
        assert said[1].splitlines()[-1] == "sealed"
    assert "building loudly" in here.home.instance_log("web", "main").read_text()
    before = (await here.keeper.stats()).children
    here.push(shell(level, bundle=digest, build=made.build, stop_timeout_s=1.0))
    await here.healthy()
    assert here.home.instance_log("web", "main").read_text().count("building loudly") == 1
    assert (await here.keeper.stats()).children <= before + 1


async def test_a_failing_build_fails_the_release_with_its_log(here: Site) -> None:
    digest, data = bundle(hello="x")
    here.member.blobs[digest] = data
    here.push(worker("web"))
    await here.healthy()
    here.push(worker("web", bundle=digest, build="echo no compiler; exit 3"))
    await here.member.until(lambda: here.phase() is Phase.FAILED)
    report = here.report()
    assert (report.detail, report.serving) == ("build: exit 3", 1)
    assert "no compiler" in here.home.instance_log("web", "main").read_text()
    assert "build_failed" in here.member.kinds()


async def test_a_kill_of_the_agent_amid_a_build_does_not_build_twice(here: Site) -> None:
    digest, data = bundle(hello="x")
    here.member.blobs[digest] = data
    here.push(worker("web", bundle=digest, build="echo begun; sleep 1; echo done > built"))
    await here.member.until(lambda: here.phase() is Phase.PENDING and here.report().detail == "building")
    log = here.home.instance_log("web", "main")
    await until(lambda: log.exists() and "begun" in log.read_text())
    await here.kill_agent()
    await here.healthy()
    assert log.read_text().count("begun") == 1


async def test_what_ended_while_there_was_no_agent_is_not_done_again(here: Site) -> None:
    digest, data = bundle(hello="x")
    here.member.blobs[digest] = data
    here.push(
        worker(
            "web",
            bundle=digest,
            build="echo begun; until test -e go; do sleep 0.01; done",
            pre_deploy="echo migrated; until test -e $HOME/go; do sleep 0.01; done",
        )
    )
    log = here.home.instance_log("web", "main")
    for word, name, go in (
        ("begun", "b/", lambda: next((here.home.bundles / "web").glob("*-*")) / "go"),
        ("migrated", "x/pre-", lambda: here.home.services / "web" / "main" / "go"),
    ):
        await until(lambda word=word: log.exists() and word in log.read_text())
        agent = (await here.children())["agent"]
        os.kill(agent.pid, signal.SIGSTOP)
        go().touch()

        async def ended(name: str = name) -> bool:
            return any(n.startswith(name) and not child.running for n, child in (await here.children()).items())

        async with asyncio.timeout(20):
            while not await ended():  # noqa: ASYNC110 - another process does it
                await asyncio.sleep(0.02)
        os.kill(agent.pid, signal.SIGKILL)
    await here.healthy()
    assert (log.read_text().count("begun"), log.read_text().count("migrated")) == (1, 1)


async def test_logs_are_read_and_followed_until_the_reader_leaves(here: Site) -> None:
    here.push(worker("web", script="i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done"))
    await here.healthy()
    log = here.home.instance_log("web", "main")
    await until(lambda: log.exists() and "tick 5" in log.read_text())
    status, said, _ = await result(await here.member.stream(LogsRequest(service="web", tail=3)), None)
    assert status == 0
    lines = said[1].splitlines()
    assert len(lines) == 3
    instance, at, text = lines[0].split(" ", 2)
    assert (instance, text[:5], float(at) > 1e9) == ("main", "tick ", True)
    stream = await here.member.stream(LogsRequest(service="web", follow=True, tail=1))
    await read_until(stream, b"tick 2")
    stream.close()
    bad = await result(await here.member.stream(LogsRequest(service="web", grep="(")), None)
    assert bad[2]
    agent = (await here.children())["agent"].pid
    await until(lambda: not Path(f"/proc/{agent}/task/{agent}/children").read_text().split())


async def test_a_bundle_that_cannot_be_fetched_is_waited_for_and_the_old_release_kept(here: Site) -> None:
    digest, data = bundle(hello="x")
    here.push(worker("web"))
    await here.healthy()
    await here.member.stop()
    desired = here.desired(worker("web", bundle=digest))
    here.member.desired = desired
    await here.member.start()
    await here.member.until(lambda: here.phase() is Phase.FAILED)
    assert "has no bundle" in here.report().detail
    assert here.report().serving == 1
    here.member.blobs[digest] = data
    here.push(worker("web", bundle=digest, stop_timeout_s=1.0))
    await here.healthy()
