"""What keeps a node's keeper running: a container's first process, a systemd unit, an init script; and the commands there."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_support import until, worker
from node_support import Node, fleet, node

from slum import __version__, units
from slum.cloudinit import cloud_init, quoted
from slum.exports.base import Site
from slum.exports.terraform import export_terraform
from slum.model import Fleet, FlyOperator, Tenement
from slum.node import boot, service
from slum.node.keeperclient import call, keeper_command
from slum.nodeimage import node_image
from slum.paths import Home
from slum.server import boot as server_boot

ROOT_HOME = Home(data=Path("/var/lib/slum"), run=Path("/run/slum"))


def slum(
    here: Node, *words: str, env: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in os.environ.items() if not k.startswith("SLUM_")}
    own |= {"SLUM_DATA_DIR": str(here.home.data), "SLUM_RUN_DIR": str(here.home.run), "NO_COLOR": "1", **(env or {})}
    argv = [sys.executable, "-m", "slum.cli.main", *words]
    return subprocess.run(argv, env=own, input=stdin, capture_output=True, text=True, timeout=60, check=False)


async def test_the_whole_way_by_the_command_line() -> None:
    async with fleet(2) as (whole, fronts), node() as here:
        fronts[0].push(here.desired(worker()))
        fronts[1].push(fronts[0].desired)
        urls, token = [front.url for front in fronts], whole.token("here.1")
        bare = await asyncio.to_thread(slum, here, "join", *urls)
        assert bare.returncode == 2
        assert "no join token" in bare.stderr
        done = await asyncio.to_thread(
            slum, here, "join", *urls, "--tenement", "here", "--token-file", "-", stdin=f"{token}\n"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "joined: this machine is here of fleet test" in done.stdout
        assert "the agent is connected to https://127.0.0.1:" in done.stdout
        assert "nothing starts it after a reboot" in done.stdout or ".service starts it" in done.stdout
        front = next(front for front in fronts if front.connected)
        await here.healthy(front, "tick")
        again = await asyncio.to_thread(slum, here, "join", *urls, "--token-file", "-", stdin=token)
        assert (again.returncode, "has joined already" in again.stdout) == (0, True), again.stdout + again.stderr
        status = await asyncio.to_thread(slum, here, "status", "--json")
        view = json.loads(status.stdout)
        assert (view["node"], view["fleet"], view["connected"]) == ("here", "test", front.url)
        words = (await asyncio.to_thread(slum, here, "status")).stdout
        assert "here of fleet test" in words
        assert f"connected to {front.url}" in words
        doctor = json.loads((await asyncio.to_thread(slum, here, "doctor", "--json")).stdout)
        (check,) = [check for check in doctor if check["what"] == "node"]
        assert (check["ok"], "here of fleet test" in check["detail"]) == ("ok", True), check
        up = await asyncio.to_thread(slum, here, "up")
        assert "the agent already runs" in up.stdout
        before = here.services()
        down = await asyncio.to_thread(slum, here, "down")
        assert "stopped the agent" in down.stdout
        assert here.services() == before
        assert "no agent runs" in (await asyncio.to_thread(slum, here, "status")).stdout
        up = await asyncio.to_thread(slum, here, "up")
        assert "agent started" in up.stdout, up.stdout + up.stderr
        await until(lambda: here.server(), 15)
        assert here.services() == before
        assert {child.name for child in boot.children(here.home)} <= {"agent", "router", *before}
        down = await asyncio.to_thread(slum, here, "down", "--services")
        assert down.returncode == 0
        assert boot.children(here.home) is None


async def test_a_control_plane_is_never_begun_on_a_node(tmp_path: Path) -> None:
    async with fleet() as (whole, [front]), node() as here:
        await here.join(front, token=whole.token("here.1"))
        file = tmp_path / "slum.toml"
        file.write_text('[operators.local]\ntype = "local"\n[tenement.x]\noperator = "local"\n')
        done = await asyncio.to_thread(slum, here, "apply", str(file), "--yes")
        assert done.returncode != 0
        assert "is a node of fleet test" in done.stderr
        for words in (("ps",), ("logs", "x")):
            done = await asyncio.to_thread(slum, here, *words)
            assert done.returncode == 6
            assert "is a node of fleet test" in done.stderr
            assert "slum context add" in done.stderr
        assert boot.children(here.home) is None


# --- containers -------------------------------------------------------------------------------------------------------


@pytest.mark.root
async def test_a_container_joins_from_its_environment_and_ends_as_a_whole() -> None:
    async with fleet() as (whole, [front]), node() as here:
        front.push(here.desired(worker()))
        token = whole.token("here.1")
        first = await asyncio.create_subprocess_exec(
            "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-m", "slum.node.container",
            env={
                "PATH": os.environ["PATH"],
                "SLUM_DATA_DIR": str(here.home.data),
                "SLUM_RUN_DIR": str(here.home.run),
                "SLUM_SERVER": front.url,
                "SLUM_MACHINE": "here",
                "SLUM_TENEMENT": "here",
                "SLUM_JOIN_TOKEN": token,
            },
        )  # fmt: skip
        try:
            await here.healthy(front, "tick")
            inside = inner(first.pid)
            secret = token.partition("::")[2].encode()
            shown = {pid: environ(pid) + cmdline(pid) for pid in family(inside)}
            assert len(shown) >= 4
            assert [pid for pid, text in shown.items() if secret in text] == []
            orphan(here, "sleep 0.2 & :")
            await until(lambda: not zombies(inside), 10)
            keeper = keeper_of(inside)
            os.kill(keeper, signal.SIGKILL)
            await until(lambda: keeper_of(inside) not in (0, keeper) and boot.children(here.home), 20)
            orphan(here, "sleep 0.2 & :")
            await until(lambda: not zombies(inside), 10)
            os.kill(inside, signal.SIGTERM)
            async with asyncio.timeout(20):
                assert await first.wait() == 0
        finally:
            if first.returncode is None:
                first.kill()
                await first.wait()
        await until(lambda: not Path(f"/proc/{inside}").exists(), 5)


def inner(pid: int) -> int:
    """Return the first process of the namespace that `unshare` *pid* made."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        found += [int(p) for p in read(f"/proc/{parent}/task/{parent}/children").split()]
    return found


def cmdline(pid: int) -> bytes:
    return read(f"/proc/{pid}/cmdline")


def environ(pid: int) -> bytes:
    return read(f"/proc/{pid}/environ")


def read(path: str) -> bytes:
    """Return what is there; nothing of a process that has gone."""
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def keeper_of(pid: int) -> int:
    return next((child for child in family(pid) if b"slum.node.keeper\0" in cmdline(child)), 0)


def zombies(pid: int) -> list[int]:
    return [p for p in family(pid) if read(f"/proc/{p}/stat").rpartition(b")")[2][1:2] == b"Z"]


def orphan(here: Node, script: str) -> None:
    """Have the keeper start a shell that leaves a process behind."""
    name = f"x/{os.urandom(4).hex()}"
    spawn = {"name": name, "argv": ["/usr/bin/setsid", "/bin/sh", "-c", script], "env": {}}
    call(here.home, "spawn", spawn=spawn)


# --- systemd, and inits of the older kind -----------------------------------------------------------------------------


def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there")
    strange = Home(data=Path('/srv/a "b" %h $HOME'), run=Path("/run/slum"))
    for home in (ROOT_HOME, strange):
        keeper, env = keeper_command(home)
        file = tmp_path / units.unit_name(home)
        file.write_text(units.keeper_unit(home, keeper=keeper, env=env, slum=service.slum_command()))
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(file)], capture_output=True, text=True, check=False
        )
        said = [line for line in done.stderr.splitlines() if "DelegateSubgroup" not in line]
        assert (done.returncode, said) == (0, [])
    assert units.unit_name(ROOT_HOME) == "slum.service"
    assert units.unit_name(strange) != "slum.service"


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A systemctl that starts what a unit says and knows its pid; the folder of units is the fixture's value."""
    folder = tmp_path / "units"
    folder.mkdir()
    tool = tmp_path / "bin" / "systemctl"
    tool.parent.mkdir()
    tool.write_text(FAKE.format(python=sys.executable, folder=folder))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(service, "SYSTEMD", folder)
    monkeypatch.setattr(service, "UNITS", folder)
    yield folder
    for pid in folder.glob("*.pid"):
        try:
            os.kill(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


FAKE = """#!{python}
import os, pathlib, shlex, subprocess, sys
folder, words = pathlib.Path("{folder}"), [word for word in sys.argv[1:] if not word.startswith("--")]
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(words) + "\\n")
pid = folder / (words[-1] + ".pid")
if words[0] == "start" and not (pid.exists() and os.path.exists("/proc/" + pid.read_text())):
    lines = [line.partition("=") for line in (folder / words[1]).read_text().splitlines()]
    env = dict(shlex.split(value)[0].split("=", 1) for key, _, value in lines if key == "Environment")
    argv = next(shlex.split(value) for key, _, value in lines if key == "ExecStart")
    null = subprocess.DEVNULL
    pid.write_text(str(subprocess.Popen(argv, env=env, start_new_session=True, stdout=null, stderr=null).pid))
if words[0] == "show":
    print(pid.read_text() if pid.exists() else 0)
"""


@pytest.mark.root
def test_slum_up_is_by_the_unit_where_one_is_installed_and_makes_it_its_own(systemd: Path) -> None:
    token = secrets.token_hex(3)
    home = Home(data=Path(f"/tmp/slum-n-{token}"), run=Path(f"/tmp/sn{token}"))
    unit = systemd / service.install(home)
    unit.write_text(unit.read_text().replace(sys.executable, "/opt/before/bin/python"))
    try:
        up = server_boot.up(home, wait=False)
        assert up.keeper_pid == int((systemd / f"{unit.name}.pid").read_text())
        assert f"ExecStart={sys.executable}" in unit.read_text()
        service.retire(home)
        assert (systemd / "calls").read_text().splitlines()[-1] == f"disable {unit.name}"
        service.install(home)
        assert (systemd / "calls").read_text().splitlines()[-1] == f"enable {unit.name}", "and back"
    finally:
        server_boot.down(home, services=True, grace_s=2.0)
        for folder in (home.data, home.run):
            shutil.rmtree(folder, ignore_errors=True)


async def test_under_systemd_the_keeper_is_a_unit_that_takes_over_what_runs(systemd: Path) -> None:
    async with fleet() as (whole, [front]), node() as here:
        front.push(here.desired(worker()))
        await here.join(front, token=whole.token("here.1"))
        await here.start()
        await here.healthy(front, "tick")
        before, detached = here.services(), here.keeper_pid()
        agent = here.agent_pid()
        done = await asyncio.to_thread(service.start, here.home, (boot.agent_program(here.home),), installing=True)
        assert done == service.Started(started=(), unit=units.unit_name(here.home))
        keeper = here.keeper_pid()
        assert keeper not in (detached, 0)
        assert keeper == int((systemd / f"{done.unit}.pid").read_text())
        assert (here.services(), here.agent_pid()) == (before, agent), "the unit's keeper adopted them"
        again = await asyncio.to_thread(service.start, here.home, (boot.agent_program(here.home),), installing=False)
        assert again.unit == done.unit
        assert here.keeper_pid() == keeper
        calls = (systemd / "calls").read_text().splitlines()
        assert calls.count("daemon-reload") == 1, "the same unit is not written twice"
        assert f"enable {done.unit}" in calls


async def test_a_waiting_keeper_takes_over_when_the_other_ends() -> None:
    async with fleet() as (whole, [front]), node() as here:
        await here.join(front, token=whole.token("here.1"))
        await here.start()
        await until(lambda: front.connected, 15)
        argv, env = keeper_command(here.home)
        standby = await asyncio.create_subprocess_exec(*argv, "--wait", env=env, stderr=asyncio.subprocess.DEVNULL)
        try:
            agent, first = here.agent_pid(), here.keeper_pid()
            assert first != standby.pid
            os.kill(first, signal.SIGTERM)
            await until(lambda: here.keeper_pid() == standby.pid, 10)
            assert here.agent_pid() == agent
            await asyncio.to_thread(boot.shut_down, here.home, {"agent"})
            async with asyncio.timeout(10):
                assert await standby.wait() == 0
        finally:
            if standby.returncode is None:
                standby.kill()
                await standby.wait()


async def test_the_init_script_starts_and_stops_and_leaves_services_alone(tmp_path: Path) -> None:
    async with fleet() as (whole, [front]), node() as here:
        front.push(here.desired(worker()))
        await here.join(front, token=whole.token("here.1"))
        script = tmp_path / "slum"
        script.write_text(units.init_script(here.home, slum=service.slum_command()))
        script.chmod(0o755)

        async def do(verb: str) -> str:
            done = await asyncio.to_thread(
                subprocess.run, [script, verb], capture_output=True, text=True, timeout=60, check=True
            )
            return str(done.stdout)

        await do("start")
        await here.healthy(front, "tick")
        before = here.services()
        assert "connected" in await do("status")
        await do("stop")
        assert (here.services(), here.agent_pid()) == (before, 0)
        await do("start")
        await until(lambda: here.agent_pid(), 10)


# --- images and first boots -------------------------------------------------------------------------------------------


def test_cloud_init_waits_for_its_control_plane() -> None:
    text = cloud_init(server=quoted("https://cp"), machine=quoted("w-1"), token=quoted("t"), version=quoted("0.1.0"))
    assert "--wait 3600" in text


def test_the_example_s_image_is_the_one_that_exports_emit() -> None:
    text = (Path(__file__).parents[1] / "examples" / "node-image" / "Dockerfile").read_text()
    assert text == node_image(__version__)
    assert 'ENTRYPOINT ["/opt/slum/bin/python", "-P", "-m", "slum.node.container"]' in text
    site = Site(version=__version__)
    fly = FlyOperator(name="fly", org="o", region="iad", image=None)
    fleet = Fleet(name="f", domain="localhost", operators=(fly,), tenements=(Tenement(name="w", operator="fly"),))
    files = {file.path: file.text for file in export_terraform(fleet, site).files}
    assert files["node-image/Dockerfile"] == text
    assert "node-image/Dockerfile" in files["README.md"]
