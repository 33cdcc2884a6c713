"""A command inside the wall of a running instance, for `slum exec`: the same user, environment, folders and cgroup.

At level process that is all there is to enter. At level namespace nsenter joins the namespaces of the instance's own
processes, found below the child and proven by its start time. What is entered has no system call filter of its own, but no
capability and no new privileges either. Must never enter a process that is not the keeper's child.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from slum.errors import SlumError
from slum.model import Level
from slum.node.keeperclient import Child
from slum.node.types import Instance, Runner, Signalling, Spawn

NSENTER = "/usr/bin/nsenter"
IN_FOLDER = 'cd "$1" && shift && exec "$@"'


def entering(instance: Instance, child: Child, runner: Runner, name: str, command: tuple[str, ...]) -> Spawn:
    """Return what runs *command* as *name* inside the running *instance*, whose child is *child*."""
    inside = msgspec.structs.replace(instance, name=name, command=command, listener=None)
    if instance.service.isolation is Level.PROCESS:
        spawn = runner.spawn(inside)
    elif instance.service.isolation is Level.NAMESPACE:
        spawn = _in_namespaces(inside, child)
    else:
        raise SlumError(f"`slum exec` does not reach into level {instance.service.isolation} yet", hint="slum run")
    # The cgroup is the instance's: ending this command must not end that.
    return msgspec.structs.replace(spawn, signalling=Signalling(), log=None)


def _in_namespaces(instance: Instance, child: Child) -> Spawn:
    pid = _innermost(child)
    own_user = os.stat("/proc/self/ns/user").st_ino == os.stat(f"/proc/{pid}/ns/user").st_ino
    user: tuple[str, ...] = () if own_user else ("--user",)
    if instance.uid is not None:
        user = (*user, f"--setgid={instance.gid}", f"--setuid={instance.uid}")
    elif user:
        user = (*user, "--preserve-credentials")
    return Spawn(
        name=instance.name,
        argv=(
            NSENTER,
            f"--target={pid}",
            *("--mount", "--pid", "--ipc", "--uts"),
            *user,
            *("--", "/bin/sh", "-c", IN_FOLDER, "sh", str(instance.workdir)),
            *instance.command,
        ),
        env=instance.env,
        cgroup_procs=instance.cgroup.procs_files if instance.cgroup else (),
    )


def _innermost(child: Child) -> int:
    """Return the pid of the program below *child*'s monitor and init, proven to be below it."""
    pid = child.pid
    try:
        for _ in range(2):
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        start_time = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError) as error:
        raise SlumError(f"{child.name} is not running", hint="slum ps") from error
    if start_time != child.start_time:
        raise SlumError(f"{child.name} is not running", hint="slum ps")
    return pid
