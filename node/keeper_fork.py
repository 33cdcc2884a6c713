"""Fork a child that stands in its cgroups, without the wait that entering one usually costs.

A pid written to cgroup.procs makes the kernel stop all forks of the machine, and after a pause that waits for an RCU
grace period: 10 to 20 ms for a lone start. Two ways go without. In v2 the child is born in its group (clone3 with
CLONE_INTO_CGROUP, Linux 5.7); in v1 a process of one thread moves itself by its group's ``tasks`` (Linux 5.5; older ones
wait there too). Where clone3 is refused (a container's system call filter) the child enters by cgroup.procs. Only for a
process of one thread; must never return a child that stands elsewhere than asked.
"""

from __future__ import annotations

import ctypes
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SYS_CLONE3 = 435
"""The same number on every architecture (clone3(2))."""
CLONE_INTO_CGROUP = 0x2_0000_0000
PROCS, TASKS = "cgroup.procs", "tasks"

_libc = ctypes.PyDLL(None)  # no other thread exists that could use the time, so the GIL is kept, as os.fork keeps it
_python = ctypes.pythonapi


def fork_into(cgroup_procs: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Fork; return the pid (0 in the child) and the files by which the child must still ``enter`` its groups."""
    unified = next((path for path in cgroup_procs if path.endswith(PROCS) and not os.path.exists(_tasks(path))), None)
    pid = _clone_into(os.path.dirname(unified)) if unified else -1
    if pid < 0:
        return os.fork(), tuple(cgroup_procs)
    return pid, tuple(path for path in cgroup_procs if path != unified)


def enter(procs_file: str) -> None:
    """Let this process, which has one thread, enter the group of *procs_file*; OSError when it may not."""
    try:
        _write(_tasks(procs_file), b"0")
    except FileNotFoundError:  # v2
        _write(procs_file, b"0")


def _tasks(procs_file: str) -> str:
    return procs_file.removesuffix(PROCS) + TASKS


def _clone_into(folder: str) -> int:
    """Fork as os.fork does, born in the cgroup *folder*; return -1 when the kernel does not do that."""
    try:
        group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1  # the usual way says what is wrong
    # struct clone_args: flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
    arguments = (ctypes.c_uint64 * 11)(CLONE_INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, group)
    _python.PyOS_BeforeFork()
    pid: int = _libc.syscall(SYS_CLONE3, arguments, ctypes.c_size_t(ctypes.sizeof(arguments)))
    if pid == 0:
        _python.PyOS_AfterFork_Child()
    else:
        _python.PyOS_AfterFork_Parent()
    os.close(group)
    return pid


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
