"""The router: a real Caddy under a real keeper, real sockets behind it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_support import DEADLINE_S, Answer, Service, Site, kept_home, loopback, parse, request, serving, site, until

from slum.errors import ConfigError
from slum.node import router
from slum.node.caddyconfig import Issuer, RouterFacts, ask_address, caddy_config, is_public
from slum.node.router import Wanted
from slum.node.routes import Routes, ports_socket
from slum.node.traffic import RequestCounter
from slum.node.uids import ROUTER_UID


@pytest.fixture
async def here() -> AsyncIterator[Site]:
    async with site() as made:
        yield made


def web(here: Site, name: str = "web") -> Service:
    return Service(name=name, path=here.home.run / "i" / f"{name}.sock")


async def test_host_labels_choose_the_socket_whatever_their_case(here: Site) -> None:
    first, second = web(here, "first"), web(here, "second")
    async with serving(first), serving(second):
        here.routes.publish("web", "main", here.home.run / "i/first.sock", first=True)
        here.routes.publish("web", "acme", here.home.run / "i/second.sock", first=False)
        assert (await here.get("web.localhost")).body == "first"
        assert (await here.get("main.web.localhost:8080")).body == "first"
        assert (await here.get("acme.web.localhost")).body == "second"
        assert (await here.get("WEB.LocalHost")).body == "first"
        assert (await here.get("Acme.Web.localhost")).body == "second"


@pytest.mark.parametrize(
    "host",
    ["localhost", "a.b.web.localhost", "web.example.org", "-web.localhost", "..localhost", "web.localhost.", ".new-web.localhost", "r/web.localhost"],
)  # fmt: skip
async def test_a_host_that_names_no_service_is_404_or_refused(here: Site, host: str) -> None:
    service = web(here)
    async with serving(service):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        answer = await here.get(host)
    assert answer.status in (400, 404)
    assert service.served == 0
    if answer.status == 404:
        assert answer.body == "slum: no service has this name here\n"


async def test_missing_stale_and_refusing_sockets_are_a_clear_503(here: Site) -> None:
    stale = here.home.run / "i/stale.sock"
    with socket.socket(socket.AF_UNIX) as closed:
        closed.bind(str(stale))
    stale.chmod(0o666)
    here.routes.publish("stale", "main", stale, first=True)
    here.routes.publish("dangling", "main", here.home.run / "i/none.sock", first=True)
    for host in ("missing.localhost", "stale.localhost", "main.dangling.localhost"):
        answer = await here.get(host)
        assert (answer.status, answer.body) == (503, f"slum: {host} has no instance that answers\n")
        assert answer.headers["retry-after"] == "1"


async def test_a_backlog_that_stays_full_is_a_503_of_its_own(here: Site) -> None:
    path = here.home.run / "i/full.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        path.chmod(0o666)
        waiting.connect(str(path))
        here.routes.publish("full", "main", path, first=True)
        answer = await here.get("full.localhost")
    assert (answer.status, answer.body) == (503, "slum: full.localhost has more requests than it takes\n")


async def test_http2_passes_without_tls(here: Site) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    async with serving(web(here)):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        argv = [curl, "-si", "--http2-prior-knowledge", "-H", "Host: web.localhost", f"http://127.0.0.1:{here.port}/"]
        said = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=DEADLINE_S)
    assert said.stdout.startswith("HTTP/2 200")
    assert said.stdout.endswith("web")


async def test_a_request_waits_for_a_service_that_is_just_restarting(here: Site) -> None:
    here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
    asked = asyncio.create_task(here.get("web.localhost"))
    await until(lambda: not asked.done())
    async with serving(web(here)):
        assert (await asked).body == "web"


async def test_a_connection_that_ends_without_an_answer_is_502_and_not_sent_twice(here: Site) -> None:
    async def hang_up(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        return

    service = web(here)
    service.handle = hang_up
    async with serving(service):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        answer = await here.get("web.localhost")
    assert (answer.status, answer.body) == (502, "slum: web.localhost ended the connection without an answer\n")
    assert len(service.heads) == 1


async def test_the_service_is_told_who_asked_and_a_clients_claims_are_not_believed(here: Site) -> None:
    service = web(here)
    claims = "X-Forwarded-For: 10.0.0.1\r\nX-Forwarded-Proto: https\r\nX-Request-Id: mine\r\n"
    async with serving(service):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        answer = await here.get("web.localhost:8080", headers=claims)
    sent = parse(service.heads[0].encode().replace(b"GET", b"- 0 GET", 1)).headers
    assert sent["host"] == sent["x-forwarded-host"] == "web.localhost:8080"
    assert (sent["x-forwarded-for"], sent["x-forwarded-proto"]) == ("127.0.0.1", "http")
    assert sent["x-request-id"] == answer.headers["x-request-id"] != "mine"


async def test_a_flip_under_load_loses_no_request_and_the_old_generation_drains(here: Site) -> None:
    generations = [Service(name=str(number), path=here.home.run / f"i/g{number}.sock") for number in range(1, 6)]
    failed: list[object] = []
    done = asyncio.Event()

    async def client() -> None:
        while not done.is_set():
            answer = await here.get("web.localhost")
            if answer.status != 200:
                failed.append(answer)

    old: asyncio.Server | None = None
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(client())
        for generation in generations:
            assert generation.path is not None
            server = await asyncio.start_unix_server(generation, str(generation.path), backlog=512)
            generation.path.chmod(0o666)
            here.routes.publish("web", "main", generation.path, first=True)
            await until(lambda new=generation: new.served > 20)
            if old is not None:
                previous = generations[generations.index(generation) - 1]
                # Upstream connections are not kept: else one would still be open here, and this never come true.
                await until(lambda gone=previous: not gone.open)
                old.close()
                assert previous.path is not None
                previous.path.unlink()
            old = server
        done.set()
    assert old is not None
    old.close()
    assert failed == []


async def test_a_websocket_passes_and_outlives_every_change_of_routes(here: Site) -> None:
    async def echo(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
        while data := await reader.read(100):
            writer.write(data.upper())

    service = web(here)
    service.handle = echo
    other = Service(name="other", path=here.home.run / "i/other.sock")
    async with serving(service), serving(other), asyncio.timeout(DEADLINE_S):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(
            b"GET / HTTP/1.1\r\nHost: web.localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        writer.write(b"one")
        assert await reader.readexactly(3) == b"ONE"
        here.routes.publish_port("legacy", "main", 9, first=True)
        here.routes.publish("web", "main", here.home.run / "i/other.sock", first=True)
        assert (await here.get("web.localhost")).body == "other"
        writer.write(b"two")
        assert await reader.readexactly(3) == b"TWO"
        writer.close()


async def test_a_streamed_answer_arrives_as_it_is_made(here: Site) -> None:
    more = asyncio.Event()

    async def stream(head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n")
        await more.wait()
        writer.write(b"data: 2\n\n")
        await writer.drain()

    service = web(here)
    service.handle = stream
    async with serving(service), asyncio.timeout(DEADLINE_S):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: web.localhost\r\n\r\n")
        await reader.readuntil(b"data: 1\n\n")
        more.set()
        await reader.readuntil(b"data: 2\n\n")
        writer.close()


async def test_connections_wait_for_the_next_router_when_one_is_killed(here: Site) -> None:
    async with serving(web(here)):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        before = await here.child()
        os.kill(before.pid, signal.SIGKILL)
        answers = await asyncio.gather(*(_patient(here) for _ in range(20)))
        after = await here.child()
    assert {answer.body for answer in answers} == {"web"}
    assert after.pid != before.pid


async def _patient(here: Site) -> Answer:
    """Ask until there is an answer: what the dying router had accepted ends without one."""
    while True:
        try:
            return await here.get("web.localhost")
        except ConnectionResetError:
            continue


async def test_ensure_again_changes_nothing(here: Site) -> None:
    before = await here.child()
    changed_ns = router.config_file(here.home).stat().st_mtime_ns
    await here.ensure()
    assert (await here.child()).pid == before.pid
    assert router.config_file(here.home).stat().st_mtime_ns == changed_ns


async def test_port_routes_come_and_go_without_losing_requests(here: Site) -> None:
    failed: list[object] = []
    done = asyncio.Event()

    async def client() -> None:
        while not done.is_set():
            answer = await here.get("web.localhost")
            if answer.status != 200:
                failed.append(answer)

    async with serving(web(here)), serving(Service(name="legacy")) as legacy:
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        port = legacy.sockets[0].getsockname()[1]
        pid = (await here.child()).pid
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(client())
            for number in range(6):
                if number % 2:
                    here.routes.publish_port("legacy", "main", port, first=True)
                else:
                    here.routes.unpublish("legacy", "main")
                answer = await here.get("Main.legacy.localhost")
                assert (answer.status, answer.body) == (200, "legacy") if number % 2 else answer.status == 503
            done.set()
        here.routes.publish_port("legacy", "main", 9, first=True)
        assert (await here.get("legacy.localhost")).status == 503
        assert (await here.child()).pid == pid
    assert failed == []


async def test_a_port_service_is_told_the_same_as_others(here: Site) -> None:
    service = Service(name="legacy")
    async with serving(service) as server:
        here.routes.publish_port("legacy", "main", server.sockets[0].getsockname()[1], first=True)
        answer = await here.get("legacy.localhost:8080", headers="X-Forwarded-For: 10.0.0.1\r\n")
    sent = parse(service.heads[0].encode().replace(b"GET", b"- 0 GET", 1)).headers
    assert sent["host"] == sent["x-forwarded-host"] == "legacy.localhost:8080"
    assert (sent["x-forwarded-for"], sent["x-forwarded-proto"]) == ("127.0.0.1", "http")
    assert sent["x-request-id"] == answer.headers["x-request-id"]


async def test_other_addresses_replace_the_router_and_let_go_of_the_old_ones(here: Site) -> None:
    before = await here.child()
    address = f"{loopback()}:8080"
    bound = await router.ensure(
        here.keeper, here.home, Wanted(listen=(address, "[2001:db8::1]:8080"), domain="localhost")
    )
    assert bound == (address,)
    assert (await here.child()).pid != before.pid
    names = {listener.name for listener in await here.keeper.listeners()}
    assert names == {"router/ports", router.listener_name(address)}
    with pytest.raises(ConnectionRefusedError):
        await request(here.port, "web.localhost")


async def test_an_address_that_is_taken_says_so(here: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"cannot listen on {address}") as caught:
            await router.ensure(here.keeper, here.home, Wanted(listen=(address,), domain="localhost"))
    assert "[routing] listen" in caught.value.hint


async def test_stop_leaves_neither_child_nor_listener_and_may_be_repeated(here: Site) -> None:
    await router.stop(here.keeper)
    await router.stop(here.keeper)
    assert await here.keeper.list_children() == ()
    assert await here.keeper.listeners() == ()
    await here.ensure()
    assert (await here.child()).running


async def test_requests_are_counted_by_service(here: Site) -> None:
    counter = RequestCounter(router.access_log(here.home))
    known = {"web": ("main",)}
    assert counter.read("localhost", known) == {}
    async with serving(web(here)):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        for host in ("web.localhost", "Web.localhost:8080", "main.web.localhost", "nosuch.localhost", "x.y.z"):
            await here.get(host)
    counts: dict[tuple[str, str | None], int] = {}

    def all_counted() -> bool:
        for name, count in counter.read("localhost", known).items():
            counts[name] = counts.get(name, 0) + count
        return sum(counts.values()) >= 3

    await until(all_counted)
    counter.close()
    assert counts == {("web", None): 2, ("web", "main"): 1}


async def test_what_the_log_leaves_out_is_counted_by_its_weight(here: Site) -> None:
    counter = RequestCounter(router.access_log(here.home))
    counter.read("localhost", {})
    async with serving(web(here)):
        here.routes.publish("web", "main", here.home.run / "i/web.sock", first=True)
        for _ in range(20):
            answers = await asyncio.gather(*(here.get("web.localhost") for _ in range(60)))
            assert {answer.status for answer in answers} == {200}
    counted = 0

    def close_enough() -> bool:
        nonlocal counted
        counted += counter.read("localhost", {"web": ("main",)}).get(("web", None), 0)
        return counted > 900

    await until(close_enough)
    counter.close()
    assert counted <= 1300
    assert router.access_log(here.home).read_bytes().count(b"\n") < 1200


def test_counting_goes_on_across_a_rotation(tmp_path: Path) -> None:
    log = tmp_path / "access.log"

    def write(*hosts: str) -> None:
        with log.open("a") as file:
            for host in hosts:
                entry = {"level": "info", "ts": 1000.5, "request": {"host": host}}
                file.write(f"{json.dumps(entry)}\n")

    write("before.localhost")
    counter = RequestCounter(log)
    known = {"web": ("main",), "before": ()}
    assert counter.read("localhost", known) == {}
    write("web.localhost", "Main.Web.localhost:8080")
    log.rename(tmp_path / "rotated")
    write("web.localhost", "other.web.localhost", "web.elsewhere")
    assert counter.read("localhost", known) == {("web", None): 2, ("web", "main"): 1}
    assert counter.read("localhost", known) == {}
    counter.close()


@pytest.mark.root
async def test_the_router_has_a_uid_of_its_own_and_cannot_reach_what_is_slums(here: Site) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    pid = (await here.child()).pid
    assert os.stat(f"/proc/{pid}").st_uid == ROUTER_UID
    # A service plants links as its socket: to the keeper, to what it may not reach, to the ports socket.
    for name, target in (("k", here.home.keeper_socket), ("a", here.home.ledger_socket)):
        here.routes.publish(name, "main", target, first=True)
        assert (await here.get(f"{name}.localhost")).status == 503
    here.routes.publish("p", "main", ports_socket(here.home), first=True)
    assert (await here.get("p.localhost")).status == 503
    for path in (router.config_file(here.home), here.home.router, here.home.routes):
        assert path.stat().st_uid == 0
        assert not path.stat().st_mode & 0o007


@pytest.mark.root
async def test_a_wall_keeps_planted_links_from_sockets_that_are_no_routes() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user than the wall's owner")
    async with kept_home() as (home, keeper):
        routes, folder = Routes(home), home.services / "own"
        folder.mkdir(parents=True, mode=0o711)
        own, elsewhere = (
            Service(name="own", path=folder / "s.sock"),
            Service(name="elsewhere", path=home.run / "x.sock"),
        )
        inside = Service(name="web", path=home.run / "i/web.sock")
        for service in (own, elsewhere, inside):
            assert service.path is not None
            routes.publish(service.name, "main", service.path, first=True)
        (home.run / "i/planted.sock").symlink_to(home.run / "x.sock")
        routes.publish("planted", "main", home.run / "i/planted.sock", first=True)
        address = f"{loopback()}:8080"
        wanted = Wanted(listen=(address,), domain="localhost")
        await router.ensure(keeper, home, wanted)
        async with serving(own), serving(elsewhere), serving(inside):
            # Without a wall a uid alone decides, and it may connect to all of these.
            assert await _bodies(address) == {"web": "web", "own": "own", "planted": "elsewhere"}
            config = caddy_config(router.router_facts(home, wanted, (address,)))
            walled = router.router_spawn(home, (address,), config, folders=(folder,))
            await router.end(keeper)
            await keeper.spawn(walled)
            assert await _bodies(address) == {"web": "web", "own": "own", "planted": None}
            pid = (await keeper.list_children())[0].pid
            await keeper.signal(router.NAME, signal.SIGKILL)
            await until(lambda: not os.path.exists(f"/proc/{pid}"))
            assert await _bodies(address) == {"web": "web", "own": "own", "planted": None}


async def _bodies(address: str) -> dict[str, str | None]:
    found = {}
    for name in ("web", "own", "planted"):
        answer = await request(8080, f"{name}.localhost", ip=address.partition(":")[0])
        found[name] = answer.body if answer.status == 200 else None
    return found


@pytest.mark.root
async def test_public_names_get_certificates_only_once_published() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to listen on port 443")
    ip = loopback()
    async with kept_home() as (home, keeper), serving(Service(name="web", path=home.run / "i/web.sock")):
        here = Site(home=home, keeper=keeper, address="", routes=Routes(home))
        wanted = Wanted(
            listen=(f"{ip}:443", f"{ip}:80"),
            domain="apps.slum.dev",
            issuer=Issuer(internal=True),
        )
        await router.ensure(keeper, home, wanted)
        here.routes.publish("web", "main", home.run / "i/web.sock", first=True)
        here.routes.publish_port("legacy", "main", 9, first=True)
        roots = home.data / "router/caddy/pki/authorities/local/root.crt"
        await until(roots.exists)
        trust = ssl.create_default_context(cafile=str(roots))
        assert "200 OK" in await _https(ip, "web.apps.slum.dev", trust)
        assert "200 OK" in await _https(ip, "main.web.apps.slum.dev", trust)
        assert "503 Service Unavailable" in await _https(ip, "legacy.apps.slum.dev", trust)
        for stranger in ("other.apps.slum.dev", "x.web.apps.slum.dev", "apps.slum.dev", "web.elsewhere.dev"):
            with pytest.raises(ssl.SSLError):
                await _https(ip, stranger, trust)
        plain = await _http(ip, "web.apps.slum.dev")
        assert "308 Permanent Redirect" in plain
        assert "Location: https://web.apps.slum.dev/a?b=c" in plain


async def _https(ip: str, host: str, trust: ssl.SSLContext) -> str:
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(ip, 443, ssl=trust, server_hostname=host)
        writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer.decode()


async def _http(ip: str, host: str) -> str:
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(ip, 80)
        writer.write(f"GET /a?b=c HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer.decode()


def test_only_names_that_the_world_can_resolve_are_public() -> None:
    assert is_public("apps.slum.dev")
    assert not any(map(is_public, ("localhost", "dev.localhost", "fleet.internal", "box.local", "x.test")))


def test_a_dot_in_the_domain_is_no_wildcard() -> None:
    facts = RouterFacts(domain="a.b", routes=Path("/r"), access_log=Path("/l"), ports=4, plain=(3,))
    for route in caddy_config(facts)["apps"]["http"]["servers"]["plain"]["routes"][:2]:
        assert route["match"][0]["vars_regexp"]["{http.request.host}"]["pattern"].endswith(r"\.a\.b$")


def test_each_folder_of_routes_has_an_ask_address_of_its_own() -> None:
    assert ask_address(Path("/run/slum/r")) == ask_address(Path("/run/slum/r"))
    assert ask_address(Path("/run/slum/r")) != ask_address(Path("/tmp/slum-1000/r"))
