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
from slum.alive import Alive
from slum.errors import SlumError
from slum.ledger.client import connect
from slum.ledger.reader import Reader
from slum.paths import Home, checked_home
from slum.server import front
from slum.server.app import make_app
from slum.server.blobs import collect_for_ever
from slum.server.cluster import shut_out_who_left
from slum.server.control import Control
from slum.server.dial import dialler
from slum.server.link import Link
from slum.server.listening import listen_at
from slum.server.peer import FrontProtocol, PeerProtocol, ShortGoodbye
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
    with listener(home.api_socket) as local, front.listener(home) as remote:
        server = make_server(home, remote)
        log.get().info("server_started", pid=os.getpid(), socket=str(home.api_socket))
        server.run(sockets=[local])
    return 1 if server.failed else 0


class Server(uvicorn.Server):
    """uvicorn with a second listener, *remote*, where the front says who asks."""

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event, remote: socket.socket) -> None:
        super().__init__(config)
        self.failed = False
        self._stopping = stopping
        self._remote = remote

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on both; one process and one application serve them."""
        await super().startup(sockets)

        def protocol() -> FrontProtocol:
            return FrontProtocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        loop = asyncio.get_running_loop()
        self.servers.append(await loop.create_server(protocol, sock=self._remote, backlog=BACKLOG))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the event streams end first: they would never by themselves."""
        self._stopping.set()
        await super().shutdown(sockets)

    def fail(self) -> None:
        """Stop serving, and make the process's exit status say that it was not on purpose."""
        self.failed = True
        self.should_exit = True


def make_server(home: Home, remote: socket.socket) -> Server:
    """Return the server of *home*, not yet running; *remote* is where its front passes requests on."""
    stopping = asyncio.Event()
    control = Control(
        home,
        Link(lambda: connect(home.ledger_socket), lambda: _last_word(home)),
        View(Reader(home.state / "state.db")),
        dialler(home),
    )
    tasks = {
        "ledger link": control.link.run(),
        "ledger watch": control.watch(),
        "notes": control.notes.run(control.link, control.view.seq),
        "blobs": collect_for_ever(control.blobs, control.view.reader.blobs_named),
        "reconcile": Reconciler(control).run(),
        "relay": control.relay.run(),
        "sessions": control.sessions.run(control),
        "front": front.keep(control),
        "front watch": front.watch(home),
        "copies": control.copies.run(),
        "adding": control.adding.run(),
        "shutting out": shut_out_who_left(control),
        "alive": Alive().keep_telling(),
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
    server = Server(config, stopping, remote)
    return server


def listener(path: Path) -> socket.socket:
    """Return a listening socket at *path*, 0600 in a 0700 folder; it takes the name only once it listens."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return listen_at(path, BACKLOG)


def _last_word(home: Home) -> SlumError | None:
    """Return why the ledger of *home* will not start again, where it has left word of that."""
    from slum.ledger import fence  # only when it is needed: it brings the engine with it

    try:
        fence.check(home.state)
    except SlumError as error:
        return error
    return None


async def _vital(name: str, task: Awaitable[None], server: Server) -> None:
    """Run *task* for as long as the server lives; a bug in it ends the process, which the keeper starts again."""
    try:
        await task
    except Exception:  # noqa: BLE001  the edge: nobody else would hear of it
        log.get().exception("task_failed", task=name)
        server.fail()


if __name__ == "__main__":
    sys.exit(main())
