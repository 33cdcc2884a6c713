"""The API as a whole: every route documented with valid examples, who may connect, blobs, errors, size in memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
from server_support import Plane, a_fleet, a_service, applied, eventually, get, problem, put

from slum import api
from slum.server.app import ROUTES
from slum.server.blobs import KEEP_S, Blobs
from slum.server.examples import EXAMPLES
from slum.server.openapi import openapi_document
from slum.server.peer import Local
from slum.server.route import Kind

DOCS = Path(__file__).resolve().parents[1] / "docs" / "api.md"


# --- the description --------------------------------------------------------------------------------------------------


def test_every_route_is_in_the_openapi_page_with_its_words() -> None:
    document = openapi_document(ROUTES)
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["summary"] == route.summary
        assert len(route.summary) > 10
        assert "default" in operation["responses"]
    ids = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(ids) == len(set(ids))


def test_every_reference_of_the_openapi_page_leads_somewhere() -> None:
    document = openapi_document(ROUTES)
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        found = document
        for part in reference.split("/"):
            found = found[part]


def test_every_document_has_an_example_and_it_is_valid() -> None:
    for route in ROUTES:
        for kind in (route.request, route.response):
            if kind in (None, dict):
                continue
            example = EXAMPLES[kind]
            assert msgspec.json.decode(msgspec.json.encode(example), type=kind) == example, route.path
            assert msgspec.convert(msgspec.to_builtins(example), type=kind) == example


def test_every_route_is_in_the_manual() -> None:
    text = DOCS.read_text()
    for route in ROUTES:
        word = "WS" if route.kind is Kind.WEBSOCKET else route.method
        assert re.search(rf"`{word} {re.escape(route.path)}[`?]", text), f"{word} {route.path} is not in docs/api.md"


async def test_the_openapi_page_is_served(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    assert document["openapi"] == "3.1.0"
    assert "/v1/status" in document["paths"]


# --- who, what, how large ---------------------------------------------------------------------------------------------


async def test_status_names_the_ledger_and_its_members(plane: Plane, http: httpx.AsyncClient) -> None:
    status = await get(http, "status", api.Status)
    assert (status.ledger.leader, status.ledger.members[0].role) == ("m1", "leader")
    assert status.data_dir == str(plane.home.data)
    assert status.pid == plane.running["server"].pid


async def test_while_the_ledger_hangs_reads_say_so_and_writes_end(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(a_service()))
    before = await get(http, "status", api.Status)
    assert before.ledger.silent_s is None
    plane.running["ledger"].send_signal(signal.SIGSTOP)
    status = await get(http, "status", api.Status)
    assert status.ledger.silent_s is not None
    assert (status.revision, status.ledger.leader, status.ledger.members) == (1, "m1", before.ledger.members)
    for path in ("state", "fleet", "revisions", "instances", "explain/notes", "events", "events/verify"):
        assert (await http.get(f"/v1/{path}")).status_code == 200, path
    refused = await put(http, a_fleet(), 1)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert problem(refused).message == "the ledger does not answer"
    assert "started again by itself" in problem(refused).hint
    plane.running["ledger"].send_signal(signal.SIGCONT)

    async def answers() -> bool:
        return (await get(http, "status", api.Status)).ledger.silent_s is None

    await eventually(answers)


async def test_a_fresh_reading_waits_for_the_ledger(plane: Plane, http: httpx.AsyncClient) -> None:
    done = await applied(http, a_fleet(a_service()))
    fresh = await get(http, "state", api.State, fresh=1)
    assert (fresh.revision, fresh.seq > done.seq) == (1, True)
    plain = await get(http, "state", api.State)
    assert plain.seq == fresh.seq


def test_the_actor_is_the_kernels_word_and_the_hosts_own_name() -> None:
    peer = Local(uid=0, pid=1)
    assert peer.actor("laptop") == "root@laptop"
    here = os.uname().nodename
    for odd in ("", "a b", "x" * 65, "evil@host", "new\nline"):
        assert peer.actor(odd) == f"root@{here}"
    assert Local(uid=4_000_000, pid=1).actor("h") == "4000000@h"


async def test_the_socket_belongs_to_its_user_alone(plane: Plane, http: httpx.AsyncClient) -> None:
    assert plane.home.api_socket.stat().st_mode & 0o777 == 0o600
    assert plane.home.private.stat().st_mode & 0o777 == 0o700


@pytest.mark.root
async def test_another_user_is_hung_up_on(plane: Plane, http: httpx.AsyncClient) -> None:
    """Even one that found the socket open to it: the kernel says who it is."""
    plane.home.api_socket.chmod(0o666)
    for folder in (plane.home.run, plane.home.private):
        folder.chmod(0o711)
    script = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "try:\n"
        "    s.sendall(b'GET /v1/health HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print(s.recv(100))\n"
        "except OSError as e: print(b'', e.errno)\n"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        ["/usr/bin/python3", "-c", script, str(plane.home.api_socket)],
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert done.stdout.startswith("b''"), done
    assert "peer_refused" in plane.logged


async def test_unknown_paths_and_methods_are_problems_too(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/nothing")
    assert (answer.status_code, problem(answer).code) == (404, "bad_input")
    assert (await http.delete("/v1/fleet")).status_code == 405


async def test_garbage_does_no_harm(plane: Plane, http: httpx.AsyncClient) -> None:
    for data in (b"\0" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"GET /" + b"x" * 200_000):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(5)
            raw.connect(str(plane.home.api_socket))
            try:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                raw.recv(1000)
            except OSError:
                continue
    assert (await http.get("/v1/health")).json()["ok"]


async def test_sigterm_ends_it_soon_and_streams_with_it(plane: Plane, http: httpx.AsyncClient) -> None:
    async with http.stream("GET", "/v1/events", headers={"accept": "text/event-stream"}):
        began = time.monotonic()
        await asyncio.to_thread(plane.kill, "server", 15)
        assert time.monotonic() - began < 6
    assert "Traceback" not in plane.logged


async def test_a_second_server_takes_over_the_name(plane: Plane, http: httpx.AsyncClient) -> None:
    first = plane.running.pop("server")
    plane.start("server")
    try:

        async def answered_by_the_second() -> bool:
            async with plane.http() as fresh:
                answer = await fresh.get("/v1/status")
                return answer.status_code == 200 and answer.json()["pid"] == plane.running["server"].pid

        await eventually(answered_by_the_second)
    finally:
        first.kill()
        first.wait()


async def test_it_is_small(plane: Plane, http: httpx.AsyncClient) -> None:
    await applied(http, a_fleet(*(a_service(f"s{n}") for n in range(200))))
    for _ in range(20):
        await http.get("/v1/state")
    assert rss_bytes(plane) < 60 << 20


def rss_bytes(plane: Plane) -> int:
    return int(Path(f"/proc/{plane.running['server'].pid}/statm").read_text().split()[1]) * 4096


# --- blobs ------------------------------------------------------------------------------------------------------------


async def test_a_blob_is_stored_once_and_given_back(plane: Plane, http: httpx.AsyncClient) -> None:
    data = os.urandom(3 << 20)
    digest = hashlib.sha256(data).hexdigest()
    assert (await http.head(f"/v1/blobs/{digest}")).status_code == 404

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100_000):
            yield data[start : start + 100_000]

    assert (await http.put(f"/v1/blobs/{digest}", content=chunks())).status_code == 201
    assert (await http.put(f"/v1/blobs/{digest}", content=data)).status_code == 200
    head = await http.head(f"/v1/blobs/{digest}")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(data)))
    answer = await http.get(f"/v1/blobs/{digest}")
    assert answer.content == data
    assert answer.headers["etag"] == f'"{digest}"'
    again = await http.get(f"/v1/blobs/{digest}", headers={"if-none-match": f'"{digest}"'})
    assert again.status_code == 304
    assert [path.name for path in plane.home.blobs.iterdir()] == [digest]


async def test_a_body_that_is_not_what_its_name_says_is_refused(plane: Plane, http: httpx.AsyncClient) -> None:
    digest = hashlib.sha256(b"one").hexdigest()
    answer = await http.put(f"/v1/blobs/{digest}", content=b"another")
    assert answer.status_code == 400
    assert "upload it again" in problem(answer).hint
    assert (await http.head(f"/v1/blobs/{digest}")).status_code == 404
    assert list(plane.home.blobs.iterdir()) == []


@pytest.mark.parametrize("name", ["x", "A" * 64, "..%2f..%2fetc%2fpasswd", "0" * 63])
async def test_a_name_that_is_no_digest_is_refused(http: httpx.AsyncClient, name: str) -> None:
    assert (await http.get(f"/v1/blobs/{name}")).status_code in (400, 404)
    assert (await http.put(f"/v1/blobs/{name}", content=b"")).status_code in (400, 404)


async def test_a_blob_over_the_cap_is_refused_before_it_is_sent(plane: Plane, http: httpx.AsyncClient) -> None:
    reader, writer = await asyncio.open_unix_connection(str(plane.home.api_socket))
    head = f"PUT /v1/blobs/{'0' * 64} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
    writer.write(f"{head}Content-Length: {(256 << 20) + 1}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 413 ")
    writer.close()
    await writer.wait_closed()


async def test_an_upload_that_is_cut_leaves_nothing(plane: Plane, http: httpx.AsyncClient) -> None:
    reader, writer = await asyncio.open_unix_connection(str(plane.home.api_socket))
    writer.write(
        f"PUT /v1/blobs/{'0' * 64} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode() + b"x" * 5000
    )
    await writer.drain()

    async def has_begun() -> bool:
        return plane.home.blobs.is_dir() and any(plane.home.blobs.iterdir())

    await eventually(has_begun)
    writer.close()
    await writer.wait_closed()
    del reader

    async def is_clean() -> bool:
        return not any(plane.home.blobs.iterdir())

    await eventually(is_clean)


def test_only_old_blobs_that_nobody_names_are_collected(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    now = time.time()
    for name, age_s in (("a" * 64, 2 * KEEP_S), ("b" * 64, 2 * KEEP_S), ("c" * 64, 10.0), (".d-upload", 2 * KEEP_S)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (now - age_s, now - age_s))
    assert blobs.touch("b" * 64)
    assert blobs.collect({"f" * 64}, now) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"b" * 64, "c" * 64}
    assert Blobs(tmp_path / "none").collect(set(), now) == 0


def test_the_server_does_not_need_what_only_others_need() -> None:
    script = (
        "import sys, slum.server.process as p; print({'pysyncobj', 'httpx', 'rich', 'websockets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
