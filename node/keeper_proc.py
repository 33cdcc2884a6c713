"""What the keeper asks the kernel about processes: who lives, who descends from whom, and signals that cannot miss.

A pid alone names nobody, for it may be reused: every signal goes through a pidfd that was opened first and proven after
(start time, parent, or place in a cgroup). Standard library only; Linux 5.6 or newer.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SYS_PIDFD_GETFD = 438
"""The same number on every architecture (pidfd_getfd(2))."""
SWEEP_BATCH = 256

_libc = ctypes.CDLL(None, use_errno=True)


class Stat:
    """The few fields of /proc/PID/stat that matter here."""

    __slots__ = ("cpu_ticks", "group", "parent", "session", "start_time", "state")

    def __init__(self, text: bytes) -> None:
        fields = text[text.rindex(b")") + 2 :].split()
        self.state = fields[0].decode()
        self.parent = int(fields[1])
        self.group = int(fields[2])
        self.session = int(fields[3])
        self.cpu_ticks = int(fields[11]) + int(fields[12])
        self.start_time = int(fields[19])


def read_stat(pid: int) -> Stat | None:
    """Return what the kernel says of *pid*, or None when there is no such process."""
    try:
        return Stat(read_bytes(f"/proc/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def read_bytes(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def boot_id() -> str:
    return read_bytes("/proc/sys/kernel/random/boot_id").decode().strip()


def open_living(pid: int, start_time: int) -> int | None:
    """Return a pidfd of the process *pid* that started at *start_time*, or None when it is gone or another."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stat = read_stat(pid)
    if stat is not None and stat.start_time == start_time and stat.state not in "ZX":
        return pidfd
    os.close(pidfd)
    return None


def has_exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def send(pidfd: int, signum: int) -> bool:
    """Send *signum*; False when the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    """Return the children of *pid*, oldest first; empty when it is gone."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read_bytes(f"/proc/{pid}/task/{thread}/children").split())
    except FileNotFoundError:
        if os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
            return found  # it is gone; else this kernel was built without that file
        return [other for other in pids() if (stat := read_stat(other)) is not None and stat.parent == pid]
    except ProcessLookupError:
        return found
    return found


def thread_states(pid: int) -> list[str]:
    """Return the state of each thread of *pid* (see proc_pid_stat(5)); empty when it is gone."""
    try:
        return [Stat(read_bytes(f"/proc/{pid}/task/{thread}/stat")).state for thread in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def tree(pid: int) -> list[int]:
    """Return *pid* and all that descend from it, parents first."""
    found = [pid]
    for each in found:
        found += children(each)
    return found


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def open_descendant(pid: int, start_time: int, depth: int) -> int | None:
    """Return a pidfd of the first descendant *depth* generations below *pid*, or None when there is none (yet)."""
    pidfd = open_living(pid, start_time)
    for _ in range(depth):
        if pidfd is None:
            return None
        below = _open_first_child(pid)
        if below is not None and has_exited(pidfd):
            os.close(below[1])
            below = None
        os.close(pidfd)
        pid, pidfd = below or (0, None)
    return pidfd


def _open_first_child(parent: int) -> tuple[int, int] | None:
    for pid in children(parent):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        stat = read_stat(pid)
        if stat is not None and stat.parent == parent and stat.state not in "ZX":
            return pid, pidfd
        os.close(pidfd)
    return None


def sweep(procs_files: Sequence[str], signum: int) -> int:
    """Signal every process that the cgroup files *procs_files* list; return how many were found."""
    return sum(_sweep_file(path, signum) for path in procs_files)


def _sweep_file(path: str, signum: int) -> int:
    listed = sorted(_listed(path))
    for first in range(0, len(listed), SWEEP_BATCH):
        pidfds: dict[int, int] = {}
        try:
            for pid in listed[first : first + SWEEP_BATCH]:
                try:
                    pidfds[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
            # Listed again after its pidfd was opened: the pidfd is of a process of this cgroup and no stranger's.
            still = _listed(path)
            for pid, pidfd in pidfds.items():
                if pid in still:
                    send(pidfd, signum)
        finally:
            close_all(pidfds.values())
    return len(listed)


def _listed(path: str) -> set[int]:
    try:
        # 0 stands for a process of another PID namespace; one that we could signal by mistake is ourselves.
        return {int(word) for word in read_bytes(path).split()} - {0, os.getpid()}
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()
    except OSError:  # ENODEV: the cgroup was removed while we read
        return set()


def kill_session(leader: int, start_time: int) -> int:
    """Kill what is left of the session and group of a *leader* that is gone; return how many were found."""
    stat = read_stat(leader)
    if stat is not None and stat.start_time != start_time:
        return 0  # the number was given away, which it is not while the session has members
    found = 0
    for pid in pids():
        stat = read_stat(pid)
        if pid == leader or stat is None or leader not in (stat.session, stat.group) or stat.state in "ZX":
            continue
        pidfd = open_living(pid, stat.start_time)
        if pidfd is not None:
            found += send(pidfd, signal.SIGKILL)
            os.close(pidfd)
    return found


def sockets_of(pid: int) -> dict[int, int]:
    """Return {inode: descriptor} of the sockets that *pid* holds; empty when it is gone or not ours to look at."""
    found = {}
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            if target.startswith("socket:["):
                found[int(target[8:-1])] = int(name)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return found
    return found


def take_fd(pid: int, fd: int) -> int:
    """Return a copy of descriptor *fd* of *pid*; OSError (EPERM: not ours to take, ENOSYS: kernel too old)."""
    pidfd = os.pidfd_open(pid)
    try:
        taken: int = _libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0)
    finally:
        os.close(pidfd)
    if taken < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return taken  # close-on-exec by definition


def prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
