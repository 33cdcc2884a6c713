"""A hostile service behind each wall: every attempt fails inside, and is shown to work where there is no wall."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import runpy
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from walls_support import PYTHON, Running, Yard, descendants, open_limits, open_yard, some_uid, wait_until

from slum.model import Level
from slum.node.runners.namespace import NamespaceRunner, Way
from slum.node.types import Available

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("hostile")]

ATTACKER = Path(__file__).with_name("attacker.py").read_text()
SELF_UID, NEIGHBOUR_UID = some_uid(), some_uid()
SECRET_NAME = "NEIGHBOUR_SECRET"
HOST_MARKER = "SLUM_HOST_MARKER"
VICTIM_WORD = "victim-at-work"
VICTIM = f"""
import os, socket, sys
assert "{VICTIM_WORD}" in sys.argv
os.umask(7)
open(os.environ["HOME"] + "/secret", "w").write("mine")
server = socket.create_server(os.environ["SOCKET_PATH"], family=socket.AF_UNIX)
print("ready", flush=True)
while True:
    server.accept()
"""

NOT_KEPT_BY_PROCESS = {
    # Level `process` is the kernel's wall between users and no more; docs/isolation.md lists these.
    *("host_processes", "host_tmp", "neighbour_shared_memory", "kernel_keys", "kernel_log", "forbidden_calls"),
    *("new_user_namespace", "new_user_namespace_by_clone", "new_user_namespace_by_clone3"),
    # Only ever its own terminal.
    *("type_into_a_terminal", "type_into_a_terminal_with_high_bits"),
}
NO_CONTROL_BY_ROOT = {
    # The machine's own pid 1 was not started by slum, and some kernels guard it even from root.
    *("host_environment_of_pid_1", "shadow_by_pid_1"),
}


def attempts() -> list[str]:
    names = runpy.run_path(str(Path(__file__).with_name("attacker.py")))["ATTEMPTS"]
    return sorted(names)


@dataclass
class Scene:
    yard: Yard
    targets: dict[str, object]
    victims: list[Running]


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """A slum with its sockets and state, and a neighbour at level process: the least hidden of all victims."""
    with ExitStack() as held:
        yard = held.enter_context(open_yard())
        os.environ[HOST_MARKER] = "1"
        held.callback(os.environ.pop, HOST_MARKER)
        limits = held.enter_context(open_limits(yard.home))
        group = limits.prepare("attacker")
        for path in (yard.home.api_socket, yard.home.keeper_socket):
            server = held.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(str(path))
            path.chmod(0o600)
            server.listen()
        (yard.home.state / "state.db").write_text("ledger")
        host_file = Path(f"/tmp/slum-hostile-{secrets.token_hex(4)}")
        host_file.write_text("of the host")
        held.callback(host_file.unlink)
        libc, key = ctypes.CDLL(None), secrets.randbelow(1 << 30) + 1
        segment = libc.shmget(key, 4096, 0o1666)
        assert segment >= 0
        held.callback(libc.shmctl, segment, 0, None)
        victim, victim_instance = start_victim(yard, "victim", NEIGHBOUR_UID, Level.PROCESS)
        targets = {
            "victim_pid": victim.pid,
            "victim_word": VICTIM_WORD,
            "victim_data": str(victim_instance.data),
            "victim_bundle": str(victim_instance.bundle),
            "victim_socket": victim_instance.env["SOCKET_PATH"],
            "secret_name": SECRET_NAME,
            "api_socket": str(yard.home.api_socket),
            "keeper_socket": str(yard.home.keeper_socket),
            "run": str(yard.home.run),
            "private_folders": [
                str(folder) for folder in (yard.home.private, yard.home.state, yard.home.agent, yard.home.logs)
            ],
            "tmp_file": str(host_file),
            "shm_key": key,
            "cgroup_procs": group.procs_files[0] if group.procs_files else "/sys/fs/cgroup/cgroup.procs",
            "host_marker": HOST_MARKER,
        }
        yield Scene(yard, targets, [victim])


def start_victim(yard: Yard, service: str, uid: int, level: Level):
    made = yard.instance(service, (PYTHON, "victim.py", VICTIM_WORD), uid=uid, files={"victim.py": VICTIM})
    socket_path = yard.home.generation_socket(str(made.key), 1)
    env = {**made.env, "SOCKET_PATH": str(socket_path), SECRET_NAME: "hunter2"}
    made = yard.instance(service, made.command, uid=uid, env=env)
    running = yard.start(level, made)
    running.read_until(b"ready")
    return running, made


def attack(scene: Scene, level: Level, service: str, env: dict[str, str] | None = None) -> dict[str, tuple[bool, str]]:
    """Run the attacker as an instance of *service*; return what each attempt gave."""
    command = (PYTHON, "attacker.py", "targets.json")
    made = scene.yard.instance(service, command, uid=SELF_UID, env=env)
    files = {
        "attacker.py": ATTACKER,
        "targets.json": json.dumps({**scene.targets, "own_data": str(made.data), "own_run_name": made.run.name}),
    }
    made = scene.yard.instance(service, command, uid=SELF_UID, env=env, files=files)
    status, output = scene.yard.run(level, made)
    assert status == 0, output
    return json.loads(output)


@pytest.fixture(scope="module")
def outside(scene: Scene) -> dict[str, tuple[bool, str]]:
    """The control: the same program as root, without a wall but for a mount namespace that keeps its mounts to itself."""
    folder = scene.yard.root / "outside"
    folder.mkdir()
    (folder / "attacker.py").write_text(ATTACKER)
    (folder / "targets.json").write_text(json.dumps({**scene.targets, "own_data": str(folder), "own_run_name": "none"}))
    with open("/dev/null") as extra:
        done = subprocess.run(
            ["unshare", "--mount", PYTHON, str(folder / "attacker.py"), str(folder / "targets.json")],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            pass_fds=(extra.fileno(),),
        )
    return json.loads(done.stdout)


@contextmanager
def walled(scene: Scene, way: Way) -> Iterator[None]:
    """Have walls put up in *way* meanwhile."""
    runner = scene.yard.runners[Level.NAMESPACE]
    assert isinstance(runner, NamespaceRunner)
    assert isinstance(runner.probe(), Available)
    assert runner._wall is not None
    proven, runner._wall = runner._wall, dataclasses.replace(runner._wall, way=way)
    yield
    runner._wall = proven


@pytest.fixture(scope="module", params=Way)
def inside_namespace(scene: Scene, request: pytest.FixtureRequest) -> dict[str, tuple[bool, str]]:
    with walled(scene, request.param):
        return attack(scene, Level.NAMESPACE, f"hostile-{request.param.name.lower()}")


@pytest.fixture(scope="module")
def inside_process(scene: Scene) -> dict[str, tuple[bool, str]]:
    return attack(scene, Level.PROCESS, "hostile-pr")


@pytest.mark.parametrize("name", [name for name in attempts() if name not in NO_CONTROL_BY_ROOT])
def test_control_every_attempt_works_without_a_wall(name: str, outside: dict[str, tuple[bool, str]]) -> None:
    succeeded, detail = outside[name]
    assert succeeded, f"{name} proves nothing, it fails outside too: {detail}"


@pytest.mark.parametrize("name", attempts())
def test_namespace_withstands(name: str, inside_namespace: dict[str, tuple[bool, str]]) -> None:
    succeeded, detail = inside_namespace[name]
    assert not succeeded, detail
    assert "died" not in detail


@pytest.mark.parametrize("name", [name for name in attempts() if name not in NOT_KEPT_BY_PROCESS])
def test_process_withstands(name: str, inside_process: dict[str, tuple[bool, str]]) -> None:
    succeeded, detail = inside_process[name]
    assert not succeeded, detail


def test_the_whole_table_of_calls_was_reached_outside(outside: dict[str, tuple[bool, str]]) -> None:
    """As root most calls get to the kernel's own code; so few failures inside would not be the filter's doing."""
    assert len(outside["forbidden_calls"][1].split()) > 30, outside["forbidden_calls"]


def test_a_host_environment_would_be_seen(scene: Scene) -> None:
    """The control of that attempt: what bubblewrap itself is started with does show inside."""
    found = attack(scene, Level.NAMESPACE, "shown", env={HOST_MARKER: "1"})
    assert found["host_environment_of_pid_1"][0], found["host_environment_of_pid_1"]


def test_namespace_keeps_instances_of_one_service_apart(scene: Scene) -> None:
    """They share a uid, so only the wall is between them."""
    sibling, made = start_victim(scene.yard, "sibling", SELF_UID, Level.NAMESPACE)
    program = wait_for_program(sibling.pid)
    before = dict(scene.targets)
    for pid in (sibling.pid, program):
        scene.targets = {
            **before,
            "victim_pid": pid,
            "victim_data": str(made.data),
            "victim_bundle": str(made.bundle),
            "victim_socket": made.env["SOCKET_PATH"],
        }
        found = attack(scene, Level.NAMESPACE, "brother")
        assert not {name: what for name, what in found.items() if what[0]}
    scene.targets = before
    control = attack(scene, Level.PROCESS, "brother-outside")
    assert control["host_processes"][0]


def wait_for_program(monitor: int) -> int:
    wait_until(lambda: len(descendants(monitor)) == 3, "bubblewrap's tree")
    return descendants(monitor)[-1]


@pytest.mark.parametrize("level", [Level.NAMESPACE, Level.PROCESS])
def test_a_signal_to_everyone_hits_only_its_own(level: Level, scene: Scene) -> None:
    code = """
import contextlib, os, signal
with contextlib.suppress(ProcessLookupError):  # nobody else is there
    os.kill(-1, signal.SIGKILL)
print("lived")
"""
    status, output = scene.yard.run(level, scene.yard.instance(f"killer-{level}", (PYTHON, "-c", code), uid=some_uid()))
    assert status == 0, output  # kill(-1) spares the caller and, behind the wall, pid 1
    assert output == "lived\n"
    for victim in scene.victims:
        os.kill(victim.pid, 0)
        assert Path(f"/proc/{victim.pid}/stat").read_text().split(") ")[1][0] != "Z"


@pytest.mark.parametrize("level", [Level.NAMESPACE, Level.PROCESS])
def test_metadata_address_is_refused(level: Level) -> None:
    """In a network namespace of its own, where the address answers: root gets through, a service does not."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, str(Path(__file__).with_name("metadata_scene.py")), level],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {
        "before": ["answered", "answered"],
        "after": ["refused", "refused"],
        "resolver": "answered",
        "root": ["answered", "answered"],
    }
