"""Fork a child that stands in its cgroups, without the wait that entering one usually costs.

A pid written to cgroup.procs makes the kernel stop all forks of the machine, and after a pause that waits for an RCU
grace period: 10 to 20 ms for a lone start. Two ways go without. In v2 the child is born in its group (clone3 with
CLONE_INTO_CGROUP, Linux 5.7); in v1 a process of one thread moves itself by its group's ``tasks`` (Linux 5.5; older ones
wait there too). Where clone3 is refused (a container's system call filter) the child enters by cgroup.procs.

clone3 is called as it is, without what os.fork does around it: that frees locks which other threads may hold, and costs a
child half of its page faults. So it is only called by a process of one thread, whose child soon executes a program. Must
never return a child that stands elsewhere than asked.
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
FLAGS, EXIT_SIGNAL, CGROUP = 0, 4, 10
"""Where these stand among the numbers of struct clone_args."""

_arguments = (ctypes.c_uint64 * 11)()
_arguments[EXIT_SIGNAL] = signal.SIGCHLD
_syscall = ctypes.PyDLL(None).syscall  # PyDLL keeps the GIL, as os.fork does
_syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t)
_syscall.restype = ctypes.c_long
_address, _size = ctypes.addressof(_arguments), ctypes.sizeof(_arguments)


def fork_into(cgroup_procs: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Fork; return the pid (0 in the child) and the files by which the child must still ``enter`` its groups."""
    unified = next((path for path in cgroup_procs if path.endswith(PROCS) and not os.path.exists(_tasks(path))), None)
    pid = _clone_into(os.path.dirname(unified)) if unified and len(os.listdir("/proc/self/task")) == 1 else -1
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
    """Fork a child that is born in the cgroup *folder*; return -1 when the kernel does not do that."""
    try:
        group = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1  # the usual way says what is wrong
    _arguments[FLAGS], _arguments[CGROUP] = CLONE_INTO_CGROUP, group
    pid: int = _syscall(SYS_CLONE3, _address, _size)
    os.close(group)
    return pid


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
