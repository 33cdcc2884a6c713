"""What every runner owes, whatever its wall: exact environment, folders, socket, descriptors, signals and exit status."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from walls_support import PYTHON, Yard, descendants, open_limits, open_yard, some_uid, wait_until

from slum.model import Level
from slum.node.runners.registry import probe_levels, runners
from slum.node.types import Available, Unavailable
from slum.node.uids import ROUTER_UID
from slum.paths import Home

pytestmark = pytest.mark.root
UID = some_uid()
LOOK = """
import json, os, resource
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "env": dict(os.environ), "cwd": os.getcwd(), "uid": os.getresuid(), "gid": os.getresgid(), "groups": os.getgroups(),
    "nnp": status["NoNewPrivs"].strip(), "capabilities": int(status["CapEff"], 16),
    "core": resource.getrlimit(resource.RLIMIT_CORE), "nofile": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    "ignored": int(status["SigIgn"], 16) & ~0x1_8100_1000, "blocked": int(status["SigBlk"], 16),
}))
"""


@pytest.fixture
def yard() -> Iterator[Yard]:
    with open_yard() as opened:
        yield opened


@pytest.fixture(params=[Level.PROCESS, Level.NAMESPACE])
def level(request: pytest.FixtureRequest) -> Level:
    return request.param


def test_the_level_is_proven(yard: Yard, level: Level) -> None:
    found = yard.runners[level].probe()
    assert isinstance(found, Available), found
    assert " ms" in found.how


def test_the_program_starts_with_what_was_asked_and_no_more(yard: Yard, level: Level) -> None:
    made = yard.instance("look", (PYTHON, "-c", LOOK), uid=UID, env={"GREETING": "good day"})
    status, output = yard.run(level, made)
    assert status == 0, output
    seen = json.loads(output)
    # 0x1001000 is SIGPIPE and SIGXFSZ, which Python itself ignores; 0x180000000 is 32 and 33, which libc keeps for itself, so that
    # a caller who ignores them hands that on. PWD is the shell's and bubblewrap's courtesy; LC_CTYPE is Python's own.
    assert {name: value for name, value in seen["env"].items() if name not in ("PWD", "LC_CTYPE")} == made.env
    assert seen["cwd"] == str(made.workdir)
    assert seen["uid"] == seen["gid"] == [UID] * 3
    assert set(seen["groups"]) <= {UID}
    assert (seen["nnp"], seen["capabilities"]) == ("1", 0)
    assert seen["core"] == [0, 0]
    assert seen["nofile"] >= 1024
    assert (seen["ignored"], seen["blocked"]) == (0, 0)


def test_data_is_writable_and_the_bundle_is_not(yard: Yard, level: Level) -> None:
    code = """
import os
open(os.environ["HOME"] + "/kept", "w").write("yes")
open("/tmp/scratch-of-" + str(os.getpid()), "w").close(); os.unlink("/tmp/scratch-of-" + str(os.getpid()))
print(open("page").read())
try:
    open("page", "w")
except OSError as error:
    print(type(error).__name__)
"""
    made = yard.instance("writer", (PYTHON, "-c", code), uid=UID, files={"page": "hello"})
    status, output = yard.run(level, made)
    assert status == 0, output
    assert output.splitlines()[0] == "hello"
    assert output.splitlines()[1] in ("PermissionError", "OSError")
    assert (made.data / "kept").read_text() == "yes"
    assert (made.data / "kept").stat().st_uid == UID


def test_the_router_can_connect_to_its_socket(yard: Yard, level: Level) -> None:
    """The router's uid shares no group with the service; the folder's set-group-id bit and the umask let it in."""
    code = """
import os, socket
server = socket.create_server(os.environ["SOCKET_PATH"], family=socket.AF_UNIX)
print("ready", flush=True)
server.accept()[0].sendall(b"served")
"""
    made = yard.instance("web", (PYTHON, "-c", code), uid=UID)
    path = yard.home.generation_socket(str(made.key), 1)
    made = msgspec.structs.replace(made, env={**made.env, "SOCKET_PATH": str(path)})
    running = yard.start(level, made)
    running.read_until(b"ready")
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        os.setgroups([])
        os.setresgid(ROUTER_UID, ROUTER_UID, ROUTER_UID)
        os.setresuid(ROUTER_UID, ROUTER_UID, ROUTER_UID)
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                os.write(write_end, client.recv(100))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as answer:
        assert answer.read() == b"served"
    os.waitpid(pid, 0)
    assert running.wait() == 0


def test_a_listener_becomes_descriptor_3(yard: Yard, level: Level) -> None:
    code = """
import os, socket
assert os.environ["LISTEN_PID"] == str(os.getpid()), (os.environ["LISTEN_PID"], os.getpid())
assert os.environ["LISTEN_FDS"] == "1" and os.environ["LISTEN_FDNAMES"] == "web"
others = set(os.listdir("/proc/self/fd")) - {"0", "1", "2", "3"}
assert len(others) == 1, others  # the listing's own
server = socket.socket(fileno=3)
server.accept()[0].sendall(b"served")
"""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(yard.root / "l.sock"))
        server.listen()
        made = yard.instance("fd", (PYTHON, "-c", code), uid=UID, listener="web")
        running = yard.start(level, made, {"web": server})
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(yard.root / "l.sock"))
            assert client.recv(100) == b"served"
        assert running.wait() == 0, running.output


def test_without_a_listener_there_is_no_listen_env_nor_descriptor(yard: Yard, level: Level) -> None:
    code = "import os; print([k for k in os.environ if 'LISTEN' in k], len(os.listdir('/proc/self/fd')))"
    assert yard.run(level, yard.instance("bare", (PYTHON, "-c", code), uid=UID)) == (0, "[] 4\n")


def test_signals_and_exit_status(yard: Yard, level: Level) -> None:
    assert yard.run(level, yard.instance("three", ("sh", "-c", "exit 3"), uid=UID))[0] == 3
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    made = yard.instance("polite", (PYTHON, "-c", code), uid=UID)
    signalling = yard.runners[level].spawn(made).signalling
    for depth, number, wanted in (
        (signalling.term_depth, signal.SIGTERM, (7,)),
        (signalling.kill_depth, signal.SIGKILL, (-9, 137)),
    ):
        running = yard.start(level, made)
        running.read_until(b"ready")
        os.kill(descendants(running.pid)[depth], number)
        assert running.wait() in wanted


def test_a_program_without_handlers_dies_of_term(yard: Yard, level: Level) -> None:
    """It would not as pid 1 of its namespace."""
    made = yard.instance("plain", (PYTHON, "-c", "print('ready', flush=True); import signal; signal.pause()"), uid=UID)
    running = yard.start(level, made)
    running.read_until(b"ready")
    os.kill(descendants(running.pid)[yard.runners[level].spawn(made).signalling.term_depth], signal.SIGTERM)
    assert running.wait() in (-15, 143)


def test_a_relative_command_is_meant_from_the_workdir(yard: Yard, level: Level) -> None:
    made = yard.instance("script", ("./run.sh", "there"), uid=UID, files={"run.sh": '#!/bin/sh\necho "here and $1"\n'})
    assert made.bundle is not None
    (made.bundle / "run.sh").chmod(0o755)
    assert yard.run(level, made) == (0, "here and there\n")


def test_nothing_of_the_wall_is_left_when_a_daemonizing_program_ends(yard: Yard, level: Level) -> None:
    """Programs may leave children behind; the group finds them, whatever they did to escape."""
    escape = "import os, signal\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n    os.close(1); os.close(2)\n    signal.pause()\n  os._exit(0)"
    with open_limits(yard.home) as limits:
        cgroup = limits.prepare("leaver")
        if not cgroup.procs_files:
            pytest.skip("no cgroups here")
        made = yard.instance("leaver", (PYTHON, "-c", escape), uid=UID, cgroup=cgroup)
        yard.start(level, made).reap()
        left = Path(cgroup.procs_files[0])
        wait_until(lambda: left.read_text(), "the daemon is there")
        limits.kill("leaver")
        wait_until(lambda: limits.remove("leaver"), "the group is empty")


@pytest.mark.timeout(120)
def test_500_starts_leave_no_cgroup_and_no_mount(yard: Yard, level: Level) -> None:
    with open_limits(yard.home) as limits:
        made = yard.instance("rounds", ("true",), uid=UID)
        for number in range(500):
            name = f"round-{number}"
            once = msgspec.structs.replace(made, cgroup=limits.prepare(name, pids=20))
            assert yard.run(level, once)[0] == 0
            yard.started.clear()
            wait_until(partial(limits.remove, name), "the group is empty")
        assert limits.list() == ()
    assert str(yard.root) not in Path("/proc/self/mountinfo").read_text()
    assert len(os.listdir("/proc/self/fd")) < 60


def test_levels_without_a_runner_say_so() -> None:
    found = probe_levels(runners(Home(data=Path("/nonexistent/d"), run=Path("/nonexistent/r"))))
    assert list(found) == list(Level)
    for name in (Level.SANDBOX, Level.WASM, Level.VM):
        unavailable = found[name]
        assert isinstance(unavailable, Unavailable)
        assert unavailable.why == f"this build of slum has no runner for {name} yet"
        assert unavailable.fix
