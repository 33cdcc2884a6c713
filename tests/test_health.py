"""Probes against real sockets: good and bad answers, no answer, planted things, kept listeners; and counting connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from agent_support import until

from slum.node.health import Door, ask
from slum.node.sockets import (
    Planted,
    connections,
    make_run_folder,
    open_socket,
    port_connections,
    queued,
    remove_socket,
)

Answerer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(path: Path, answer: bytes | None, heard: list[bytes] | None = None) -> AsyncIterator[Path]:
    """A server at *path* that says *answer* to each request, or (None) nothing at all."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if heard is not None:
                heard.append(head)
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield path
    finally:
        server.close()
        await server.wait_closed()


def door(path: Path, **more: object) -> Door:
    return Door(path=path, base=path.parent, health="/healthz", host="web.localhost", **more)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "g1.sock"


@pytest.mark.parametrize(
    ("answer", "ok", "text"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell", True, "-> 200 in"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", True, "-> 204 in"),
        (b"HTTP/1.0 302 Found\r\nLocation: /x\r\n\r\n", True, "-> 302 in"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 18\r\n\r\ndatabase is locked", False, ": database is locked"),
        (b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", False, "-> 404 in"),
        (b"HTTP/1.1 500 No\r\n\r\n" + b"x" * 200_000, False, "-> 500 in"),
        (b"SSH-2.0-OpenSSH_9\r\n", False, "no HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 9000, False, "no HTTP"),
        (b"", False, "no HTTP"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000, False, "no HTTP: no answer in"),
        (
            b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"e" * 999 + b"\r\nx\r\n") * 999,
            False,
            "500",
        ),
    ],
)
async def test_answers(path: Path, answer: bytes, ok: bool, text: str) -> None:
    async with serving(path, answer):
        got = await ask(door(path), 2.0)
    assert (got.ok, text in got.text) == (ok, True), got
    assert len(got.text) < 400


async def test_an_answer_without_end_is_given_up_and_holds_up_nobody(path: Path) -> None:
    """Fed by another thread, as a service would, so that there always is more to read."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def flood() -> None:
        peer, _ = listener.accept()
        with peer, contextlib.suppress(OSError):
            while True:
                peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 4000)

    with listener:
        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        answer = await asyncio.wait_for(ask(door(path), 5.0), 10)
        thread.join(10)
    assert not answer.ok
    assert "no HTTP: no answer in" in answer.text


async def test_the_request_names_the_host_and_closes(path: Path) -> None:
    heard: list[bytes] = []
    async with serving(path, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", heard):
        await ask(door(path), 2.0)
    assert heard[0].startswith(b"GET /healthz HTTP/1.1\r\nHost: web.localhost\r\n")
    assert b"Connection: close" in heard[0]


async def test_no_answer_nobody_and_nothing(path: Path) -> None:
    assert "no socket at" in (await ask(door(path), 0.5)).text
    async with serving(path, None):
        assert (await ask(door(path), 0.1)).text == "GET /healthz: no answer within 0.1 s"
    with socket.socket(socket.AF_UNIX) as dead:
        remove_socket(path, path.parent)
        dead.bind(str(path))
    assert "refused" in (await ask(door(path), 0.5)).text


async def test_without_a_path_an_accepted_connection_is_healthy(path: Path) -> None:
    async with serving(path, b""):
        answer = await ask(Door(path=path, base=path.parent), 1.0)
    assert answer.ok
    assert answer.text.startswith("connect: accepted")


async def test_a_kept_listener_is_healthy_only_when_the_service_accepts(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as kept:
        kept.bind(str(path))
        kept.listen(10)
        asked = Door(path=path, base=path.parent, bound=str(path))
        assert not (await ask(asked, 0.2)).ok
        with kept.accept()[0]:
            waiting = asyncio.create_task(ask(asked, 5.0))
            await until(lambda: queued(str(path)))
            with kept.accept()[0]:
                assert (await waiting).ok


async def test_a_full_backlog_is_waited_for(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as first:
        full.bind(str(path))
        full.listen(0)
        first.connect(str(path))
        waiting = asyncio.create_task(ask(Door(path=path, base=path.parent), 5.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        full.accept()[0].close()
        assert (await waiting).ok


async def test_a_planted_link_leads_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "api.sock"
    heard: list[bytes] = []
    base = tmp_path / "i"
    base.mkdir()
    async with serving(secret, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", heard):
        (base / "g1.sock").symlink_to(secret)
        answer = await ask(door(base / "g1.sock"), 1.0)
        assert not answer.ok
        assert "symbolic link" in answer.text
        (base / "sub").symlink_to(tmp_path)
        inner = Door(path=base / "sub" / "api.sock", base=base, health="/")
        assert not (await ask(inner, 1.0)).ok
    assert heard == []


@pytest.mark.root
def test_another_users_socket_is_refused(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(path))
        os.chown(path, 200_005, -1)
        with pytest.raises(Planted, match="belongs to uid 200005"):
            open_socket(path, base=path.parent, uid=200_001)
        os.close(open_socket(path, base=path.parent, uid=200_005))


def test_a_file_is_no_socket(path: Path) -> None:
    path.write_text("")
    with pytest.raises(Planted, match="is not a socket"):
        open_socket(path, base=path.parent, uid=None)
    remove_socket(path, path.parent)
    assert path.exists()


def test_connections_are_counted_accepted_or_not(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(10)
        assert connections([str(path)]) == {str(path): 0}
        with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
            one.connect(str(path))
            two.connect(str(path))
            peer, _ = server.accept()
            assert connections([str(path), "/other"]) == {str(path): 2, "/other": 0}
            peer.close()
            assert connections([str(path)]) == {str(path): 1}
    remove_socket(path, path.parent)
    assert not path.exists()


def test_port_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert port_connections([port]) == {port: 0}
        with socket.create_connection(("127.0.0.1", port)):
            assert port_connections([port]) == {port: 1}


@pytest.mark.root
def test_a_run_folder_belongs_to_the_service_and_the_routers_group(tmp_path: Path) -> None:
    folder = tmp_path / "i" / "abc"
    for _ in range(2):
        make_run_folder(folder, uid=200_001, router_gid=199_999)
        status = folder.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (200_001, 199_999, 0o2710)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(OSError, match=r"symbolic|directory"):
        make_run_folder(folder, uid=200_001, router_gid=199_999)
    assert tmp_path.stat().st_uid == os.geteuid()


def test_no_socket_is_removed_behind_a_link(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    (mine / "real" / "deep").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    (mine / "sub").symlink_to(other)
    bound = []
    for folder in (mine / "real" / "deep", other / "deep"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(folder / "a.sock"))
        bound.append(folder / "a.sock")
    remove_socket(mine / "sub" / "deep" / "a.sock", mine)
    remove_socket(mine / "none" / "a.sock", mine)
    assert all(path.is_socket() for path in bound)
    remove_socket(mine / "real" / "deep" / "a.sock", mine)
    assert [path.exists() for path in bound] == [False, True]
