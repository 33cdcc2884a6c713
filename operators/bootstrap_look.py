"""The far end of a bootstrap, as far as it looks: run by the host's own Python (3.11+, as root) at the end of an SSH channel.

It reads requests from stdin, a JSON line each, some followed by bytes, and answers each with a JSON line. What is said
here changes nothing on the host. What does is bootstrap_hand.py, whose text comes by the request "more" when something is
to be done: on most visits nothing is, so this file is short, and imports what is large only when it is needed. Standard
library only. Must never print or keep a request, which may hold a join token.
"""

from __future__ import annotations

import json
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, BinaryIO

    Fields = dict[str, Any]

OPT = "/opt/slum"
WHEELS = f"{OPT}/wheels"
DATA = "/var/lib/slum"
RECORD = f"{DATA}/host.json"
IDENTITY = f"{DATA}/agent/identity.json"
BOOT = f"{DATA}/boot.json"
KEEPER = "/run/slum/p/keeper.sock"
UNIT = "/etc/systemd/system/slum.service"
PROGRAMS = {"bwrap": "bubblewrap", "nft": "nftables"}
IDLE_S = 60
"""Whoever asks is gone when nothing comes for so long, even if the network does not say so."""
FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")


class Refused(Exception):
    """Not done: a code for programs, words for people."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Serve until the other side says nothing more."""
    sys.modules["slum.operators.bootstrap_look"] = sys.modules["__main__"]  # where the other half finds this one
    while True:
        signal.alarm(IDLE_S)
        line = requests.readline()
        if not line.endswith(b"\n"):
            return
        request = json.loads(line)
        try:
            if request["do"] != "put":
                signal.alarm(0)
            answer = VERBS[request.pop("do")](requests, **request)
        except Refused as error:
            answer = {"code": error.code, "error": str(error)}
        except OSError as error:
            answer = {"code": _code(error), "error": f"{error.filename or 'the host'}: {error.strerror or error}"}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _code(error: OSError) -> str:
    return {28: "disk_full", 122: "disk_full", 30: "read_only"}.get(error.errno or 0, "os")


def more(requests: BinaryIO, size: int) -> Fields:
    """Take in the text of *size* bytes that follows, which has the other verbs."""
    scope: dict[str, Any] = {"__name__": "bootstrap_hand"}
    exec(compile(requests.read(size), "<hand>", "exec"), scope)  # noqa: S102 - as this text came itself
    VERBS.update(scope["VERBS"])
    return {}


def facts(_requests: BinaryIO) -> Fields:
    """Tell what this host is and has. Changes nothing, needs no lock."""
    record, identity = read(RECORD), read(IDENTITY)
    return {
        "distribution": _distribution(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "arch": os.uname().machine,
        "libc": _libc(),
        "systemd": os.path.isdir("/run/systemd/system"),
        "free_mb": min(_free_mb(OPT), _free_mb(DATA)),
        "read_only": [path for path in (OPT, DATA) if not os.access(_existing(path), os.W_OK)],
        "missing": [package for program, package in PROGRAMS.items() if not _which(program)],
        "apt": _which("apt-get"),
        "installed": [name for name in names(OPT) if os.path.exists(f"{OPT}/{name}/bin/slum")],
        "wheels": [name for name in names(WHEELS) if names(f"{WHEELS}/{name}")],
        "cluster": record.get("cluster", ""),
        "claim": record.get("claim") or {},
        "identity": identity,
        "runs": _runs(identity),
        "unit": _text(UNIT),
        "agent_python": agent_python(),
    }


def have(_requests: BinaryIO, paths: list[str]) -> Fields:
    """Tell the digests of the files that are there, "" for the others."""
    return {"digests": {path: digest_of(path) if os.path.isfile(path) else "" for path in paths}}


VERBS: dict[str, Callable[..., Fields]] = {"facts": facts, "have": have, "more": more}


def answers_at(path: str) -> bool:
    """Tell whether somebody listens at the socket *path*."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(2)
        try:
            link.connect(path)
        except OSError:
            return False
    return True


def agent_python() -> str:
    """Return the Python that the keeper starts the agent with, "" when there is none."""
    children = read(BOOT).get("children", [])
    return next((str(child["argv"][0]) for child in children if child.get("name") == "agent"), "")


def read(path: str) -> Fields:
    """Return the JSON object in *path*; an empty one when there is no such file."""
    try:
        with open(path, "rb") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Refused("damaged", f"{path} cannot be read: {error}; remove it") from error
    return found if isinstance(found, dict) else {}


def digest_of(path: str) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def names(folder: str) -> list[str]:
    """Return what is in *folder*, sorted; nothing when it is not there."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _runs(identity: Fields) -> bool:
    """Tell whether the machine of *identity* has joined completely and its keeper answers."""
    has_joined = bool(identity) and os.path.exists(BOOT) and os.path.exists(f"{DATA}/agent/home.json")
    return has_joined and answers_at(KEEPER)


def _existing(path: str) -> str:
    """Return *path*, or the nearest folder above it that is there."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _free_mb(path: str) -> int:
    found = os.statvfs(_existing(path))
    return found.f_bavail * found.f_frsize >> 20


def _which(program: str) -> bool:
    return any(os.access(f"{folder}/{program}", os.X_OK) for folder in FOLDERS)


def _text(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _distribution() -> str:
    """Return what os-release(5) calls this system."""
    try:
        lines = _text("/etc/os-release").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition("=")[2].strip("\"'") for line in lines if line.startswith("PRETTY_NAME=")), "unknown")


def _libc() -> str:
    """Return "glibc 2.36", or "musl 1.2" for what is no glibc."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "musl 1.2"
    except ValueError:
        return "musl 1.2"


if __name__ == "__main__":
    os.umask(0o022)
    main(sys.stdin.buffer, sys.stdout.buffer)
