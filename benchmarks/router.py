"""Requests a second through slum's router, against Caddy alone with one hand-written route to the same service.

Both pass requests to one answering process (a third Caddy, static answers) on a unix socket, with upstream keep-alive
off. slum's router is as slum runs it: routes as links, request ids, its sampled access log, its environment (TUNING); Caddy
alone is as it comes, without a log. They take turns of a second, in changing order, and the ratio is the median of the
turns' ratios: what else the machine does falls on both. The claim is at least 0.95. The hand-written route with upstream
keep-alive on stands beside it: what a drain that works costs. Needs `wrk` (apt install wrk). Takes about 50 s.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from slum.node.caddyconfig import RouterFacts, caddy_config
from slum.node.router import TUNING, find_caddy

ROUNDS = 20
KEEP_ALIVE_ROUNDS = 4
SECONDS = 1
CLAIM = 0.95
PEER, OURS, KEEP_ALIVE = "hand-written route", "slum's router", "hand-written, keep-alive on"
HOST = "web.localhost"
NO_ENV: Mapping[str, str] = {}


def main() -> int:
    wrk = shutil.which("wrk")
    if wrk is None:
        print("wrk is missing: apt install wrk", file=sys.stderr)
        return 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slum-bench-")))
        backend = folder / "web.sock"
        stack.enter_context(caddy(folder, "backend", answering(backend)))
        urls = {
            PEER: stack.enter_context(peer(folder, "off", backend, keep_alive=False)),
            OURS: stack.enter_context(router(folder, backend)),
            KEEP_ALIVE: stack.enter_context(peer(folder, "on", backend, keep_alive=True)),
        }
        rates: dict[str, list[float]] = {name: [] for name in urls}
        for name, url in urls.items():
            until_answered(url)
            load(wrk, url, 1)
            print(f"warmed up {name}", file=sys.stderr)
        for number in range(ROUNDS):
            names = list(urls) if number % 2 else list(reversed(urls))
            for name in names:
                if number < KEEP_ALIVE_ROUNDS or name != KEEP_ALIVE:
                    rates[name].append(load(wrk, urls[name], SECONDS))
    for name, figures in rates.items():
        print(f"{name:30} {statistics.median(figures):9,.0f} requests/s, median of {len(figures)}")
    ratio = statistics.median(ours / peers for ours, peers in zip(rates[OURS], rates[PEER], strict=True))
    print(f"ratio {ratio:.3f} (claim: at least {CLAIM})")
    return 0 if ratio >= CLAIM else 1


def until_answered(url: str) -> None:
    request = urllib.request.Request(url, headers={"Host": HOST})
    deadline = time.monotonic() + 10
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                answer.read()
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def load(wrk: str, url: str, seconds: int) -> float:
    """Return the requests/s of one run; any answer but 2xx, and any socket error, ends the benchmark."""
    command = [wrk, "-t1", "-c32", f"-d{seconds}s", "-H", f"Host: {HOST}", url]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds + 30).stdout
    rate = re.search(r"Requests/sec:\s*([\d.]+)", said)
    if rate is None or "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"the load failed:\n{said}")
    return float(rate[1])


@contextmanager
def router(folder: Path, backend: Path) -> Iterator[str]:
    """Run the router as slum does: inherited listeners, routes as symlinks, its access log on tmpfs where there is one."""
    routes = folder / "r"
    routes.mkdir()
    (routes / "web.sock").symlink_to(backend)
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else folder
    with (
        tempfile.TemporaryDirectory(prefix="slum-bench-", dir=memory) as log,
        socket.create_server(("127.0.0.1", 0), backlog=4096) as listener,
        socket.socket(socket.AF_UNIX) as ports,
    ):
        ports.bind(str(folder / "ports.sock"))
        ports.listen(16)
        facts = RouterFacts(
            domain="localhost",
            routes=routes,
            access_log=Path(log) / "access.log",
            ports=ports.fileno(),
            plain=(listener.fileno(),),
        )
        with caddy(folder, "router", caddy_config(facts), (listener.fileno(), ports.fileno()), TUNING):
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"


@contextmanager
def peer(folder: Path, name: str, backend: Path, *, keep_alive: bool) -> Iterator[str]:
    """Run Caddy alone: one host, one upstream, nothing else said but whether connections to it are kept."""
    transport: dict[str, Any] = {"protocol": "http"}
    if not keep_alive:
        transport["keep_alive"] = {"enabled": False}
    proxy = {"handler": "reverse_proxy", "transport": transport, "upstreams": [{"dial": f"unix/{backend}"}]}
    port = free_port()
    server = {
        "listen": [f"127.0.0.1:{port}"],
        "automatic_https": {"disable": True},
        "routes": [{"match": [{"host": [HOST]}], "handle": [proxy]}],
    }
    with caddy(folder, name, served(server)):
        yield f"http://127.0.0.1:{port}/"


def answering(path: Path) -> dict[str, Any]:
    answer = {"handler": "static_response", "status_code": 200, "body": "x" * 100}
    return served({"listen": [f"unix/{path}|0666"], "routes": [{"handle": [answer]}]})


def served(server: dict[str, Any]) -> dict[str, Any]:
    logs = {"default": {"level": "ERROR"}}
    return {"admin": {"disabled": True}, "logging": {"logs": logs}, "apps": {"http": {"servers": {"one": server}}}}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def caddy(
    folder: Path, name: str, config: dict[str, Any], descriptors: tuple[int, ...] = (), env: Mapping[str, str] = NO_ENV
) -> Iterator[None]:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))
    own = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), **env}
    with (folder / f"{name}.log").open("wb") as log:
        command = [str(find_caddy()), "run", "--config", str(file)]
        process = subprocess.Popen(command, env=own, pass_fds=descriptors, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


if __name__ == "__main__":
    sys.exit(main())
