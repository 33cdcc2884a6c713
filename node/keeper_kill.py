"""Signals to a child: to the one process that should take it, or, for SIGKILL, to all that the child is made of.

What is killed is proven to be the child's: by a pidfd checked against start time, parent, session or cgroup. A cgroup
that another living child shares is never emptied.
"""

from __future__ import annotations

import os
import signal

from slum.node import keeper_proc as proc
from slum.node.keeper_loop import Loop
from slum.node.keeper_table import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SWEEP_PAUSE_S = 0.02
SWEEPS_MAX = 250
"""Five seconds: what a fork bomb's last survivors may take to die."""


class Killer:
    """Signals children; *everybody* returns all children of the keeper."""

    def __init__(self, loop: Loop, everybody: Callable[[], Iterable[Child]]) -> None:
        self._loop = loop
        self._everybody = everybody

    def signal(self, child: Child, signum: int, *, tree: bool) -> bool:
        """Send *signum* to the process that Signalling names (to all descendants when *tree*); False when it is gone.

        While the process at that depth is not there yet, the child itself takes the signal.
        """
        if signum == signal.SIGKILL:
            return self.kill(child)
        target = self._open(child, child.spawn["signalling"]["term_depth"])
        if target is None:
            return False
        try:
            if tree:
                family = proc.tree(child.pid)
                for pid in reversed(family[1:]):
                    _send_to(pid, family, signum)
            return proc.send(target, signum)
        finally:
            os.close(target)

    def kill(self, child: Child) -> bool:
        """Kill *child*: the init of its namespace when it has one, else group, session and cgroup; False when gone."""
        depth = child.spawn["signalling"]["kill_depth"]
        init = proc.open_descendant(child.pid, child.start_time, depth) if depth else None
        target = init if init is not None else self._open(child, 0)
        if target is not None:
            if init is None:
                self.kill_group(child)
            proc.send(target, signal.SIGKILL)
            os.close(target)
        if init is None:
            self.kill_cgroup(child)
        return target is not None

    def kill_group(self, child: Child) -> None:
        """Kill the process group of *child*: one of ours that is not reaped yet, else found by session and start time."""
        if not child.own:
            proc.kill_session(child.pid, child.start_time)
            return
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # nobody left; or only such as changed their uid, which the cgroup takes

    def kill_cgroup(self, child: Child, sweeps: int = 0) -> None:
        """Kill all that is in the cgroup of *child*, again and again until it is empty, for a bounded time."""
        signalling = child.spawn["signalling"]
        kill_file, procs_files = signalling["kill_file"], signalling["procs_files"]
        if not (kill_file or procs_files) or self._shared(child):
            return
        if kill_file and _wrote(kill_file):
            return
        if proc.sweep(procs_files, signal.SIGKILL) and sweeps < SWEEPS_MAX:
            self._loop.after(SWEEP_PAUSE_S, lambda: self.kill_cgroup(child, sweeps + 1))

    def _open(self, child: Child, depth: int) -> int | None:
        target = proc.open_descendant(child.pid, child.start_time, depth) if depth else None
        return target if target is not None else proc.open_living(child.pid, child.start_time)

    def _shared(self, child: Child) -> bool:
        mine = _places(child)
        return any(other is not child and other.running and mine & _places(other) for other in self._everybody())


def _places(child: Child) -> set[str]:
    signalling = child.spawn["signalling"]
    return {*signalling["procs_files"], signalling["kill_file"] or ""} - {""}


def _send_to(pid: int, family: list[int], signum: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    stat = proc.read_stat(pid)
    if stat is not None and stat.parent in family:
        proc.send(pidfd, signum)
    os.close(pidfd)


def _wrote(path: str) -> bool:
    try:
        with open(path, "wb", buffering=0) as file:
            file.write(b"1")
    except OSError:
        return False
    return True
