"""The ssh operator against real sshd hosts: killed at every step, lied to about keys, hosts that are no good, two leaders."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import asyncssh
import pytest
from ssh_hosts import FULL_DISK, NO_PYTHON, OLD_PYTHON, READ_ONLY, Host, Shape, a_site, require, start, stop
from ssh_hosts import Site as Hosts
from ssh_support import CANARY, CLUSTER, NEIGHBOUR, StandIns, a_definition, a_spec, shared_wheels
from ssh_support import a_site as a_place

from slum import model
from slum.errors import OperatorError
from slum.operators import naming
from slum.operators.base import Held
from slum.operators.ssh import Ssh
from slum.operators.ssh_hosts import machine_id
from slum.operators.wheelhouse import Target

pytestmark = pytest.mark.root
ROUNDS = int(os.environ.get("SLUM_SSH_ROUNDS", "3"))
"""`make test-ssh` does more."""
SUPPORT = Path(__file__).with_name("ssh_support.py")


@pytest.fixture(scope="session")
def wheels() -> Path:
    return shared_wheels()


@contextlib.contextmanager
def hosts(*shapes: Shape) -> Iterator[Hosts]:
    require()
    with a_site(*shapes or (Shape(),)) as site:
        yield site


class Bench:
    """Hosts, the folder of the control plane that uses them, and operators made anew as after a restart."""

    def __init__(self, site: Hosts, folder: Path, wheels: Path) -> None:
        self.site, self.folder, self.wheels = site, folder, wheels

    def operator(self, *, fence: tuple[int, ...] = (1, 1, 1), held: tuple[Held, ...] = (), **fields: Any) -> Ssh:
        addresses = [host.address for host in self.site.hosts]
        houses: Any = StandIns(self.wheels)
        definition = a_definition(self.site.key, addresses, **fields)
        return Ssh(definition, a_place(self.folder, fence, held), houses=houses)

    def start(self, what: str, kill_at: int = 0, **fields: Any) -> subprocess.Popen[str]:
        """Create or destroy machine w-1 in a process of its own."""
        given = {
            "folder": str(self.folder),
            "key": str(self.site.key),
            "wheels": str(self.wheels),
            "hosts": [host.address for host in self.site.hosts],
        }
        file = self.folder / "given.json"
        file.write_text(json.dumps(given | fields))
        argv = [sys.executable, str(SUPPORT), what, str(file), *([str(kill_at)] if kill_at else [])]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def bench(tmp_path: Path, wheels: Path) -> Iterator[Bench]:
    with hosts() as site:
        yield Bench(site, tmp_path, wheels)


def on(host: Host, path: str) -> Path:
    return host.root / path.lstrip("/")


def keepers(host: Host) -> list[int]:
    found = []
    for pid in host.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            if b"keeper.sock" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def size(file: Path) -> int:
    """Return the bytes of *file*, 0 when it was just renamed."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def assert_nothing_half_installed(host: Host) -> None:
    for folder in on(host, "/opt/slum").glob("[!.]*"):
        if folder.name != "wheels":
            assert (folder / "bin/slum").exists(), f"{folder} is not complete"
            (site,) = folder.glob("lib/python3*/site-packages")
            assert (site / "slum/cli/main.py").exists()
    for wheel in on(host, "/opt/slum/wheels").glob("*/[!.]*"):
        import hashlib

        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == wheel.parent.name


async def converges(bench: Bench) -> None:
    """Doing it again makes the one machine, and nothing is left of earlier tries."""
    (host,) = bench.site.hosts
    assert_nothing_half_installed(host)
    operator = bench.operator()
    machine = await operator.create(a_spec())
    assert await operator.observe(CLUSTER) == (machine,)
    assert len(keepers(host)) == 1
    assert_nothing_half_installed(host)
    assert not list(on(host, "/opt/slum").rglob(".slum-new-*"))


async def test_killed_at_every_step_it_goes_on_and_converges(bench: Bench) -> None:
    """One host, killed one step later each time: what was done before stays, so each try tells of fewer steps."""
    told = 0
    for kill_at in (1, 2, 2, 2, 2, 2, 2, 2, 2, 2):
        process = await asyncio.to_thread(bench.start, "create", kill_at)
        out, _ = await asyncio.to_thread(process.communicate)
        (host,) = bench.site.hosts
        assert_nothing_half_installed(host)
        told += 1
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, out
    assert told > 4, "it was not killed at each step"
    await converges(bench)


async def test_killed_at_any_moment_it_goes_on_and_converges(bench: Bench, seed: int) -> None:
    random = Random(seed)
    for _ in range(ROUNDS):
        process = await asyncio.to_thread(bench.start, "create")
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, random.uniform(0.4, 2.5))
        process.kill()
        await asyncio.to_thread(process.communicate)
    await converges(bench)


async def test_a_host_that_loses_power_in_an_upload(bench: Bench) -> None:
    (host,) = bench.site.hosts
    process = await asyncio.to_thread(bench.start, "create")
    end = time.monotonic() + 60
    while not any(size(file) > 1 << 20 for file in on(host, "/opt/slum/wheels").glob("*/*")):
        assert time.monotonic() < end
        await asyncio.sleep(0)
    stop(host)
    assert_nothing_half_installed(host)
    await asyncio.to_thread(process.communicate)
    start(host)
    await asyncio.to_thread(bench.site.wait)
    await converges(bench)


async def test_what_a_power_cut_has_cut_short_is_uploaded_again(bench: Bench) -> None:
    (host,) = bench.site.hosts
    for wheel in (await StandIns(bench.wheels).of(Target(python="3.11", arch="x86_64", libc="glibc 2.36"))).wheels:
        there = on(host, f"/opt/slum/wheels/{wheel.sha256}/{wheel.name}")
        there.parent.mkdir(parents=True)
        there.touch()
    operator = bench.operator()
    machine = await operator.create(a_spec())
    assert await operator.observe(CLUSTER) == (machine,)
    assert_nothing_half_installed(host)


async def test_a_destroy_that_was_killed_is_done_again(bench: Bench) -> None:
    (host,) = bench.site.hosts
    operator = bench.operator()
    machine = await operator.create(a_spec())
    on(host, "/var/lib/slum/boot.json").unlink()  # as if it had been killed after its first steps
    on(host, "/var/lib/slum/host.json").write_text(
        json.dumps(
            json.loads(on(host, "/var/lib/slum/host.json").read_text())
            | {"python": "/opt/slum/0.1.0-standin/bin/python"}
        )
    )
    await operator.destroy(machine.id)
    assert keepers(host) == []
    assert not on(host, "/var/lib/slum/agent").exists()
    kept = on(host, f"/var/lib/slum-gone/{naming.name_of(CLUSTER, 'w-1.1')}/services/web/main/data")
    assert kept.read_text() == "precious"
    with pytest.raises(OperatorError, match="was destroyed here"):
        await operator.create(a_spec())


async def test_the_token_is_seen_nowhere(bench: Bench) -> None:
    (host,) = bench.site.hosts
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for pid in [*host.pids(), os.getpid()]:
                for file in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        seen.add(Path(f"/proc/{pid}/{file}").read_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        await bench.operator().create(a_spec())
    finally:
        done.set()
        watcher.join()
    assert any(b"--token-file" in text for text in seen), "the watcher did not see the join"
    assert not [text for text in seen if CANARY.encode() in text]
    assert "joined with (hidden)" in next(bench.folder.rglob("*.log")).read_text()
    files = [
        *bench.folder.rglob("*"),
        *on(host, "/var").rglob("*"),
        *on(host, "/opt/slum").rglob("*"),
        *on(host, "/tmp").rglob("*"),
    ]
    assert not [file for file in files if file.is_file() and CANARY.encode() in file.read_bytes()]


# --- keys of hosts -----------------------------------------------------------------------------------------------------


async def refused(operator: Ssh, code: str) -> OperatorError:
    with pytest.raises(OperatorError) as caught:
        await operator.create(a_spec())
    assert caught.value.provider_code == code, caught.value
    return caught.value


async def test_the_first_key_is_the_only_one_believed_since(bench: Bench) -> None:
    (host,) = bench.site.hosts
    assert await bench.operator().observe(CLUSTER) == ()
    pinned = (bench.folder / "data/state/ssh/known_hosts").read_text()
    assert pinned == f"{host.address} {host.host_key}\n"
    host.new_host_key()
    error = await refused(bench.operator(), "host_key")
    assert "not SHA256:" in error.message
    assert "nothing was sent" in error.message
    assert not on(host, "/opt/slum").exists()
    assert (bench.folder / "data/state/ssh/known_hosts").read_text() == pinned


async def test_pinned_and_known_keys(bench: Bench) -> None:
    (host,) = bench.site.hosts
    known = bench.folder / "known"
    known.write_text(f"{host.address} {host.host_key}\n")
    right = asyncssh.import_public_key(host.host_key).get_fingerprint()
    wrong = f"SHA256:{'A' * 43}"
    definition = bench.operator()._definition

    def pinned(fingerprint: str) -> model.SshOperator:
        return model.SshOperator(
            name="vps",
            hosts=(model.SshHost(host=host.address, fingerprint=fingerprint),),
            key=definition.key,
            host_key=model.HostKeyPolicy.PINNED,
        )

    houses: Any = StandIns(bench.wheels)
    await refused(Ssh(pinned(wrong), a_place(bench.folder), houses=houses), "host_key")
    known_only = bench.operator(host_key=model.HostKeyPolicy.KNOWN_HOSTS, known_hosts=str(known))
    known.write_text("")
    await refused(known_only, "host_key")
    assert not on(host, "/opt/slum").exists()
    known.write_text(f"{host.address} {host.host_key}\n")
    machine = await known_only.create(a_spec())
    assert await Ssh(pinned(right), a_place(bench.folder), houses=houses).observe(CLUSTER) == (machine,)


class Greedy(asyncssh.SSHServer):
    """Somebody in between: lets everyone in and counts who tries."""

    tries = 0

    def begin_auth(self, username: str) -> bool:
        type(self).tries += 1
        return False


async def test_whoever_is_in_between_is_shown_nothing(tmp_path: Path, wheels: Path) -> None:
    keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(2)]
    keys[0].write_private_key(tmp_path / "key")
    async with await asyncssh.listen("127.0.0.1", 0, server_factory=Greedy, server_host_keys=[keys[1]]) as server:
        host = model.SshHost(host="127.0.0.1", port=server.get_port(), fingerprint=keys[0].get_fingerprint())
        houses: Any = StandIns(wheels)
        definition = model.SshOperator(name="vps", hosts=(host,), key=str(tmp_path / "key"))
        await refused(Ssh(definition, a_place(tmp_path), houses=houses), "host_key")
    assert Greedy.tries == 0


# --- hosts that are no good --------------------------------------------------------------------------------------------


async def test_a_bad_host_is_an_error_of_its_own_and_the_others_finish(tmp_path: Path, wheels: Path) -> None:
    shapes = (Shape(), NO_PYTHON, OLD_PYTHON, FULL_DISK, READ_ONLY, Shape(), Shape(), Shape(sudo=True))
    with hosts(*shapes) as site:
        addresses = [host.address for host in site.hosts]
        stop(site.hosts[5])
        user = {6: "deploy", 7: "deploy"}
        listed = tuple(model.SshHost(host=a, user=user.get(n)) for n, a in enumerate(addresses))
        definition = model.SshOperator(name="vps", hosts=listed, key=str(site.key))
        houses: Any = StandIns(wheels)
        operator = Ssh(definition, a_place(tmp_path), houses=houses)
        specs = [a_spec(f"w-{n}") for n in range(len(shapes))]
        for spec in specs:
            operator.machine_id(spec)
        results = await asyncio.gather(*(operator.create(spec) for spec in specs), return_exceptions=True)
        codes = [result.provider_code if isinstance(result, OperatorError) else "" for result in results]
        assert codes == ["", "no_python", "no_python", "disk_full", "read_only", "unreachable", "no_root", ""], results
        for address, result in zip(addresses, results, strict=True):
            if isinstance(result, OperatorError):
                assert address in result.message
                assert result.hint
        assert len(await operator.observe(CLUSTER)) == 2


async def test_what_cannot_be_seen_is_believed(bench: Bench) -> None:
    (host,) = bench.site.hosts
    machine = await bench.operator().create(a_spec())
    stop(host)
    assert await bench.operator().observe(CLUSTER) == ()
    held = Held(id=machine.id, key="w-1.1", machine="w-1", tenement="w", is_made=True)
    assert await bench.operator(held=(held,)).observe(CLUSTER) == (machine,)


async def test_through_a_jump_host(tmp_path: Path, wheels: Path) -> None:
    with hosts(Shape(), Shape()) as site:
        jump, host = site.hosts
        houses: Any = StandIns(wheels)
        definition = a_definition(site.key, [host.address], jump=f"root@{jump.address}")
        operator = Ssh(definition, a_place(tmp_path), houses=houses)
        async with operator.shell(f"{host.address}:22") as connection:
            seen = await connection.run("echo $SSH_CONNECTION", check=True)
        assert str(seen.stdout).startswith(f"{jump.address} ")
        await operator.create(a_spec())
        jump.new_host_key()
        await refused(operator, "host_key")


# --- two leaders, two fleets -------------------------------------------------------------------------------------------


async def test_an_older_leader_is_refused_on_the_host(bench: Bench) -> None:
    machine = await bench.operator(fence=(1, 2, 0)).create(a_spec())
    old = bench.operator(fence=(1, 1, 9))
    with pytest.raises(OperatorError, match="a newer leader") as caught:
        await old.destroy(machine.id)
    assert caught.value.provider_code == "fenced"
    assert await old.observe(CLUSTER) == (machine,)


async def test_a_stopped_leaders_bootstrap_is_taken_over(bench: Bench) -> None:
    """It is stopped with the host's lock in hand; the next leader ends it there, and it can do nothing more."""
    (host,) = bench.site.hosts
    process = await asyncio.to_thread(bench.start, "create")
    assert process.stdout is not None
    await asyncio.to_thread(process.stdout.readline)
    process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        machine = await bench.operator(fence=(1, 2, 1)).create(a_spec())
        assert time.monotonic() - began < 30
        process.send_signal(signal.SIGCONT)
        out, _ = await asyncio.to_thread(process.communicate)
        assert process.returncode != 0, out
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert await bench.operator().observe(CLUSTER) == (machine,)
    assert len(keepers(host)) == 1


async def test_a_neighbours_host_is_not_taken(bench: Bench) -> None:
    (host,) = bench.site.hosts
    machine = await bench.operator().create(a_spec())
    for cluster in (NEIGHBOUR, CLUSTER):
        with pytest.raises(OperatorError) as caught:
            await bench.operator(fence=(9, 9, 9)).create(a_spec("w-2", cluster=cluster))
        assert caught.value.provider_code in ("taken", None)
    await bench.operator(fence=(9, 9, 9)).destroy(machine_id(f"{host.address}:22", NEIGHBOUR, "w-1.1"))
    assert await bench.operator().observe(CLUSTER) == (machine,)
    assert await bench.operator().observe(NEIGHBOUR) == ()


async def test_two_machines_never_get_one_host(tmp_path: Path, wheels: Path) -> None:
    definition = a_definition(tmp_path / "key", ["10.0.0.1", "10.0.0.2"])
    first, second = (Ssh(definition, a_place(tmp_path)) for _ in range(2))
    cluster = "feed0000-1111-4222-8333-944445555666"
    ids = [
        operator.machine_id(a_spec(name, cluster=cluster))
        for operator, name in ((first, "a"), (second, "b"), (first, "a"))
    ]
    assert ids == [machine_id(f"10.0.0.{n}:22", cluster, key) for n, key in ((1, "a.1"), (2, "b.1"), (1, "a.1"))]
    with pytest.raises(OperatorError, match="no host is free"):
        first.machine_id(a_spec("c", cluster=cluster))


async def test_services_go_on_while_slum_is_replaced(bench: Bench) -> None:
    """What the hand does for an upgrade, as far as the stand-in shows it; tests/e2e do it with the real one."""
    operator = bench.operator()
    await operator.create(a_spec())
    assert await operator.upgrade(operator.hosts[0]) is False
