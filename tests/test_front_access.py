"""Who may what, through the real front: every route, every kind of certificate, and every way to pretend to be another."""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from front_support import Holder, Site, a_site, another_authority
from server_support import a_fleet, a_service, problem

from slum import api
from slum.errors import ConfigError
from slum.ledger.commands import NoteCertificate
from slum.pki import authority, request
from slum.server.app import ROUTES
from slum.server.guard import Sessions
from slum.server.peer import MAY, Access, Guest, visitor_of
from slum.server.route import Kind, Route

pytestmark = pytest.mark.xdist_group("front-access")
REFUSED = (401, 403)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with a_site() as made:
        apply(made)
        yield made


@pytest.fixture(scope="module")
def holders(site: Site) -> dict[str, Holder | None]:
    """One of each kind that may come in, and somebody without a certificate."""
    member = site.keep(site.home.front_key.read_bytes(), site.home.front_certificate.read_text())
    return {
        "user/admin": site.holder("user", "ana", role="admin"),
        "user/read": site.holder("user", "bob", role="read"),
        "node/": site.holder("node", "here"),
        "member/": member,
        "": None,
    }


def apply(site: Site) -> None:
    """Give the fleet a machine, so that there can be a node."""
    fleet = a_fleet(a_service(bundle="ab" * 32))
    asked = api.ApplyRequest(fleet=fleet, base_revision=0, request_id="0f" * 16 + ":0")
    with site.local() as http:
        blob = b"not much of a bundle"
        digest = hashlib.sha256(blob).hexdigest()
        assert http.put(f"/v1/blobs/{digest}", content=blob).status_code == 201
        fleet = a_fleet(a_service(bundle=digest))
        asked = msgspec.structs.replace(asked, fleet=fleet)
        answer = http.put("/v1/fleet", content=msgspec.json.encode(asked))
        assert answer.status_code == 200, answer.text
        end = time.monotonic() + 15
        while not msgspec.json.decode(http.get("/v1/status").content)["tenements"]:
            assert time.monotonic() < end
        reader = site.reader
        while not reader.machines():
            assert time.monotonic() < end
        reader.close()


def named_digest(site: Site) -> str:
    reader = site.reader
    digest = next(iter(reader.blobs_named()))
    reader.close()
    return digest


def knock(http: httpx.Client, route: Route) -> int:
    """Return the status of a request to *route* that is well-formed enough to reach the guard, and changes nothing."""
    path = re.sub(r"\{\w+\}", "nothing", route.path)
    if route.kind is Kind.WEBSOCKET:
        headers = {
            "connection": "upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        with http.stream("GET", path, headers=headers) as answer:
            return answer.status_code
    with http.stream(route.method, path, content=b"" if route.request is None else b"no json") as answer:
        return answer.status_code


@pytest.mark.parametrize("who", ["user/admin", "user/read", "node/", "member/", ""])
def test_every_route_is_open_to_those_it_names_and_nobody_else(
    site: Site, holders: dict[str, Holder | None], who: str
) -> None:
    kind, _, role = who.partition("/")
    may = MAY.get((kind, role), Access.OPEN)
    with site.http(holders[who]) as http:
        for route in ROUTES:
            status = knock(http, route)
            passes = bool(route.access & may)
            assert (status not in REFUSED) == passes, (who, route.method, route.path, status)


def test_what_changes_something_or_is_a_shell_is_for_admins() -> None:
    """The table above believes the routes; this holds them to what they do."""
    others = {
        "/v1/fleet/check": Access.READ,  # asks providers, commits nothing
        "/v1/agent": Access.NODE,
        "/v1/agent/streams/{id}": Access.NODE,
        "/v1/members/link": Access.MEMBER,
        **dict.fromkeys(("/v1/join", "/v1/renew"), Access.OPEN),
    }
    for route in ROUTES:
        changes = route.method not in ("GET", "HEAD") or route.kind is Kind.WEBSOCKET
        if changes or route.path == "/v1/tokens":
            assert route.access == others.get(route.path, Access.ADMIN), route.path
        elif route.path == "/v1/ca":
            assert route.access == Access.OPEN
        else:
            assert route.access in (Access.READ, Access.READ | Access.NODE), route.path


def test_a_read_user_changes_nothing_and_is_told_what_next(site: Site, holders: dict[str, Holder | None]) -> None:
    with site.http(holders["user/read"]) as http:
        asked = api.ActionRequest(verb="stop", service="notes", request_id="0f" * 16 + ":1")
        answer = http.post("/v1/actions", content=msgspec.json.encode(asked))
        assert answer.status_code == 403
        assert "bob@127.0.0.1 may not do this: it needs the role admin" in problem(answer).message
        assert "--role admin" in problem(answer).hint
        assert http.get("/v1/status").status_code == 200


def test_an_admin_is_named_in_the_audit_trail(site: Site, holders: dict[str, Holder | None]) -> None:
    asked = api.TokenRequest(kind="user", subject="carl", role="read", host="laptop")
    with site.http(holders["user/admin"]) as http:
        assert http.post("/v1/tokens", content=msgspec.json.encode(asked)).status_code == 200
        events = msgspec.json.decode(http.get("/v1/events?kind=token_added&newest=1").content, type=list[api.Event])
    assert events[-1].actor == "ana@laptop"
    assert events[-1].after["for"] == "carl"


def test_a_node_gets_the_bundles_of_its_own_config_only(site: Site, holders: dict[str, Holder | None]) -> None:
    other = b"somebody else's"
    digest = hashlib.sha256(other).hexdigest()
    with site.local() as http:
        http.put(f"/v1/blobs/{digest}", content=other)
    with site.http(holders["node/"]) as http:
        assert http.get(f"/v1/blobs/{named_digest(site)}").content == b"not much of a bundle"
        assert http.get(f"/v1/blobs/{digest}").status_code == 404
        assert http.head(f"/v1/blobs/{digest}").status_code == 403
    with site.http(holders["user/read"]) as http:
        assert http.get(f"/v1/blobs/{digest}").content == other


def test_no_certificate_is_told_so(site: Site) -> None:
    with site.http() as http:
        answer = http.get("/v1/status")
    assert answer.status_code == 401
    assert "none was shown" in problem(answer).message
    assert "slum token new" in problem(answer).hint


def test_a_certificate_of_another_authority_does_not_get_in(site: Site, holders: dict[str, Holder | None]) -> None:
    certificate, key = another_authority(site.folder)
    mine = request.new_key()
    cluster = holders["user/admin"].answer.cluster  # type: ignore[union-attr]
    signed = authority.sign(
        request.make_request(mine),
        certificate=certificate,
        key=key,
        uri=f"spiffe://{cluster}/user/ana",
        now=time.time(),
    )
    # In TLS 1.3 the refusal comes after the client's handshake is done: with the first byte.
    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        with site.http(site.keep(mine, signed.certificate)) as http:
            http.get("/v1/ca")


def test_an_older_tls_is_refused(site: Site, holders: dict[str, Holder | None]) -> None:
    context = site.tls(holders["user/admin"])
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(httpx.ConnectError), httpx.Client(verify=context, base_url=site.url) as http:
        http.get("/v1/ca", extensions={"sni_hostname": "slum.internal"})


def test_a_certificate_that_the_ledger_does_not_know_opens_nothing(site: Site) -> None:
    """Whoever stole the authority's key would still have to be in the ledger."""
    reader = site.reader
    row = reader.authority()
    assert row is not None
    key = request.new_key()
    signed = authority.sign(
        request.make_request(key),
        certificate=row.certificate,
        key=authority.unseal(row.box, site.home.member_age.read_text()),
        uri=authority.uri_of(reader.cluster().cluster_id, "user/ana"),
        now=time.time(),
    )
    reader.close()
    with site.http(site.keep(key, signed.certificate)) as http:
        answer = http.get("/v1/status")
    assert answer.status_code == 401
    assert "is not known here" in problem(answer).message


def test_a_member_that_is_none_any_more_opens_nothing(site: Site) -> None:
    reader = site.reader
    key = request.new_key()
    row = reader.authority()
    assert row is not None
    signed = authority.sign(
        request.make_request(key),
        certificate=row.certificate,
        key=authority.unseal(row.box, site.home.member_age.read_text()),
        uri=authority.uri_of(reader.cluster().cluster_id, "member/m9"),
        now=time.time(),
        server=True,
    )
    reader.close()
    note = NoteCertificate(
        serial=signed.serial, subject="member/m9", role="", key_hash=signed.key_hash, not_after=signed.not_after
    )
    site.propose(note)
    with site.http(site.keep(key, signed.certificate)) as http:
        assert "belongs to no member" in problem(http.get("/v1/status")).message


def claims(site: Site, holders: dict[str, Holder | None]) -> dict[str, str]:
    """The headers that would make somebody the admin, if they were believed."""
    admin = holders["user/admin"]
    assert admin is not None
    assert admin.answer is not None
    shown = authority.read_certificate(admin.answer.certificate, site.ca)
    return {"X-Slum-Uri": shown.uri, "X-Slum-Serial": str(int(shown.serial, 16)), "X-Slum-Address": "127.0.0.1"}


@pytest.mark.parametrize("shape", ["plain", "lower", "twice", "underscore", "upper", "hop"])
def test_headers_of_a_client_are_not_believed(site: Site, holders: dict[str, Holder | None], shape: str) -> None:
    said = list(claims(site, holders).items())
    if shape == "lower":
        said = [(name.lower(), value) for name, value in said]
    if shape == "twice":
        said = said * 2
    if shape == "underscore":
        said = [(name.replace("-", "_"), value) for name, value in said]
    if shape == "upper":
        said = [(name.upper(), value) for name, value in said]
    if shape == "hop":
        said.append(("Connection", ", ".join(name for name, _ in said)))
    for holder, status in ((None, 401), (holders["user/read"], 403)):
        with site.http(holder) as http:
            answer = http.get("/v1/tokens", headers=said)
        assert answer.status_code == status, (shape, answer.text)


def test_trailers_of_a_client_are_not_believed(site: Site, holders: dict[str, Holder | None]) -> None:
    """The server's parser appends trailers to the headers of a request that has begun."""
    said = claims(site, holders)
    trailers = "".join(f"{name}: {value}\r\n" for name, value in said.items())
    head = (
        "POST /v1/tokens HTTP/1.1\r\nHost: slum.internal\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
        f"Trailer: {', '.join(said)}\r\n\r\n"
    )
    body = msgspec.json.encode(api.TokenRequest(kind="user", subject="eve", role="admin")).decode()
    data = f"{head}{len(body):x}\r\n{body}\r\n0\r\n{trailers}\r\n".encode()
    for heard in (site.raw(data), site.raw_behind(data)):
        assert heard.startswith(b"HTTP/1.1 401"), heard


def test_the_local_socket_never_looks_at_such_headers(site: Site, holders: dict[str, Holder | None]) -> None:
    with site.local() as http:
        headers = {**claims(site, holders), "X-Slum-Uri": "spiffe://x/user/nobody"}
        assert http.get("/v1/tokens", headers=headers).status_code == 200


def test_visitors_are_read_from_whole_headers_only() -> None:
    good = [(b"x-slum-uri", b"spiffe://c/user/a"), (b"x-slum-serial", b"255"), (b"x-slum-address", b"10.0.0.1")]
    assert visitor_of(good).serial == "ff"
    assert visitor_of(good).address == "10.0.0.1"
    assert visitor_of([*good, good[1]]).serial == ""
    for bad in (b"", b"-1", b"0x1", b"1 2", "²".encode("latin-1"), b"9" * 51):
        assert visitor_of([good[0], (b"x-slum-serial", bad)]).uri == ""
    assert visitor_of([]).uri == ""


def test_the_manual_says_who_may_what() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "security.md").read_text()
    for (kind, role), may in MAY.items():
        names = ", ".join(str(one.name).lower() for one in may if one is not Access.OPEN)
        row = f"| {kind}{f', role {role}' if role else ''} | {names} |"
        assert row in page, row
    for route in ROUTES:
        if route.access & Access.OPEN:
            assert f"`{route.method} {route.path}`" in page, route.path


def test_requests_that_are_none_are_refused() -> None:
    good = request.make_request(request.new_key())
    for bad in ("", "x", good[:-60], good.replace("A", "B", 40), "x" * 9000):
        with pytest.raises(ConfigError):
            authority.read_request(bad)


async def test_a_session_that_is_slow_to_end_is_ended_once() -> None:
    class Reader:
        def revoked(self) -> frozenset[str]:
            return frozenset({"ab"})

    class Cluster:
        members = ()

    class World:
        cluster = Cluster()

    class View:
        reader = Reader()

        def world(self) -> World:
            return World()

    sessions, view, ended = Sessions(), View(), 0
    peer = Guest(subject="user/ana", role="read", serial="ab", address="")

    async def serve() -> None:
        nonlocal ended
        async with asyncio.timeout(None) as timeout:
            with sessions.opened(peer, timeout):
                try:
                    ended += sessions.end_revoked(view)  # type: ignore[arg-type]
                    await asyncio.sleep(60)
                finally:
                    ended += sessions.end_revoked(view)  # type: ignore[arg-type]

    with pytest.raises(TimeoutError):
        await serve()
    assert ended == 1
    assert sessions.end_revoked(view) == 0  # type: ignore[arg-type]
