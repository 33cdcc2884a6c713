"""Run as a script: join a process's namespaces, become its user, take its system call filter, and run a command there.

    python -I -S joiner.py PID UID GID WORKDIR FILTER_FD COMMAND...        (UID and GID: - for the user that we are)

For `slum exec`, which the keeper starts as slum's own user. util-linux's nsenter cannot do it without root, because
bubblewrap nests two user namespaces: the outer one owns the others, so it has to be joined first and the inner one last.
The command's environment comes in names that begin with PREFIX, so that nothing of it (LD_PRELOAD, PYTHONPATH) acts
on this program. Standard library only. Must never run the command with a capability, nor without the filter.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys

PREFIX = "IN_"
NS_GET_PARENT = 0xB702
"""ioctl_ns(2): the user namespace above one."""
NAMESPACES = ("ipc", "uts", "pid", "mnt")
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
INSTRUCTION_BYTES = 8
FORWARDED = (signal.SIGTERM, signal.SIGHUP)

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def main(arguments: list[str]) -> int:
    """Do it, and return the command's exit status, 128 + n when signal n ended it."""
    pid, uid, gid, workdir, filter_fd, *command = arguments
    environment = {name[len(PREFIX) :]: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    rules = read_all(int(filter_fd))
    if os.geteuid() == 0:
        os.setgroups([])
    join(int(pid))
    child = os.fork()
    if child == 0:
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if uid != "-":
            os.setresgid(int(gid), int(gid), int(gid))
            os.setresuid(int(uid), int(uid), int(uid))
        check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        os.chdir(workdir)
        become(command, environment, rules)
    for signum in FORWARDED:
        signal.signal(signum, lambda number, _frame: os.kill(child, number))
    for signum in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(signum, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def join(pid: int) -> None:
    """Enter the namespaces of *pid*: the outermost user namespace, what it owns, then the inner user namespaces."""
    others = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    users = user_namespaces(pid)
    for fd in (*users[:1], *others, *users[1:]):
        check(libc.setns(fd, 0))
        os.close(fd)


def user_namespaces(pid: int) -> list[int]:
    """Return descriptors of the user namespaces between ours and that of *pid*, the outermost first; [] when the same."""
    own = os.stat("/proc/self/ns/user").st_ino
    chain: list[int] = []
    fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
    while os.fstat(fd).st_ino != own:
        chain.append(fd)
        fd = fcntl.ioctl(fd, NS_GET_PARENT)
    os.close(fd)
    return chain[::-1]


def become(command: list[str], environment: dict[str, str], rules: bytes) -> None:
    """Execute *command*, found on its own PATH, under the filter *rules*; a clear last line when that fails."""
    os.closerange(3, 1024)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    program = Filter(len(rules) // INSTRUCTION_BYTES, rules)
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))
    # Nothing can be imported any more: Python's library is not behind the wall. So no os.execvpe.
    folders = environment.get("PATH", os.defpath).split(":") if "/" not in command[0] else [""]
    why: OSError = FileNotFoundError(2, "No such file or directory")
    for folder in folders:
        try:
            os.execve(f"{folder}/{command[0]}" if folder else command[0], command, environment)
        except OSError as error:
            why = why if isinstance(error, FileNotFoundError | NotADirectoryError) else error
    os.write(2, f"{command[0]}: {why.strerror}\n".encode())
    os._exit(127 if isinstance(why, FileNotFoundError) else 126)


def read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
