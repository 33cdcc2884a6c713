"""The server process: ``python -m slum.server.process --data-dir D --run-dir R``, kept alive by the keeper.

It serves the API on the run folder's unix socket, talks to the agents, proposes to the ledger and, where its member
leads, reconciles. It holds nothing that must survive it and never writes state.db: kill it at any moment.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from slum import log, wire
from slum.ledger.client import connect
from slum.ledger.reader import Reader
from slum.paths import Home, checked_home
from slum.server.app import make_app
from slum.server.blobs import collect_for_ever
from slum.server.control import Control
from slum.server.dial import dialler
from slum.server.link import Link
from slum.server.peer import PeerProtocol, ShortGoodbye
from slum.server.reconcile import Reconciler
from slum.server.view import View

BACKLOG = 1024
GRACE_S = 2
KEEP_ALIVE_S = 75


class Failed(Exception):
    """A task that the server cannot be without ended."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slum.server.process", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    given = parser.parse_args(argv)
    home = checked_home(given.data_dir, given.run_dir)
    log.start("server")
    server = make_server(home)
    with listener(home.api_socket) as socket_:
        log.get().info("server_started", pid=os.getpid(), socket=str(home.api_socket))
        server.run(sockets=[socket_])
    return 1 if server.failed else 0


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self.failed = False
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the event streams end first: they would never by themselves."""
        self._stopping.set()
        await super().shutdown(sockets)

    def fail(self) -> None:
        """Stop serving, and make the process's exit status say that it was not on purpose."""
        self.failed = True
        self.should_exit = True


def make_server(home: Home) -> Server:
    """Return the server of *home*, not yet running."""
    stopping = asyncio.Event()
    control = Control(
        home, Link(lambda: connect(home.ledger_socket)), View(Reader(home.state / "state.db")), dialler(home)
    )
    tasks = {
        "ledger link": control.link.run(),
        "ledger watch": control.watch(),
        "notes": control.notes.run(control.link, control.view.seq),
        "blobs": collect_for_ever(control.blobs, control.view.reader.blobs_named),
        "reconcile": Reconciler(control).run(),
        "relay": control.relay.run(),
    }

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[dict[str, object]]:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(_vital(name, task, server), name=name) for name, task in tasks.items()]
            yield {"stopping": stopping}
            for one in running:
                one.cancel()
        control.view.close()

    config = uvicorn.Config(
        make_app(control, lifespan),
        http=PeerProtocol,
        ws=ShortGoodbye,
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Silent agents are noticed by their heartbeats; a shell that is stopped by ctrl-Z is no dead peer.
        ws_ping_interval=None,
        ws_max_size=wire.FRAME_BYTES_MAX,
        ws_per_message_deflate=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        backlog=BACKLOG,
    )
    server = Server(config, stopping)
    return server


def listener(path: Path) -> socket.socket:
    """Return a listening socket at *path*, 0600 in a 0700 folder; it takes the name only once it listens."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        bound.bind(str(temporary))
    finally:
        os.umask(before)
    bound.listen(BACKLOG)
    temporary.rename(path)
    return bound


async def _vital(name: str, task: Awaitable[None], server: Server) -> None:
    """Run *task* for as long as the server lives; a bug in it ends the process, which the keeper starts again."""
    try:
        await task
    except Exception:  # noqa: BLE001  the edge: nobody else would hear of it
        log.get().exception("task_failed", task=name)
        server.fail()


if __name__ == "__main__":
    sys.exit(main())
