"""A whole slum in two throw-away folders, driven only through its command line; it leaves no process behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Site:
    """One machine's slum. *port* is where its router listens."""

    def __init__(self, folder: Path) -> None:
        token = secrets.token_hex(4)
        self.data = Path(f"/tmp/slum-d-{token}")
        self.run = Path(f"/tmp/s{token}")
        self.folder = folder
        self.port = free_port()
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLUM_", "COV_", "PYTEST_"))},
            "SLUM_DATA_DIR": str(self.data),
            "SLUM_RUN_DIR": str(self.run),
            "NO_COLOR": "1",
        }

    def slum(self, *args: str, timeout: float = 60, check: bool = True, **kwargs: Any) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "slum.cli.main", *args],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            **kwargs,
        )
        ran = Ran(done.returncode, done.stdout, done.stderr)
        if check:
            assert ran.code == 0, f"slum {' '.join(args)}: {ran}"
        return ran

    def popen(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "slum.cli.main", *args],
            env=self.env,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fleet(self, services: str, *, name: str = "test", settings: str = "", extra: str = "") -> Path:
        """Write a slum.toml with one local tenement; *services* are tables ``[S.name]`` with S for the long prefix."""
        text = f'''
[fleet]
name = "{name}"

[operators.local]
type = "local"

[tenement.here]
operator = "local"

[tenement.here.routing]
listen = ["127.0.0.1:{self.port}"]

[tenement.here.settings]
{settings}

{services.replace("[S.", "[tenement.here.service.")}
{extra}
'''
        path = self.folder / "slum.toml"
        path.write_text(text)
        return path

    def apply(
        self, services: str, *, check: bool = True, timeout: float = 90, settings: str = "", args: tuple[str, ...] = ()
    ) -> Ran:
        self.fleet(services, settings=settings)
        return self.slum("apply", "--yes", *args, check=check, timeout=timeout)

    def get(self, service: str, path: str = "/", *, timeout: float = 5.0) -> tuple[int, str]:
        """Ask the router; connection errors are raised."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("GET", path, headers={"Host": f"{service}.localhost"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        finally:
            connection.close()

    def ps(self) -> dict[str, dict[str, Any]]:
        """Reports by "service/id"."""
        rows = self.slum("ps", "--json").json
        return {f"{row['report']['service']}/{row['report']['id']}": row for row in rows}

    def children(self) -> dict[str, dict[str, Any]]:
        """The keeper's table, read from its files, by child name; the keeper may be dead."""
        table = {}
        for file in (self.run / "p" / "k").glob("c.*"):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                row = json.loads(file.read_text())
                table[row["spawn"]["name"]] = row
        return table

    def pid(self, name: str) -> int:
        return int(self.children()[name]["pid"])

    def keeper_pid(self) -> int:
        for pid in pids():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"slum.node.keeper" in words and str(self.run).encode() in words:
                    return pid
        raise LookupError("no keeper")

    def processes(self) -> list[tuple[int, str]]:
        """All live processes that belong to this site: ours by command line, services by their environment."""
        found = []
        needle = str(self.run).encode()
        for pid in pids():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                if command and (needle in command or (needle in environ and pid != os.getpid())):
                    found.append((pid, command.replace(b"\0", b" ").decode(errors="replace")[:120]))
        return found

    def close(self) -> None:
        """End everything of this site, the polite way first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.slum("down", "--services", timeout=30, check=False)
        until(lambda: not self.processes(), 5, fail=False)
        for _ in range(50):
            rest = self.processes()
            if not rest:
                break
            for pid, _command in rest:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.rmtree(self.data, ignore_errors=True)


def pids() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], seconds: float, what: str = "", *, fail: bool = True) -> Any:
    """Return the first true value of *condition*, asked until *seconds* have passed."""
    deadline = time.monotonic() + seconds
    last: BaseException | None = None
    while True:
        try:
            value = condition()
            last = None
        except (OSError, LookupError, AssertionError, http.client.HTTPException) as error:
            value, last = None, error
        if value:
            return value
        if time.monotonic() > deadline:
            if fail:
                raise AssertionError(f"not within {seconds} s: {what or condition} (last: {last!r})")
            return value
        time.sleep(0.02)
