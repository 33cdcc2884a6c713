"""A fork that stands in its cgroups: born there in version 2, by itself in version 1, and as ever where clone3 is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from walls_support import Yard, open_limits, open_yard

from slum.node.limits.groups import Limits
from slum.node.seccomp import filter_file

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("limits")]

FORK = """
import json, os, sys
from slum.node.joiner import PR_SET_SECCOMP, SECCOMP_MODE_FILTER, INSTRUCTION_BYTES, Filter, ctypes, libc
from slum.node.keeper_fork import enter, fork_into
files, rules = json.loads(sys.argv[1]), sys.argv[2]
if rules:
    content = open(rules, "rb").read()
    program = Filter(len(content) // INSTRUCTION_BYTES, content)
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0
pid, left = fork_into(files)
if pid == 0:
    for path in left:
        enter(path)
    print(json.dumps({"left": left, "pid": os.getpid(), "groups": open("/proc/self/cgroup").read().splitlines()}))
    sys.exit(7)
_, status = os.waitpid(pid, 0)
print(json.dumps([pid, os.waitstatus_to_exitcode(status)]))
"""


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


@pytest.mark.parametrize("clone3", [True, False])
def test_a_fork_stands_in_every_group(yard: Yard, limits: Limits, clone3: bool) -> None:
    cgroup = limits.prepare("born", pids=20)
    rules = "" if clone3 else str(filter_file(yard.home.private))
    argv = [sys.executable, "-c", FORK, json.dumps(cgroup.procs_files), rules]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20)
    child, parent = map(json.loads, done.stdout.splitlines())
    assert parent == [child["pid"], 7]
    assert len([line for line in child["groups"] if line.endswith("/born")]) == len(cgroup.procs_files)
    old = [path for path in cgroup.procs_files if Path(path).with_name("tasks").exists()]
    assert child["left"] == (old if clone3 else list(cgroup.procs_files))
