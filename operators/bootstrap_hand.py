"""The far end of a bootstrap, as far as it changes the host: what bootstrap_look.py, which runs there, is given then.

Every verb leaves the host as it was or as it shall be, whenever it is killed: files and whole folders are renamed into
place once complete. What changes something is done under one lock a host, with the fencing token of whoever asks checked
there. Standard library only. Must never print or keep a request, which may hold a join token.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from slum.operators.bootstrap_look import (
    BOOT,
    DATA,
    FOLDERS,
    IDENTITY,
    IDLE_S,
    KEEPER,
    OPT,
    RECORD,
    UNIT,
    WHEELS,
    Refused,
    agent_python,
    answers_at,
    digest_of,
    read,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from slum.operators.bootstrap_look import Fields

_OPT, _WHEELS, _DATA, _UNIT = Path(OPT), Path(WHEELS), Path(DATA), Path(UNIT)
GONE = Path("/var/lib/slum-gone")
LOCK = "/run/slum-bootstrap.lock"
CHUNK_BYTES = 1 << 16
"""Of an upload; each one taken is told by an empty line (ssh_hand.py)."""
OUTPUT_MAX = 64 << 10
DEAD_MAX = 100
ENVIRONMENT = {
    "PATH": ":".join(FOLDERS),
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
PR_SET_PDEATHSIG = 1


def take(_requests: BinaryIO, cluster: str, fence: list[int], wait_s: float) -> Fields:
    """Take the host's lock for as long as this process lives, unless somebody with a newer token was here.

    A holder of the same cluster with a token no newer than *fence* is ended: it is a leader that was, or a call that
    was given up. An empty *fence* (a person) waits.
    """
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = _holder(lock)
            if fence and holder.get("cluster") == cluster and holder.get("fence", []) <= fence:
                _end(holder)
            elif time.monotonic() > end:
                raise Refused("busy", "another bootstrap is at work on this host") from None
            time.sleep(0.05)
    record = read(RECORD)
    if fence and record.get("cluster") == cluster and record.get("fence", []) > fence:
        raise Refused("fenced", "a newer leader of the control plane was here")
    me = {"pid": os.getpid(), "start": _start_time(os.getpid()), "cluster": cluster, "fence": fence}
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(me).encode(), 0)
    if fence and (record.get("cluster") != cluster or record.get("fence") != fence):
        if record.get("claim") and record.get("cluster") != cluster:
            raise Refused("taken", f"it holds {record['claim'].get('machine')!r} of another control plane")
        _write(RECORD, {**record, "cluster": cluster, "fence": fence})
    _tidy()
    return {}


def claim(_requests: BinaryIO, name: str, cluster: str, key: str, machine: str, tenement: str) -> Fields:
    """Make this the host of *key*; Refused when it is another's, or when *key* was destroyed here before."""
    record, identity = read(RECORD), read(IDENTITY)
    held = record.get("claim") or {}
    if name in record.get("dead", ()):
        raise Refused("dead", f"{key} was destroyed here and comes back as a later incarnation only")
    if held and held.get("name") != name:
        raise Refused("taken", f"it holds {held.get('machine')!r} of the fleet already")
    if not held and identity and (identity.get("cluster"), identity.get("key")) != (cluster, key):
        raise Refused("taken", f"slum runs here as {identity.get('tenement')!r} already")
    wanted = {"name": name, "key": key, "machine": machine, "tenement": tenement}
    if held != wanted:
        _write(RECORD, {**record, "cluster": cluster, "claim": wanted})
    return {}


def put(requests: BinaryIO, path: str, size: int, sha256: str, mode: int) -> Fields:
    """Write the *size* bytes that follow to *path*: whole, with that digest, or not at all.

    A power cut may leave less of it: it is not synced, but read once more before it is used.
    """
    target, digest, left = Path(path), hashlib.sha256(), size
    temporary = target.with_name(f".slum-new-{os.urandom(6).hex()}")
    trouble: OSError | None = None
    try:
        target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        file: BinaryIO = open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    except OSError as error:
        trouble, file = error, open(os.devnull, "wb")  # noqa: SIM115 - what was announced is read in any case
    with file:
        while left:
            signal.alarm(IDLE_S)
            data = requests.read(min(left, CHUNK_BYTES))
            if not data:
                temporary.unlink(missing_ok=True)
                sys.exit(0)
            left -= len(data)
            digest.update(data)
            try:
                if trouble is None:
                    file.write(data)
            except OSError as error:
                trouble = error
            sys.stdout.buffer.write(b"\n")
            sys.stdout.buffer.flush()
        try:
            if trouble is None:
                file.flush()
                os.fchmod(file.fileno(), mode)
        except OSError as error:
            trouble = error
    if trouble is not None or digest.hexdigest() != sha256:
        temporary.unlink(missing_ok=True)
        if trouble is not None:
            raise OSError(trouble.errno, trouble.strerror, path)
        raise Refused("damaged", f"{path} arrived with another digest than it was sent with")
    os.rename(temporary, target)
    return {}


def install(_requests: BinaryIO, name: str, wheels: dict[str, str]) -> Fields:
    """Make OPT/name a virtual environment of *wheels* (digest by file name); it is there complete or not at all."""
    target, new = _OPT / name, _OPT / f".slum-new-{os.urandom(6).hex()}"
    if target.exists():
        return {"output": ""}
    files = [_WHEELS / digest / file for file, digest in wheels.items()]
    damaged = [file for file in files if digest_of(str(file)) != file.parent.name]
    for file in damaged:
        file.unlink()
    if damaged:
        raise Refused(
            "damaged", f"{' and '.join(file.name for file in damaged)} were damaged and are removed; do it again"
        )
    uv = _unpacked_uv(next(file for file in files if file.name.startswith("uv-")), new)
    common = ["--offline", "--no-cache", "--no-config", "--quiet"]
    python = getattr(sys, "_base_executable", sys.executable)
    output = _told([uv, "venv", *common, "--relocatable", "--no-project", "--python", python, str(new / "venv")], 120)
    paths = [str(file) for file in files]
    into = ["--python", str(new / "venv/bin/python")]
    output += _told(
        [uv, "pip", "install", *common, *into, "--no-index", "--no-deps", "--link-mode", "copy", *paths], 300
    )
    _told([str(new / "venv/bin/python"), "-I", "-c", "import slum.node.agent, slum.cli.main"], 60)
    _synced(new)
    os.rename(new / "venv", target)
    _remove(new)
    _prune(name, set(wheels.values()))
    return {"output": output}


def run(_requests: BinaryIO, argv: list[str], stdin: str, timeout_s: float) -> Fields:
    """Run *argv* with *stdin* and return its exit status and the end of what it wrote."""
    status, output = _ran(argv, timeout_s, stdin)
    return {"status": status, "output": output}


def leave(_requests: BinaryIO, name: str, cluster: str) -> Fields:
    """Stop the agent and the services of machine *name* and forget it; another's are not touched. Its data is kept aside."""
    record, identity = read(RECORD), read(IDENTITY)
    held = record.get("claim") or {}
    if held.get("name") != name:
        if name not in record.get("dead", ()) and record.get("cluster", cluster) == cluster:
            _write(RECORD, {**record, "dead": [*record.get("dead", ()), name][-DEAD_MAX:]})
        return {"left": False}
    systemd = os.path.isdir("/run/systemd/system") and _UNIT.exists()
    python = agent_python() or record.get("python", "")
    if python:
        record["python"] = python
        _write(RECORD, record)
    Path(BOOT).unlink(missing_ok=True)
    if systemd:
        _told(["systemctl", "disable", "--quiet", _UNIT.name], 30)
    if python and os.path.exists(python):
        _told([python, "-P", "-m", "slum.cli.main", "down", "--services"], 100)
    elif answers_at(KEEPER):
        raise Refused("os", "a keeper runs here and no slum is there to stop it with")
    if systemd:
        _told(["systemctl", "stop", _UNIT.name], 30)
        _UNIT.unlink(missing_ok=True)
        _told(["systemctl", "daemon-reload"], 30)
    aside = GONE / name
    if identity or (_DATA / "services").exists():
        aside.mkdir(mode=0o700, parents=True, exist_ok=True)
    for part in ("services", "logs"):
        if (_DATA / part).exists() and not (aside / part).exists():
            os.rename(_DATA / part, aside / part)
    Path(IDENTITY).unlink(missing_ok=True)
    for part in ("agent", "bundles"):
        _remove(_DATA / part)
    dead = [*(one for one in record.get("dead", ()) if one != name), name][-DEAD_MAX:]
    _write(RECORD, {**record, "claim": None, "dead": dead, "python": ""})
    return {"left": True}


def switch(_requests: BinaryIO, name: str) -> Fields:
    """Let OPT/name run this machine's keeper and agent instead of what does; services are adopted as they are."""
    python = str(_OPT / name / "bin/python")
    if not read(IDENTITY) or (agent_python() == python and answers_at(KEEPER)):
        return {"switched": False}
    slum = [python, "-P", "-m", "slum.cli.main"]
    if os.path.isdir("/run/systemd/system") and _UNIT.exists():
        _told(["systemctl", "stop", _UNIT.name], 120)
    elif answers_at(KEEPER):
        _told([*slum, "down"], 60)
        _stop(_keeper_pid())
    _told([*slum, "up"], 90)
    return {"switched": True}


VERBS: dict[str, Callable[..., Fields]] = {
    "take": take,
    "claim": claim,
    "put": put,
    "install": install,
    "run": run,
    "leave": leave,
    "switch": switch,
}


def _tidy() -> None:
    """Remove what a killed predecessor left half done."""
    for folder in (_OPT, *_children(_WHEELS)):
        for path in _children(folder, hidden=True):
            if path.name.startswith(".slum-new-"):
                _remove(path)


def _prune(name: str, wheels: set[str]) -> None:
    """Remove what is installed beside *name* and run by nobody, and wheels that are not among *wheels* (digests)."""
    used = {agent_python()}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            used.add(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace"))
        except OSError:
            continue  # it has ended
    old = [one for one in _children(_OPT) if one not in (_OPT / name, _WHEELS)]
    unused = [one for one in old if not any(program.startswith(f"{one}/") for program in used)]
    for path in (*unused, *(one for one in _children(_WHEELS) if one.name not in wheels)):
        gone = _OPT / f".slum-new-{os.urandom(6).hex()}"  # never there in part under its own name
        os.rename(path, gone)
        _remove(gone)


def _synced(folder: Path) -> None:
    """Return when all of *folder*'s file system is on disk."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(fd)


def _unpacked_uv(wheel: Path, folder: Path) -> str:
    import shutil
    import zipfile

    folder.mkdir(mode=0o755, parents=True)
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        with archive.open(member) as source, open(folder / "uv", "xb") as target:
            shutil.copyfileobj(source, target)
    (folder / "uv").chmod(0o755)
    return str(folder / "uv")


def _told(argv: list[str], timeout_s: float) -> str:
    """Run *argv* and return what it wrote; Refused with its last words when it fails."""
    status, output = _ran(argv, timeout_s)
    if status != 0:
        words = output.strip().splitlines()[-3:]
        code = "disk_full" if "No space left" in output or "os error 28" in output else "failed"
        raise Refused(code, f"`{Path(argv[0]).name} {argv[1]}` ended with {status}: {' / '.join(words)}")
    return output


def _ran(argv: list[str], timeout_s: float, stdin: str = "") -> tuple[int, str]:
    """Run *argv*, ended with us unless it is apt, and with all that it started when the time is over."""
    import ctypes
    import subprocess

    libc = ctypes.CDLL(None)
    kept = os.path.basename(argv[0]) == "apt-get"  # half-configured packages are worse than a second round
    parent = os.getpid()

    def die_with_us() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    # In memory, not pipes: what goes on in the background holds a pipe open.
    given, written = os.memfd_create("stdin"), os.memfd_create("output")
    try:
        os.pwrite(given, stdin.encode(), 0)
        process = subprocess.Popen(
            argv,
            stdin=given,
            stdout=written,
            stderr=written,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,
            preexec_fn=None if kept else die_with_us,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Refused("timeout", f"`{Path(argv[0]).name}` did not end within {timeout_s:g} s") from None
        size = os.fstat(written).st_size
        output = os.pread(written, OUTPUT_MAX, max(0, size - OUTPUT_MAX))
    finally:
        os.close(given)
        os.close(written)
    return status, output.decode(errors="replace")


def _holder(lock: int) -> Fields:
    try:
        found: Fields = json.loads(os.pread(lock, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return found


def _end(holder: Fields) -> None:
    """Kill the process of the lock's holder, if it is still that process."""
    pid = holder.get("pid", 0)
    if pid and _start_time(pid) == holder.get("start"):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _start_time(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _keeper_pid() -> int:
    import socket
    import struct

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(KEEPER)
        return int(struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


def _stop(pid: int) -> None:
    """End the keeper *pid*, whose children live on, and return when it is gone."""
    start = _start_time(pid)
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 20
    while _start_time(pid) == start:
        if time.monotonic() > end:
            raise Refused("os", f"the keeper (pid {pid}) does not end")
        time.sleep(0.05)


def _write(name: str, fields: Fields) -> None:
    path = Path(name)
    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        with open(temporary, "x", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _children(folder: Path, *, hidden: bool = False) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if hidden or not path.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: Path) -> None:
    """Make *path*, a file or a folder with all in it, be gone."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
