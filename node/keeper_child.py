"""One Spawn, from JSON to a running program: what it may say, and the child's way from fork to exec.

The child sets itself up while the keeper writes its record, and executes only when told to: a keeper that dies in
between leaves no program that nobody knows of. What fails is reported with its errno through a socket that closes by
itself when exec succeeds. See Spawn in types.py for each field's meaning.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import resource
import signal
import socket
from fcntl import F_DUPFD_CLOEXEC, fcntl

from slum.node.keeper_fork import enter, fork_into
from slum.node.keeper_proc import PR_SET_NO_NEW_PRIVS, prctl, read_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,99}")
META_BYTES_MAX = 2048
FD_MAX = 1023
GO = b"g"

_SPAWN: dict[str, tuple[Any, Any]] = {
    "name": (str, ...),
    "argv": (list, ...),
    "env": (dict, ...),
    "cwd": (str, "/"),
    "uid": ((int, type(None)), None),
    "gid": ((int, type(None)), None),
    "groups": (list, []),
    "umask": (int, 0o022),
    "nice": (int, 0),
    "oom_score_adj": ((int, type(None)), None),
    "no_new_privs": (bool, True),
    "rlimits": (dict, {}),
    "cgroup_procs": (list, []),
    "listeners": (list, []),
    "listen_env": (bool, True),
    "open_files": (list, []),
    "log": ((dict, type(None)), None),
    "respawn": ((dict, type(None)), None),
    "signalling": (dict, {}),
    "meta": (dict, {}),
}
_OPEN_FILE = {"path": (str, ...), "fd": (int, ...)}
_LOG = {
    "path": (str, ...),
    "mark": (int, 0),
    "bytes_max": (int, 8 << 20),
    "keep": (int, 4),
    "rate_bytes_s": (int, 4 << 20),
    "burst_bytes": (int, 16 << 20),
}
_RESPAWN = {"delay_ms_min": (int, 100), "delay_ms_max": (int, 5_000), "silent_ms_max": (int, 0)}
_SIGNALLING: dict[str, tuple[Any, Any]] = {
    "term_depth": (int, 0),
    "kill_depth": (int, 0),
    "kill_file": ((str, type(None)), None),
    "procs_files": (list, []),
}


def check_spawn(raw: object) -> dict[str, Any]:
    """Return *raw* with every field of Spawn present and of its type; ValueError says which is not. Pure."""
    spawn = _shaped(raw, _SPAWN, "spawn")
    _require(
        NAME.fullmatch(spawn["name"]), f"name {spawn['name']!r} is not made of letters, digits and ._/-, or too long"
    )
    _require(spawn["argv"], "argv is empty")
    for field in ("argv", "cgroup_procs", "listeners"):
        _require(all(isinstance(each, str) for each in spawn[field]), f"{field} holds something that is no text")
    _require(all(isinstance(value, str) for value in spawn["env"].values()), "env holds a value that is no text")
    _require(all(type(each) is int for each in spawn["groups"]), "groups holds something that is no number")
    for name, limit in spawn["rlimits"].items():
        _require(hasattr(resource, f"RLIMIT_{name.upper()}"), f"rlimits.{name}: no such limit on this system")
        pair = isinstance(limit, list) and len(limit) == 2 and all(type(each) is int for each in limit)
        _require(pair, f"rlimits.{name} is not [soft, hard]")
    spawn["open_files"] = [_shaped(each, _OPEN_FILE, "open_files") for each in spawn["open_files"]]
    numbers = [each["fd"] for each in spawn["open_files"]]
    first = 3 + len(spawn["listeners"])
    free = len(set(numbers)) == len(numbers) and all(first <= number <= FD_MAX for number in numbers)
    _require(free, f"open_files: each fd must be another number from {first} (after the listeners) to {FD_MAX}")
    if spawn["log"] is not None:
        spawn["log"] = _shaped(spawn["log"], _LOG, "log")
        path = os.fsencode(spawn["log"]["path"])
        _require(path.startswith(b"/") and b"\0" not in path, "log.path is not an absolute path")
        _require(min(each for each in spawn["log"].values() if isinstance(each, int)) >= 0, "log: a negative number")
        _require(spawn["log"]["keep"] <= 100, "log.keep is over 100")
    if spawn["respawn"] is not None:
        spawn["respawn"] = _shaped(spawn["respawn"], _RESPAWN, "respawn")
        _require(
            min(spawn["respawn"][delay] for delay in ("delay_ms_min", "delay_ms_max")) >= 1,
            "respawn: a delay under 1 ms",
        )
        _require(spawn["respawn"]["silent_ms_max"] >= 0, "respawn.silent_ms_max is negative")
    spawn["signalling"] = _shaped(spawn["signalling"], _SIGNALLING, "signalling")
    _require(len(json.dumps(spawn["meta"])) <= META_BYTES_MAX, f"meta is over {META_BYTES_MAX} bytes of JSON")
    return spawn


def _shaped(raw: object, shape: dict[str, tuple[Any, Any]], what: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"{what} is not an object")
    unknown = raw.keys() - shape.keys()
    _require(not unknown, f"{what}: unknown field {', '.join(sorted(unknown))}")
    shaped = {}
    for field, (kind, default) in shape.items():
        value = raw.get(field, default)
        _require(value is not ..., f"{what}.{field} is missing")
        right = isinstance(value, kind) and (kind is bool or type(value) is not bool)
        _require(right, f"{what}.{field} is of the wrong type")
        shaped[field] = value
    return shaped


def _require(condition: object, why: str) -> None:
    if not condition:
        raise ValueError(why)


class Heritage:
    """What a child would inherit from the keeper and must not: looked up once, for asking takes a child a millisecond.

    Making one also lets the keeper itself open all the files that it may; *nofile* is what children start with, and is
    looked up unless a former keeper handed it on.
    """

    __slots__ = ("ignored", "nofile", "oom_protected")

    def __init__(self, nofile: Sequence[int] | None = None) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.nofile = (nofile[0], nofile[1]) if nofile else (soft, hard)
        self.ignored = [each for each in signal.valid_signals() if signal.getsignal(each) is signal.SIG_IGN]
        self.oom_protected = int(read_bytes("/proc/self/oom_score_adj")) < 0


def launch(
    spawn: dict[str, Any],
    *,
    listeners: Sequence[int],
    stdio: Sequence[int],
    fifo: str | None,
    heritage: Heritage,
) -> tuple[int, socket.socket]:
    """Fork a child that becomes *spawn*; return its pid and our end of the socket it reports on.

    Send GO to let it execute. The socket then closes, or first gives ``{"errno", "error"}``. *listeners* are descriptors
    for 3 and on, *stdio* three for 0, 1, 2 or empty, *fifo* the path of its log. OSError when it cannot fork.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        pid, groups = fork_into(spawn["cgroup_procs"])
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        _become(spawn, theirs.fileno(), groups, listeners, stdio, fifo, heritage)
    theirs.close()
    ours.setblocking(False)
    return pid, ours


def _become(
    spawn: dict[str, Any],
    report: int,
    groups: Sequence[str],
    listeners: Sequence[int],
    stdio: Sequence[int],
    fifo: str | None,
    heritage: Heritage,
) -> NoReturn:
    """Turn this forked child into the program, or report why not; never returns into the keeper's loop."""
    step = "fork"
    try:
        gc.disable()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _close_but({report, *listeners, *stdio})
        os.setsid()
        step = "cgroup"
        for path in groups:
            enter(path)
        step = "oom_score_adj"
        if spawn["oom_score_adj"] is not None or heritage.oom_protected:
            _write("/proc/self/oom_score_adj", str(spawn["oom_score_adj"] or 0).encode())
        step = "nice"
        renice(spawn["nice"])
        step = "descriptors"
        wanted = _descriptors(spawn, listeners, stdio, fifo)
        report = _arrange(wanted, report)
        step = "rlimits"
        # After the descriptors: the keeper's own numbers may lie above the child's limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, heritage.nofile)
        for name, pair in spawn["rlimits"].items():
            step = f"rlimits.{name}"
            _limit(getattr(resource, f"RLIMIT_{name.upper()}"), pair)
        os.umask(spawn["umask"])
        step = "uid and gid"
        _drop_to(spawn["uid"], spawn["gid"], spawn["groups"])
        # As the user: a service may have put a link there, to a folder behind one that only root may pass.
        step = f"cwd {spawn['cwd']}"
        os.chdir(spawn["cwd"])
        if spawn["no_new_privs"]:
            step = "no_new_privs"
            prctl(PR_SET_NO_NEW_PRIVS, 1)
        env = dict(spawn["env"])
        if listeners and spawn["listen_env"]:
            env["LISTEN_PID"] = str(os.getpid())
            env["LISTEN_FDS"] = str(len(listeners))
            env["LISTEN_FDNAMES"] = ":".join(spawn["listeners"])
        step = f"exec {spawn['argv'][0]}"
        if os.read(report, 1) == GO:
            for signum in heritage.ignored:
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            _execute(spawn["argv"], env)
    except BaseException as error:  # noqa: BLE001 - whatever it is, a forked child must report and leave
        _tell(report, step, error)
    finally:
        os._exit(127)


def renice(wanted: int) -> None:
    """Take the niceness *wanted*. Who may not raise its own priority stays as nice as the keeper was started."""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, wanted)
    except PermissionError:
        if os.getpriority(os.PRIO_PROCESS, 0) < wanted:
            raise


def _tell(report: int, step: str, error: BaseException) -> None:
    number = error.errno if isinstance(error, OSError) else None
    why = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    os.write(report, json.dumps({"errno": number, "error": f"{step}: {why}"[:1000]}).encode())


def _close_but(keep: set[int]) -> None:
    low = 0
    for fd in sorted(keep):
        if low < fd:  # closerange(0, 0) closes all: CPython hands close_range(2) the last number as 0 - 1
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def _limit(which: int, pair: Sequence[int]) -> None:
    try:
        resource.setrlimit(which, (pair[0], pair[1]))
    except ValueError as error:  # how Python says EPERM and EINVAL here
        raise PermissionError(errno.EPERM, str(error)) from None


def _descriptors(
    spawn: dict[str, Any], listeners: Sequence[int], stdio: Sequence[int], fifo: str | None
) -> dict[int, int]:
    """Open what the child gets and return {its number there: descriptor now}."""
    if stdio:
        wanted = dict(enumerate(stdio))
    else:
        out = os.open(fifo or "/dev/null", os.O_RDWR)
        wanted = {0: os.open("/dev/null", os.O_RDWR), 1: out, 2: out}
    wanted.update(enumerate(listeners, 3))
    for each in spawn["open_files"]:
        wanted[each["fd"]] = os.open(each["path"], os.O_RDONLY)
    return wanted


def _arrange(wanted: dict[int, int], report: int) -> int:
    """Give each descriptor its number, close all others, and return where *report* went."""
    above = max(wanted) + 1
    moved = {target: fcntl(source, F_DUPFD_CLOEXEC, above) for target, source in wanted.items()}
    report = fcntl(report, F_DUPFD_CLOEXEC, above)
    for target, source in moved.items():
        os.dup2(source, target)
    _close_but({*wanted, report})
    return report


def _drop_to(uid: int | None, gid: int | None, groups: Sequence[int]) -> None:
    if uid is not None or gid is not None or groups:
        os.setgroups(groups)
    if gid is not None:
        os.setresgid(gid, gid, gid)
    if uid is not None:
        os.setresuid(uid, uid, uid)


def _execute(argv: list[str], env: dict[str, str]) -> NoReturn:
    """Execute *argv*, looked up in the PATH of *env* when it names no folder; OSError as the kernel gave it."""
    if "/" in argv[0]:
        os.execve(argv[0], argv, env)
    denied: OSError | None = None
    for folder in env.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":"):
        try:
            os.execve(f"{folder or '.'}/{argv[0]}", argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            denied = error
    raise denied or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
