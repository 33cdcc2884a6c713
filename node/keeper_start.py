"""How a keeper comes up: its arguments, folders, lock, log, and the way into the background.

The folders are those of slum.paths.Home, written out here because importing slum.paths costs the keeper five megabytes;
a test holds the two together.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time

from slum.node.keeper_log import LogFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

LEFT = 75
"""Exit status of a keeper that was asked to end, and leaves children for the next one: not 0, which says that none is needed."""
USAGE = "usage: python -m slum.node.keeper --data-dir DIR --run-dir DIR [--detach | --wait]"


class AlreadyRuns(Exception):
    """Another keeper holds this run folder."""


class Options:
    """The command line. *state* is the number of a descriptor that a keeper left for its own successor."""

    __slots__ = ("data", "detach", "run", "state", "wait")

    def __init__(self, arguments: Sequence[str]) -> None:
        """Read *arguments*; ValueError with the usage when they are not understood."""
        values = {"--data-dir": "", "--run-dir": "", "--state": "-1"}
        self.detach = self.wait = False
        rest = list(arguments)
        while rest:
            word = rest.pop(0)
            if word == "--detach":
                self.detach = True
            elif word == "--wait":
                self.wait = True
            elif word in values and rest:
                values[word] = rest.pop(0)
            else:
                raise ValueError(f"{word!r} is not understood; {USAGE}")
        self.data, self.run = values["--data-dir"].rstrip("/"), values["--run-dir"].rstrip("/")
        if not (self.data.startswith("/") and self.run.startswith("/")):
            raise ValueError(f"both folders must be given, as absolute paths; {USAGE}")
        self.state = int(values["--state"])


class Places:
    """Where the keeper's things lie in a data and a run folder."""

    __slots__ = ("alive", "boot", "data", "fifos", "lock", "log", "private", "run", "socket", "table")

    def __init__(self, data: str, run: str) -> None:
        self.data = data
        self.run = run
        self.private = f"{run}/p"
        self.socket = f"{run}/p/keeper.sock"
        self.lock = f"{run}/p/keeper.lock"
        self.table = f"{run}/p/k"
        self.fifos = f"{run}/p/f"
        self.alive = f"{run}/p/w"
        self.boot = f"{data}/boot.json"
        self.log = f"{data}/logs/_slum/keeper/current"


def prepare(places: Places) -> None:
    """Make the folders; OSError when one belongs to somebody else or is open to others."""
    passable = 0o711 if os.geteuid() == 0 else 0o700
    for path, mode in (
        (places.data, passable),
        (places.run, passable),
        (f"{places.data}/logs", 0o700),
        (places.private, 0o700),
        (places.table, 0o700),
        (places.fifos, 0o700),
        (places.alive, 0o700),
    ):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.mkdir(path, mode)
            os.chmod(path, mode)  # whatever the umask was
        except FileExistsError:
            found = os.lstat(path)
            if stat.S_ISLNK(found.st_mode):
                raise PermissionError(
                    f"{path} is a symbolic link; give the folder itself, {os.path.realpath(path)}"
                ) from None
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise PermissionError(f"{path} is not a folder of user {os.geteuid()}") from None
            if found.st_mode & 0o022 or (mode == 0o700 and found.st_mode & 0o077 and path.startswith(places.private)):
                raise PermissionError(f"{path} is open to others (mode {found.st_mode & 0o777:o})") from None


def lock(path: str, *, wait: bool = False) -> int:
    """Return a descriptor that holds the one keeper's lock; AlreadyRuns when another has it, or *wait* until none has."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(fd, 20).decode() or "unknown"
        os.close(fd)
        raise AlreadyRuns(f"a keeper runs here already (pid {pid}); it stays") from None
    return fd


def sign(lock_fd: int) -> None:
    """Write our pid into the lock's file, for whoever meets the lock."""
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, str(os.getpid()).encode(), 0)


def detach() -> tuple[bool, int]:
    """Fork into the background; return (True, descriptor to read) to the caller's process, (False, one to write) to the new.

    The new process leads a session of its own, stands in / and has no descriptor of the caller's terminal. It writes a
    byte when it is ready.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(writer)
        os.waitpid(pid, 0)
        return True, reader
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(reader)
    os.chdir("/")
    os.umask(0o022)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return False, writer


class OwnLog:
    """What the keeper says of itself: lines in *path*, rotated, or on stderr when *path* is None."""

    def __init__(self, path: str | None) -> None:
        self._file = LogFile(path, 1 << 20, 2) if path else None
        self._point_stderr()

    def say(self, text: str) -> None:
        """Write *text* with the time; that it cannot be written stops nothing."""
        line = f"{time.time():.3f} {text}\n".encode(errors="replace")
        if self._file is not None:
            before = self._file.fd
            self._file.append(line, 0)
            if self._file.fd != before:
                self._point_stderr()
            return
        try:
            os.write(2, line)
        except OSError:
            return

    def _point_stderr(self) -> None:
        """Let a traceback of the interpreter's own end in the log too."""
        if self._file is None:
            return
        try:
            if self._file.fd < 0:
                self._file.open()
            os.dup2(self._file.fd, 2)
        except OSError:
            return
