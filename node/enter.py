"""A command inside the wall of a running instance, for `slum exec`: the same user, environment, folders and cgroup.

At level process that is all there is to enter. At level namespace joiner.py joins the namespaces of the instance's own
processes, found below the child and proven by its start time, and takes the same system call filter. Must never enter a
process that is not the keeper's child.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from slum.errors import SlumError
from slum.model import Level
from slum.node import joiner
from slum.node.keeperclient import Child
from slum.node.types import Instance, Runner, Signalling, Spawn

JOINER = Path(joiner.__file__)


def entering(instance: Instance, child: Child, runner: Runner, name: str, command: tuple[str, ...]) -> Spawn:
    """Return what runs *command* as *name* inside the running *instance*, whose child is *child*."""
    spawn = runner.spawn(msgspec.structs.replace(instance, name=name, command=command, listener=None))
    if instance.service.isolation is Level.NAMESPACE:
        spawn = _in_namespaces(spawn, instance, child, command)
    elif instance.service.isolation is not Level.PROCESS:
        raise SlumError(f"`slum exec` does not reach into level {instance.service.isolation} yet", hint="slum run")
    # The cgroup is the instance's: ending this command must not end that.
    return msgspec.structs.replace(spawn, signalling=Signalling(), log=None)


def _in_namespaces(wall: Spawn, instance: Instance, child: Child, command: tuple[str, ...]) -> Spawn:
    """Return the joiner in place of *wall*, which would put up a second one; its filter is used again."""
    filter_fd = wall.open_files[0].fd
    ids = ("-", "-") if instance.uid is None else (str(instance.uid), str(instance.gid))
    return msgspec.structs.replace(
        wall,
        argv=(
            *(sys.executable, "-I", "-S", str(JOINER)),
            *(str(_innermost(child)), *ids, str(instance.workdir), str(filter_fd)),
            *command,
        ),
        env={f"{joiner.PREFIX}{name}": value for name, value in instance.env.items()},
        uid=None,
        gid=None,
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
