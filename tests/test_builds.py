"""Builds: a writable copy in its final place, sealed when the build ended well, begun anew when it did not."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from slum.model import EnvVar, Key, Secret, Service
from slum.node import builds, bundles, trees
from slum.node.types import Instance
from slum.paths import Home

UID = 200_123 if os.geteuid() == 0 else None
DIGEST = "d" * 64


@pytest.fixture
def service() -> Service:
    return Service(
        name="web",
        command=("./run",),
        bundle=DIGEST,
        build='echo "$PWD" > made && mkdir -p venv/bin && ln -s /usr/bin/true venv/bin/python && touch "$HOME/cached"',
        secrets=(Secret(name="TOKEN", source="env:TOKEN"),),
    )


@pytest.fixture
def home(tmp_path: Path, service: Service) -> Home:
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(0o711)  # as slum's data folder is
    home = Home(data=tmp_path / "data", run=tmp_path / "run")
    home.data.mkdir(mode=0o711)
    bundle = bundles.make_folder(home, "web", UID) / DIGEST
    (bundle / "src").mkdir(parents=True)
    (bundle / "src/tool").write_text("tool")
    (bundle / "src/tool").chmod(0o550)
    (bundle / "config").write_text("config")
    (bundle / "config").chmod(0o440)
    (bundle / "link").symlink_to("src/tool")
    return home


def instance(home: Home, service: Service) -> Instance:
    return Instance(
        key=Key(tenement="here", service="web", id="main"),
        service=service,
        release="r",
        generation=0,
        name="b/r",
        command=("./run",),
        env={"PATH": "/usr/bin:/bin", "TOKEN": "secret", "HOME": "/elsewhere", "MODE": "fast"},
        uid=UID,
        gid=UID,
        bundle=bundles.bundle_path(home, "web", DIGEST),
        data=home.services / "web/main",
        run=home.run / "i/x",
        workdir=bundles.bundle_path(home, "web", DIGEST),
        log=home.instance_log("web", "main"),
        listener="i/x/1",
        network=False,
    )


def run(home: Home, service: Service) -> int:
    """Run the build as the service's user, as a runner would but for the wall."""
    wanted = builds.as_build(home, instance(home, service))
    who = {} if UID is None else {"user": UID, "group": UID, "extra_groups": []}
    return subprocess.run(wanted.command, env=wanted.env, cwd=wanted.workdir, check=False, **who).returncode  # type: ignore[call-overload]  # uid keywords by a dict


def test_a_build_is_sealed_in_the_place_it_was_made(home: Home, service: Service) -> None:
    assert builds.built(home, service) is None
    folder = builds.prepare(home, service, UID, UID)
    assert run(home, service) == 0
    assert builds.built(home, service) is None
    assert builds.finish(home, service, UID) == folder == builds.built(home, service)
    assert (folder / "made").read_text() == f"{folder}\n"
    assert os.readlink(folder / "venv/bin/python") == "/usr/bin/true"
    assert (folder / "link").read_text() == "tool"
    assert (builds.cache_folder(home, service) / "cached").exists()
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        assert status.st_uid == os.geteuid()
        if not path.is_symlink():
            assert stat.S_IMODE(status.st_mode) == (0o750 if path.is_dir() else 0o550 if path.name == "tool" else 0o440)
    bundle = bundles.bundle_path(home, "web", DIGEST)
    assert sorted(os.listdir(bundle)) == ["config", "link", "src"]


def test_what_a_killed_build_left_is_begun_anew(home: Home, service: Service) -> None:
    folder = builds.prepare(home, service, UID, UID)
    (folder / "half").write_text("half")
    (folder / "half").chmod(0o400)
    builds.prepare(home, service, UID, UID)
    assert not (folder / "half").exists()
    builds.discard(home, service)
    builds.discard(home, service)
    assert sorted(os.listdir(folder.parent)) == [DIGEST]


def test_a_build_cannot_pretend_to_be_finished(home: Home, service: Service) -> None:
    folder = builds.prepare(home, service, UID, UID)
    assert bundles.build_marker(home, service).parent == folder.parent
    if UID is not None:
        tried = subprocess.run(
            ["/bin/sh", "-c", f"touch ../{folder.name}.built"],
            cwd=folder, user=UID, group=UID, extra_groups=[], capture_output=True, check=False,
        )  # fmt: skip
        assert tried.returncode != 0
    assert builds.built(home, service) is None


def test_sealing_follows_no_link_and_drops_dangerous_bits(home: Home, service: Service, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("x")
    (victim / "file").chmod(0o666)
    folder = builds.prepare(home, service, UID, UID)
    (folder / "out").symlink_to(victim)
    (folder / "file").symlink_to(victim / "file")
    (folder / "tool").write_text("x")
    os.chown(folder / "tool", -1 if UID is None else UID, -1)
    (folder / "tool").chmod(0o4755)
    os.mknod(folder / "s", stat.S_IFSOCK | 0o600)
    os.mkfifo(folder / "fifo")
    (folder / "closed").mkdir(mode=0)
    builds.finish(home, service, UID)
    assert stat.S_IMODE((victim / "file").stat().st_mode) == 0o666
    assert stat.S_IMODE((folder / "tool").stat().st_mode) == 0o550
    assert not {"s", "fifo"} & set(os.listdir(folder))
    trees.remove(folder)
    assert (victim / "file").read_text() == "x"


def test_a_build_sees_neither_secrets_nor_the_instances_data(home: Home, service: Service) -> None:
    made = builds.as_build(home, instance(home, service))
    folder = bundles.build_path(home, service)
    assert made.command == ("/bin/sh", "-c", service.build)
    assert made.env["MODE"] == "fast"
    assert "TOKEN" not in made.env
    assert made.env["HOME"] == str(builds.cache_folder(home, service)) == str(made.data)
    assert (made.bundle, made.listener, made.network) == (None, None, True)
    assert (made.workdir, made.writable) == (folder, (folder,))


def test_only_what_a_build_depends_on_builds_again(home: Home, service: Service) -> None:
    def path(**changes: object) -> Path:
        fields = {"name": "web", "command": ("x",), "bundle": DIGEST, "build": "make", **changes}
        return bundles.build_path(home, Service(**fields))  # type: ignore[arg-type]  # fields by name

    assert path() == path(memory_limit_mb=64, command=("y",), health="/up")
    differing = [path(), path(build="make all"), path(bundle="e" * 64), path(env=(EnvVar(name="A", value="1"),))]
    assert len(set(differing)) == 4


def test_a_build_without_a_source_begins_empty(home: Home) -> None:
    service = Service(name="web", command=("x",), build="touch made")
    folder = builds.prepare(home, service, UID, UID)
    assert os.listdir(folder) == []
    assert run(home, service) == 0
    assert os.listdir(builds.finish(home, service, UID)) == ["made"]
