"""Limits by real cgroups: fork bombs and memory hogs hurt only themselves, figures are right and cheap, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from walls_support import PYTHON, Yard, open_limits, open_yard, some_uid, wait_until

from slum.errors import InvariantError, SlumError
from slum.model import Level
from slum.node.limits import detect as detecting
from slum.node.limits.detect import Hierarchy, base_name, detect, read_hierarchies, try_unified
from slum.node.limits.groups import Limits, Place, field, read, settings
from slum.node.types import Cgroup
from slum.paths import Home

pytestmark = pytest.mark.xdist_group("limits")  # they switch controllers of the one hierarchy on and off

UID = some_uid()

HYBRID_MOUNTS = """\
24 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
34 30 0:30 /docker/abc /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
35 30 0:31 / /sys/fs/cgroup/systemd rw,nosuid - cgroup cgroup rw,xattr,name=systemd
36 30 0:32 / /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids
37 30 0:32 / /mnt/pids-again rw,nosuid - cgroup cgroup rw,pids
"""
HYBRID_OWN = (
    "12:memory:/docker/abc/init\n4:cpu,cpuacct:/user.slice\n3:pids:/\n1:name=systemd:/x\n0::/user.slice/s.scope\n"
)


@pytest.fixture
def yard() -> Iterator[Yard]:
    with open_yard() as opened:
        yield opened


@pytest.fixture
def limits(yard: Yard) -> Iterator[Limits]:
    with open_limits(yard.home) as found:
        if not found.controllers:
            pytest.skip(f"no cgroups: {found.why}")
        yield found


def home(run: str) -> Home:
    return Home(data=Path("/nonexistent"), run=Path(run))


def test_hierarchies_are_read_from_what_the_kernel_says() -> None:
    cgroup = Path("/sys/fs/cgroup")
    assert read_hierarchies(HYBRID_MOUNTS, HYBRID_OWN) == (
        Hierarchy(mount=cgroup / "unified", unified=True, own="/user.slice/s.scope"),
        Hierarchy(
            mount=cgroup / "cpu,cpuacct", unified=False, own="/user.slice", controllers=frozenset({"cpu", "cpuacct"})
        ),
        Hierarchy(mount=cgroup / "memory", unified=False, own="/init", controllers=frozenset({"memory"})),
        Hierarchy(mount=cgroup / "pids", unified=False, own="/", controllers=frozenset({"pids"})),
    )


def test_settings_of_v1_and_v2() -> None:
    every = frozenset({"memory", "cpu", "pids"})
    v2 = Place(base=Path("/x"), unified=True, controllers=every)
    assert settings(v2, 64, 250, 10) == (
        ("memory.max", "67108864", True),
        ("memory.swap.max", "0", False),
        ("cpu.weight", "250", True),
        ("pids.max", "12", True),
    )
    assert dict(name[:2] for name in settings(v2, None, None, None)) == {
        "memory.max": "max",
        "memory.swap.max": "max",
        "cpu.weight": "100",
        "pids.max": "max",
    }
    v1 = Place(base=Path("/x"), unified=False, controllers=every)
    assert [name[:2] for name in settings(v1, 64, 250, 10)] == [
        ("memory.memsw.limit_in_bytes", "-1"),
        ("memory.limit_in_bytes", "67108864"),
        ("memory.memsw.limit_in_bytes", "67108864"),
        ("cpu.shares", "2560"),
        ("pids.max", "12"),
    ]
    assert dict(name[:2] for name in settings(v1, None, 1, None))["cpu.shares"] == "10"
    assert settings(Place(base=Path("/x"), unified=True), 64, 1, 1) == ()


def test_field_reads_one_number() -> None:
    text = b"oom 1\noom_kill 7\noom_group_kill 9"
    assert (field(text, b"oom"), field(text, b"oom_kill"), field(text, b"oom_group_kill")) == (1, 7, 9)
    assert field(text, b"kill") is None


def test_each_slum_has_a_base_of_its_own() -> None:
    assert base_name(home("/run/slum")) == "slum"
    assert base_name(home("/tmp/a")) != base_name(home("/tmp/b"))


def test_without_any_hierarchy_there_is_a_reason_and_no_limit() -> None:
    nothing = Limits((), why="no cgroup file system is mounted", fix="mount one")
    assert nothing.how == ""
    assert nothing.prepare("free") == Cgroup(name="", procs_files=())
    assert nothing.stats("free") is None
    nothing.kill("free")
    assert nothing.remove("free")
    assert nothing.list() == ()
    with pytest.raises(SlumError, match="limits on memory, pids are asked for, but no cgroup"):
        nothing.prepare("bound", memory_mb=64, pids=10)


@pytest.mark.root
def test_what_was_found_is_said_and_found_again(yard: Yard, limits: Limits) -> None:
    assert limits.how.startswith("cgroup v")
    assert detect(yard.home).how == limits.how
    assert not [name for name in limits.list() if name.startswith("trial")]


@pytest.mark.root
def test_names_cannot_lead_elsewhere(limits: Limits) -> None:
    for name in ("../escape", "a/b", ".", "", "x" * 200):
        if name:
            with pytest.raises(InvariantError):
                limits.prepare(name)


@pytest.mark.root
def test_limits_are_set_changed_and_lifted(limits: Limits) -> None:
    cgroup = limits.prepare("changing", memory_mb=64, cpu_shares=200, pids=10)
    assert cgroup == limits.prepare("changing", memory_mb=128, cpu_shares=50, pids=20)
    assert cgroup == limits.prepare("changing", memory_mb=32)
    assert cgroup == limits.prepare("changing")
    texts = [
        (Path(file).parent / name).read_text().strip()
        for file in cgroup.procs_files
        for name in ("pids.max", "cpu.shares", "cpu.weight")
        if (Path(file).parent / name).exists()
    ]
    assert texts
    assert set(texts) <= {"max", "1024", "100"}


@pytest.mark.root
@pytest.mark.parametrize("level", [Level.PROCESS, Level.NAMESPACE])
def test_out_of_memory_kills_only_inside(yard: Yard, limits: Limits, level: Level) -> None:
    """The hog dies of SIGKILL at its limit, swap or not; the figure says so; a neighbour with the same limit lives."""
    quiet = "import signal; print('ready', flush=True); signal.pause()"
    bystander = yard.start(
        level,
        yard.instance("quiet", (PYTHON, "-c", quiet), uid=UID, cgroup=limits.prepare("quiet", memory_mb=64)),
    )
    bystander.read_until(b"ready")
    hog = "held = []\nwhile len(held) < 400: held.append(b'x' * (1 << 20))\nprint('no limit')"
    made = yard.instance("hog", (PYTHON, "-c", hog), uid=UID + 1, cgroup=limits.prepare("hog", memory_mb=48))
    status, output = yard.run(level, made)
    assert status in (-9, 137)
    assert "no limit" not in output
    hurt, spared = limits.stats("hog"), limits.stats("quiet")
    assert hurt is not None
    assert hurt.oom_kills
    assert spared is not None
    assert spared.oom_kills == 0
    os.kill(bystander.pid, 0)


@pytest.mark.root
def test_scratch_space_counts_as_memory(yard: Yard, limits: Limits) -> None:
    """/tmp behind the wall is memory, so the memory limit bounds it."""
    fill = "import os\nwith open('/tmp/fill', 'wb') as f:\n  for _ in range(200): f.write(bytes(1 << 20))\nprint('no limit')"
    made = yard.instance("filler", (PYTHON, "-c", fill), uid=UID, cgroup=limits.prepare("filler", memory_mb=48))
    status, output = yard.run(Level.NAMESPACE, made)
    assert status in (-9, 137, 1)
    assert "no limit" not in output


@pytest.mark.root
@pytest.mark.parametrize("level", [Level.PROCESS, Level.NAMESPACE])
def test_a_fork_bomb_stays_small_and_dies_whole(yard: Yard, limits: Limits, level: Level) -> None:
    bomb = """
import os, signal
failed = 0
while failed < 50:
    try:
        if os.fork() == 0:
            signal.alarm(60)
            signal.pause()
    except OSError:
        failed += 1
        if failed == 1:
            print("full", flush=True)
signal.pause()
"""
    cgroup = limits.prepare("bomb", memory_mb=256, pids=30)
    running = yard.start(level, yard.instance("bomb", (PYTHON, "-c", bomb), uid=UID, cgroup=cgroup))
    running.read_until(b"full")
    stats = limits.stats("bomb")
    assert stats is not None
    assert stats.pids is not None
    assert 30 <= stats.pids <= 32
    assert not limits.remove("bomb")
    limits.kill("bomb")
    assert running.wait() != 0
    wait_until(lambda: limits.remove("bomb"), "the group is empty")


@pytest.mark.root
def test_killing_works_without_the_kernels_own_way(yard: Yard, limits: Limits) -> None:
    """As on kernels before 5.14, which have no cgroup.kill."""
    older = Limits(tuple(place for place in limits._places if not place.unified))
    if not older.controllers:
        pytest.skip("cgroup v1 is not mounted")
    cgroup = older.prepare("older", pids=50)
    assert cgroup.kill_file is None
    forking = "import os, time\nfor _ in range(5): os.fork()\nprint('ready', flush=True)\ntime.sleep(100)"
    running = yard.start(Level.PROCESS, yard.instance("older", (PYTHON, "-c", forking), uid=UID, cgroup=cgroup))
    running.read_until(b"ready")
    older.kill("older")
    assert running.wait() == -9
    wait_until(lambda: older.remove("older"), "the group is empty")


@pytest.mark.root
def test_figures_are_right(yard: Yard, limits: Limits) -> None:
    code = "held = bytearray(b'x' * (30 << 20))\nn = 0\nwhile n < 3_000_000: n += 1\nprint('ready', flush=True)\nimport signal\nsignal.pause()"
    made = yard.instance("known", (PYTHON, "-c", code), uid=UID, cgroup=limits.prepare("known"))
    running = yard.start(Level.PROCESS, made)
    running.read_until(b"ready")
    stats = limits.stats("known")
    assert stats is not None
    ticks = sum(map(int, Path(f"/proc/{running.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    assert stats.pids == 1
    assert stats.oom_kills == 0
    assert stats.memory_bytes is not None
    assert 30 << 20 <= stats.memory_bytes <= 60 << 20
    assert stats.cpu_s == pytest.approx(ticks / os.sysconf("SC_CLK_TCK"), abs=0.1)
    assert limits.stats("unknown") is None


@pytest.mark.root
def test_figures_of_200_services_are_cheap(limits: Limits) -> None:
    """Five small files each, and next to nothing beside reading them: under 20 ms where a file takes 8 us."""
    names = [f"cheap-{number}" for number in range(200)]
    files = [Path(limits.prepare(name).procs_files[0]) for name in names]

    def best(work: Callable[[], object]) -> float:
        took = []
        for _ in range(5):
            began = time.thread_time()
            work()
            took.append(time.thread_time() - began)
        return min(took)

    reading = best(lambda: [read(str(file)) for file in files])
    assert best(lambda: [limits.stats(name) for name in names]) < 12 * reading
    assert set(limits.list()) == set(names)


@pytest.fixture
def subtree(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A group of v2 for the test alone, and a controller that it may hand on.

    Where v1 has memory, cpu and pids, v2 may still have hugetlb; the rules are the same for all.
    """
    kernel = read_hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())
    mount = next((hierarchy.mount for hierarchy in kernel if hierarchy.unified), None)
    if mount is None:
        pytest.skip("cgroup v2 is not mounted")
    there = set((mount / "cgroup.controllers").read_text().split())
    wanted = next((name for name in ("hugetlb", "pids") if name in there), None)
    if wanted is None:
        pytest.skip("cgroup v2 has no controller to try this with")
    monkeypatch.setattr(detecting, "WANTED", (wanted,))
    enabled = wanted in (mount / "cgroup.subtree_control").read_text().split()
    (mount / "cgroup.subtree_control").write_text(f"+{wanted}")
    top = mount / f"slum-test-{os.getpid()}"
    top.mkdir()
    try:
        yield top, wanted
    finally:
        for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            wait_until(partial(_removed, folder), f"{folder} is empty")
        wait_until(partial(_removed, top), f"{top} is empty")
        if not enabled:
            with suppress(OSError):  # another test may use it now
                (mount / "cgroup.subtree_control").write_text(f"-{wanted}")


@pytest.mark.root
@pytest.mark.xdist_group("cgroup2")
def test_in_a_container_the_root_group_is_emptied_into_a_leaf(subtree: tuple[Path, str]) -> None:
    """Its processes block every controller, unlike those of the machine's true root; afterwards all works, repeatedly."""
    top, wanted = subtree
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as sleeper:
        (top / "cgroup.procs").write_text(str(sleeper.pid))
        for own in ("/", "/init"):
            place = try_unified(Hierarchy(mount=top, unified=True, own=own), "slum-x")
            assert place == Place(base=top / "slum-x", unified=True, controllers=frozenset({wanted}))
        assert (top / "init" / "cgroup.procs").read_text().split() == [str(sleeper.pid)]
        assert (top / "cgroup.procs").read_text() == ""
        sleeper.kill()


@pytest.mark.root
@pytest.mark.xdist_group("cgroup2")
def test_processes_of_a_group_that_is_not_ours_stay_where_they_are(subtree: tuple[Path, str]) -> None:
    top, _ = subtree
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as sleeper:
        (top / "cgroup.procs").write_text(str(sleeper.pid))
        place = try_unified(Hierarchy(mount=top, unified=True, own="/elsewhere"), "slum-x")
        assert place.controllers == frozenset()
        assert (top / "cgroup.procs").read_text().split() == [str(sleeper.pid)]
        sleeper.kill()


@pytest.mark.root
@pytest.mark.xdist_group("cgroup2")
def test_a_unit_with_a_leaf_of_its_own_keeps_services_inside(subtree: tuple[Path, str]) -> None:
    """As systemd makes it with Delegate=yes and DelegateSubgroup=keeper."""
    top, wanted = subtree
    unit = top / "slum.service"
    (unit / "keeper").mkdir(parents=True)
    (top / "cgroup.subtree_control").write_text(f"+{wanted}")
    os.setxattr(unit, "user.delegate" if _takes_user_xattr(unit) else "trusted.delegate", b"1")
    hierarchy = Hierarchy(mount=top, unified=True, own="/slum.service/keeper")
    assert try_unified(hierarchy, "slum-x") == Place(
        base=unit / "slum-x", unified=True, controllers=frozenset({wanted})
    )
    assert not (top / "slum-x").exists()


def _takes_user_xattr(folder: Path) -> bool:
    try:
        os.setxattr(folder, "user.try", b"1")
    except OSError:
        return False
    return True


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True
