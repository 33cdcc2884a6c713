"""Level `process`: the program itself, as a uid of its own when slum is root, with limits and no new privileges.

There is no wall but the kernel's between users: the service sees the host's files, processes and network as any user
does. Without root it runs as the user that slum runs as. Builds descriptions; must never start a service itself.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from slum.errors import ConfigError
from slum.model import Level
from slum.node.runners.common import PROBE_UID, UMASK, rlimits, unreachable
from slum.node.types import Available, Instance, Log, Signalling, Spawn, Unavailable
from slum.paths import Home

PROBE_TIMEOUT_S = 5.0


class ProcessRunner:
    """Starts programs directly. *home* is only looked at by the probe: can services' uids reach it?"""

    level = Level.PROCESS

    def __init__(self, home: Home) -> None:
        self._home = home

    def probe(self) -> Available | Unavailable:
        """Run a program as the uid that services get (not root's), and time it."""
        root = os.geteuid() == 0
        if root and (wrong := unreachable(self._home)):
            return wrong
        uid = PROBE_UID if root else os.geteuid()
        began = time.monotonic()
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", "id -u"],
                env={"PATH": "/usr/bin:/bin"},
                cwd="/",
                capture_output=True,
                text=True,
                timeout=PROBE_TIMEOUT_S,
                check=False,
                **({"user": uid, "group": uid, "extra_groups": []} if root else {}),  # type: ignore[call-overload]
            )
        except (OSError, subprocess.SubprocessError) as error:
            return Unavailable(why=f"a program cannot be started as uid {uid}: {error}", fix="allow setuid to slum")
        if done.stdout.strip() != str(uid):
            return Unavailable(
                why=f"a program started as uid {uid} says {done.stdout.strip()!r}", fix="see the kernel log"
            )
        took = f"started in {(time.monotonic() - began) * 1000:.0f} ms"
        if root:
            return Available(how=f"a uid for each service, {took}; files and processes of the host are visible")
        return Available(how=f"{took}; not root, so services share uid {uid} with slum and are not kept apart")

    def spawn(self, instance: Instance) -> Spawn:
        """Return the program itself, found on the service's PATH; ConfigError when it is not there."""
        if not instance.network:
            raise ConfigError(f"{instance.key}: level process cannot take the network away", hint="use level namespace")
        cgroup = instance.cgroup
        return Spawn(
            name=instance.name,
            argv=(find_program(instance), *instance.command[1:]),
            env=instance.env,
            cwd=str(instance.workdir),
            uid=instance.uid,
            gid=instance.gid,
            umask=UMASK,
            rlimits=rlimits(),
            cgroup_procs=cgroup.procs_files if cgroup else (),
            listeners=(instance.listener,) if instance.listener else (),
            log=Log(path=str(instance.log), mark=instance.generation),
            signalling=Signalling(
                kill_file=cgroup.kill_file if cgroup else None, procs_files=cgroup.procs_files if cgroup else ()
            ),
        )


def find_program(instance: Instance) -> str:
    """Return the absolute path of the first word of the command.

    A word with a slash is meant from the workdir, as the started program would see it; any other is looked up on the
    service's own PATH, whose relative entries are meant from the workdir too.
    """
    word, workdir = instance.command[0], Path(instance.workdir)
    if "/" in word:
        return str(workdir / word)
    path = instance.env.get("PATH", os.defpath)
    found = shutil.which(word, path=os.pathsep.join(str(workdir / entry) for entry in path.split(os.pathsep) if entry))
    if found is None:
        raise ConfigError(
            f"{instance.key}: there is no program {word!r} on its PATH ({path})",
            hint="give the command's full path, or set PATH in the service's env",
        )
    return found
