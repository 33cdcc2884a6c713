"""The node's own vocabulary: what a runner is given, what the keeper is asked to spawn. Plain frozen data.

Spawn is the one form in which a child is described, whoever asks; keeper.py (stdlib only) reads it as JSON, so its field
names are the keeper's protocol, version 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from slum.frozen import Frozen
from slum.model import Key, Level, Service


class OpenFile(Frozen):
    """A file that the keeper opens read-only and leaves to the child as descriptor *fd*."""

    path: str
    fd: int


class Log(Frozen):
    """Where the child's output goes: *path* and its rotated files PATH.1 (newest) .. PATH.<keep>.

    *mark*, unless 0, stands in each line after its time: whose it is, when several children write to one file.
    """

    path: str
    mark: int = 0
    bytes_max: int = 8 << 20
    keep: int = 4
    rate_bytes_s: int = 4 << 20
    burst_bytes: int = 16 << 20


class Respawn(Frozen):
    """Start again whenever it exits, after a delay that doubles from min to max while it keeps dying young.

    With *silent_ms_max* it is also killed when it hangs: when it has begun to tell that it lives (slum.alive) and then has
    not for that long.
    """

    delay_ms_min: int = 100
    delay_ms_max: int = 5_000
    silent_ms_max: int = 0


class Signalling(Frozen):
    """Which process of the child's tree takes signals: 0 is the child itself, n its first descendant n below.

    bubblewrap stands as monitor (0), namespace init (1), program (2): TERM goes to 2, and KILL to 1, which takes the whole
    PID namespace with it; at level process KILL goes to the process group and to *kill_file* (cgroup.kill) or to every
    pid in *procs_files*.
    """

    term_depth: int = 0
    kill_depth: int = 0
    kill_file: str | None = None
    procs_files: tuple[str, ...] = ()


class Spawn(Frozen):
    """One child, whole. *name* is unique in the keeper; a second spawn of a living name is refused ("exists").

    The child starts in a session of its own, with an environment of exactly *env* (and LISTEN_PID, LISTEN_FDS,
    LISTEN_FDNAMES when *listeners* are given and *listen_env* is true), descriptors 0 (/dev/null), 1 and 2 (the log FIFO,
    opened read-write), *listeners* from 3 on, then *open_files* at their numbers, and no others. Order of entering: cgroup
    files (the child writes "0"), oom score, nice, limits, descriptors, umask, groups, gid, uid, cwd, no_new_privs, exec.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str = "/"
    uid: int | None = None
    gid: int | None = None
    groups: tuple[int, ...] = ()
    umask: int = 0o022
    nice: int = 0
    oom_score_adj: int | None = None
    no_new_privs: bool = True
    rlimits: dict[str, tuple[int, int]] = {}
    """By lower-case name: {"nofile": (soft, hard), "core": (0, 0)}."""
    cgroup_procs: tuple[str, ...] = ()
    listeners: tuple[str, ...] = ()
    listen_env: bool = True
    open_files: tuple[OpenFile, ...] = ()
    log: Log | None = None
    respawn: Respawn | None = None
    signalling: Signalling = Signalling()
    meta: dict[str, str | int | None] = {}
    """The asker's own words (at most 2 KiB as JSON); kept on disk and given back by list."""


class Instance(Frozen):
    """All that a runner needs to put up one generation's wall. Paths are the host's; everything is interpolated."""

    key: Key
    service: Service
    release: str
    generation: int
    name: str
    """The child's name in the keeper: ``i/<short key>/<generation>``."""
    command: tuple[str, ...]
    env: dict[str, str]
    """The service's whole environment: env, secrets, SOCKET_PATH, PORT, SLUM_*, PATH, HOME; nothing inherited."""
    uid: int | None
    """None when not root: the service runs as the user that slum runs as."""
    gid: int | None
    bundle: Path | None
    """The unpacked, read-only bundle, or the built copy of it."""
    data: Path
    """Its own folder, read-write."""
    run: Path
    """The folder of its sockets, read-write: the same path inside and outside of the wall."""
    workdir: Path
    log: Path
    listener: str | None = None
    """Name of the keeper's listener that becomes fd 3 (``listen = "fd"``)."""
    cgroup: Cgroup | None = None
    network: bool = True
    writable: tuple[Path, ...] = ()
    """More folders to mount read-write (a build's working copy)."""


class Cgroup(Frozen):
    """An instance's place in the cgroup tree, as node.limits made it. Empty tuples where nothing works."""

    name: str
    procs_files: tuple[str, ...]
    kill_file: str | None = None


class Available(Frozen, tag=True):
    """The level works here; *how* is one line for doctor, e.g. "bubblewrap 0.8.0: private /proc proven in 4 ms"."""

    how: str


class Unavailable(Frozen, tag=True):
    """The level does not work here; *fix* is what to install or allow."""

    why: str
    fix: str


class Runner(Protocol):
    """One isolation level. Runners build descriptions; they start nothing but their own timed probe."""

    level: Level

    def probe(self) -> Available | Unavailable:
        """Prove within a deadline that the level works, by doing it; never "the binary exists"."""
        ...

    def spawn(self, instance: Instance) -> Spawn:
        """Return what the keeper shall spawn. Pure but for reading what the machine has (which folders exist)."""
        ...
