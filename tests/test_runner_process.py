"""Level process in particular: how the program is found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from slum.errors import ConfigError
from slum.model import Key, Level, Service
from slum.node.runners.process import ProcessRunner, find_program
from slum.node.types import Cgroup, Instance
from slum.paths import Home


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    (tmp_path / "bin").mkdir()
    for name in ("run.sh", "bin/tool", "bin/plain"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o644 if name == "bin/plain" else 0o755)
    return Instance(
        key=Key(tenement="here", service="web", id="main"),
        service=Service(name="web", command=("x",)),
        release="0" * 64,
        generation=3,
        name="i/abc/3",
        command=("x",),
        env={"PATH": "bin:/usr/bin"},
        uid=200_001,
        gid=200_001,
        bundle=tmp_path,
        data=tmp_path / "data",
        run=tmp_path / "run",
        workdir=tmp_path,
        log=tmp_path / "log",
    )


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("sh", "/usr/bin/sh"),
        ("/opt/x", "/opt/x"),
        ("./run.sh", "run.sh"),
        ("bin/tool", "bin/tool"),
        ("tool", "bin/tool"),
    ],
)
def test_the_program_is_found_as_the_service_would(instance: Instance, word: str, found: str) -> None:
    wanted = msgspec.structs.replace(instance, command=(word, "arg"))
    assert find_program(wanted) == str(instance.workdir / found)


@pytest.mark.parametrize("word", ["nonesuch", "plain"])
def test_a_program_that_is_not_there_is_named(instance: Instance, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"here/web/main: there is no program '{word}' on its PATH \(bin:/usr/bin\)"):
        find_program(msgspec.structs.replace(instance, command=(word,)))


def test_what_the_keeper_is_asked(instance: Instance) -> None:
    cgroup = Cgroup(name="web", procs_files=("/cg/a", "/cg/b"), kill_file="/cg/kill")
    made = msgspec.structs.replace(instance, command=("sh", "-c", "true"), cgroup=cgroup, listener="web")
    spawn = ProcessRunner(Home(data=Path("/d"), run=Path("/r"))).spawn(made)
    assert spawn.argv == ("/usr/bin/sh", "-c", "true")
    assert spawn.env == instance.env
    assert (spawn.uid, spawn.gid, spawn.groups) == (200_001, 200_001, ())
    assert spawn.no_new_privs
    assert spawn.cgroup_procs == spawn.signalling.procs_files == cgroup.procs_files
    assert spawn.signalling.kill_file == "/cg/kill"
    assert (spawn.signalling.term_depth, spawn.signalling.kill_depth) == (0, 0)
    assert spawn.listeners == ("web",)
    assert spawn.listen_env
    assert spawn.rlimits["core"] == (0, 0)


def test_the_network_cannot_be_taken_away(instance: Instance) -> None:
    runner = ProcessRunner(Home(data=Path("/d"), run=Path("/r")))
    assert runner.level is Level.PROCESS
    with pytest.raises(ConfigError, match="cannot take the network away"):
        runner.spawn(msgspec.structs.replace(instance, network=False))
