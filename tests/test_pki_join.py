"""Joining, renewing, revoking: tokens and certificates against a real control plane, with an attacker's eyes."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import msgspec
import pytest
from front_support import Holder, Site, a_site, another_authority
from server_support import problem

from slum import api
from slum.errors import ConfigError
from slum.ledger.client import connect
from slum.ledger.identity import make_certificate
from slum.pki import authority, request, tokens
from slum.server import trust
from slum.server.attempts import AT_ONCE, Attempts, source_of

pytestmark = pytest.mark.xdist_group("pki-join")
SLUM = Path(sys.executable).with_name("slum")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with a_site() as made:
        yield made


def secret_of(made: api.NewToken) -> str:
    return tokens.parse(made.token).secret


def eventually(condition: object, deadline_s: float = 5.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "not so in time"
        time.sleep(0.02)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_token_is_good_for_one_key_and_gives_it_the_same_answer_again(site: Site) -> None:
    made = site.token("user", "ana", role="admin")
    key, other = request.new_key(), request.new_key()
    first, again = site.join(secret_of(made), key), site.join(secret_of(made), key)
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.content == again.content
    refused = site.join(secret_of(made), other)
    assert refused.status_code == 403
    assert problem(refused).message == problem(site.join("a" * 32, other)).message, "a stranger learns which it was"
    assert "slum token new" in problem(refused).hint


def test_of_two_keys_at_the_same_time_one_wins(site: Site) -> None:
    made = site.token("user", "ana", role="read")
    keys = [request.new_key() for _ in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda key: site.join(secret_of(made), key), keys))
    assert sorted(answer.status_code for answer in answers) == [200, 403, 403, 403, 403, 403]


def test_an_expired_token_opens_nothing_but_a_used_one_answers_its_key(site: Site) -> None:
    late, used = (site.token("user", "ana", role="read", ttl_s=1.0) for _ in range(2))
    key = request.new_key()
    first = site.join(secret_of(used), key)
    reader = site.reader
    ends = {row.id: row.expires_at for row in reader.tokens()}
    reader.close()
    eventually(lambda: time.time() > ends[late.id], 15.0)
    assert site.join(secret_of(late), request.new_key()).status_code == 403
    assert site.join(secret_of(used), key).content == first.content


def test_a_removed_token_opens_nothing(site: Site) -> None:
    made = site.token("user", "ana", role="read")
    with site.local() as http:
        assert http.delete(f"/v1/tokens/{made.id}").status_code == 200
        assert http.delete(f"/v1/tokens/{made.id}").status_code == 404
        listed = msgspec.json.decode(http.get("/v1/tokens").content, type=list[api.TokenView])
    assert made.id not in {one.id for one in listed}
    assert site.join(secret_of(made), request.new_key()).status_code == 403


@pytest.mark.parametrize(
    ("kind", "subject", "role", "ttl_s", "said"),
    [
        ("user", "Ana", "read", 60.0, "no user's name"),
        ("user", "ana/../bob", "read", 60.0, "no user's name"),
        ("user", "ana", "root", 60.0, "no role"),
        ("user", "ana", "read", 1e9, "30 days"),
        ("user", "ana", "read", float("inf"), ""),
        ("node", "nowhere", "", 60.0, "no machine 'nowhere'"),
        ("node", "here", "admin", 60.0, "has no role"),
        ("member", "m 2", "", 60.0, "no member's id"),
        ("king", "ana", "", 60.0, "none of"),
    ],
)
def test_tokens_that_could_open_nothing_are_not_made(
    site: Site, kind: str, subject: str, role: str, ttl_s: float, said: str
) -> None:
    asked = {"kind": kind, "subject": subject, "role": role, "ttl_s": ttl_s if ttl_s < 1e300 else "inf"}
    with site.local() as http:
        answer = http.post("/v1/tokens", json=asked)
    assert answer.status_code in (400, 404)
    assert said in problem(answer).message


def test_a_members_token_is_for_who_says_what_a_member_needs(site: Site) -> None:
    """This plane has no address to be joined at, so that the last step is refused."""
    made = site.token("member", "m2")
    own = base64.b64encode(ssl.PEM_cert_to_DER_cert(make_certificate("m2")[1].decode())).decode()
    offer = api.MemberOffer(
        id="m2", incarnation="ab" * 8, public_key=own, address="127.0.0.1:1", recipient=authority.new_identity()[1]
    )
    for member, said in (
        (None, "a member's token"),
        (msgspec.structs.replace(offer, id="m3"), "not for a member 'm3'"),
        (offer, "m1 has no key and address"),
    ):
        answer = site.join(secret_of(made), request.new_key(), member=member)
        assert answer.status_code == 400
        assert said in problem(answer).message
    reader = site.reader
    assert reader.token(tokens.hash_of(secret_of(made))).key_hash == ""  # type: ignore[union-attr]
    reader.close()


def test_the_authority_is_opened_by_whom_it_is_sealed_to_and_by_nobody_else(site: Site) -> None:
    newcomer, recipient = authority.new_identity()
    reader = site.reader

    def opens(identity: str) -> bool:
        try:
            return b"PRIVATE KEY" in authority.unseal(trust.standing(reader).box, identity)
        except ConfigError:
            return False

    async def seal(**how: tuple[str, ...]) -> bool:
        async with connect(site.home.ledger_socket) as ledger:
            return await trust.seal_to(ledger, reader, site.home, actor="test", **how)  # type: ignore[arg-type]

    own = site.home.member_age.read_text()
    assert not opens(newcomer)
    assert asyncio.run(seal(add=(recipient,)))
    assert (opens(newcomer), opens(own), opens(site.recovery)) == (True, True, True)
    assert not asyncio.run(seal()), "what is sealed to somebody who is still joining was sealed anew without"
    assert asyncio.run(seal(drop=(recipient,)))
    assert (opens(newcomer), opens(own), opens(site.recovery)) == (False, True, True)
    with pytest.raises(ConfigError, match="recipient"):
        asyncio.run(seal(add=("age1nonsense",)))
    reader.close()


# --- a wrong control plane --------------------------------------------------------------------------------------------


@contextmanager
def fake_control_plane(folder: Path, shown: Callable[[str], str]) -> Iterator[tuple[int, list[bytes]]]:
    """A TLS server that shows what *shown* makes of its own authority, and writes down every byte that it is told."""
    certificate, key = another_authority(folder)
    mine = request.new_key()
    signed = authority.sign(
        request.make_request(mine),
        certificate=certificate,
        key=key,
        uri="spiffe://x/member/m1",
        now=time.time(),
        server=True,
    )
    (folder / "fake.key").write_bytes(mine)
    (folder / "fake.crt").write_text(signed.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "fake.crt", folder / "fake.key")
    body = msgspec.json.encode(api.Authority(certificate=shown(certificate), cluster="c"))
    answer = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    )
    told: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            plain.settimeout(5.0)
            try:
                with context.wrap_socket(plain, server_side=True) as link:
                    link.settimeout(0.5)
                    link.sendall(answer + body)
                    while heard := link.recv(65536):
                        told.append(heard)
            except OSError:
                plain.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1], told
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


@pytest.mark.parametrize("lies", ["its own", "ours", "ours, and then its own"])
def test_a_wrong_control_plane_is_not_told_one_byte_of_the_secret(site: Site, tmp_path: Path, lies: str) -> None:
    made = site.token("user", "ana", role="read")
    shown = {"its own": lambda own: own, "ours": lambda own: site.ca}.get(lies, lambda own: site.ca + own)
    with fake_control_plane(tmp_path, shown) as (port, told):
        done = subprocess.run(
            [SLUM, "context", "add", "prod", f"https://127.0.0.1:{port}", "--token-file", "-", "--timeout", "1s"],
            input=made.token,
            env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0, done
    heard = b"".join(told)
    assert b"GET /v1/ca" in heard
    assert b"/v1/join" not in heard
    secret = secret_of(made)
    assert not any(secret[at : at + 6].encode() in heard for at in range(len(secret) - 5))
    assert secret not in done.stdout + done.stderr
    reader = site.reader
    assert reader.token(tokens.hash_of(secret)).key_hash == ""  # type: ignore[union-attr]
    reader.close()


# --- revoking and renewing --------------------------------------------------------------------------------------------


def test_revoking_ends_what_is_open_within_a_second(site: Site) -> None:
    holder = site.holder("user", "rita", role="admin")
    with site.http(holder) as http, site.local() as admin:
        with http.stream("GET", "/v1/events", headers={"accept": "text/event-stream"}) as events:
            assert events.status_code == 200
            lines = events.iter_lines()
            next(lines)
            answer = admin.post("/v1/revoke", json={"subject": "user/rita", "why": "lost laptop"})
            assert msgspec.json.decode(answer.content, type=api.Revoked).certificates == 1
            before = time.monotonic()
            for _ in lines:
                assert time.monotonic() - before < 5.0, "the stream goes on"
        assert http.get("/v1/status").status_code == 401
    with site.http(holder) as http:
        answer = http.get("/v1/status")
        assert problem(answer).message == "the certificate was revoked"
    assert renewal(site, holder).status_code == 403


def test_a_removed_user_loses_open_tokens_too(site: Site) -> None:
    waiting = site.token("user", "otto", role="admin")
    site.holder("user", "otto", role="read")
    with site.local() as http:
        assert http.delete("/v1/users/otto").status_code == 200
        assert http.delete("/v1/users/otto").status_code == 404
        users = msgspec.json.decode(http.get("/v1/users").content, type=list[api.UserView])
    assert [one.certificates[0].state for one in users if one.name == "otto"] == ["revoked"]
    assert site.join(secret_of(waiting), request.new_key()).status_code == 403


def renewal(site: Site, holder: Holder, key: bytes | None = None, certificate: str | None = None) -> httpx.Response:
    asked = api.RenewRequest(
        certificate=certificate or holder.certificate.read_text(),
        csr=request.make_request(key or holder.key.read_bytes()),
    )
    with site.http() as http:
        return http.post("/v1/renew", content=msgspec.json.encode(asked))


def test_an_expired_certificate_does_nothing_but_renew(site: Site) -> None:
    expired = site.aged(site.holder("user", "vera", role="read"), days=100)
    with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
        with site.http(expired) as http:
            http.get("/v1/status")
    answer = renewal(site, expired)
    assert answer.status_code == 200, answer.text
    renewed = msgspec.json.decode(answer.content, type=api.JoinAnswer)
    assert (renewed.subject, renewed.role) == ("user/vera", "read")
    with site.http(site.keep(expired.key.read_bytes(), renewed.certificate)) as http:
        assert http.get("/v1/status").status_code == 200
        assert http.get("/v1/tokens").status_code == 403, "a renewal gave more than there was"


def test_a_renewal_needs_the_key_and_a_certificate_of_ours(site: Site, tmp_path: Path) -> None:
    holder = site.holder("user", "wim", role="read")
    assert renewal(site, holder, key=request.new_key()).status_code == 403
    certificate, key = another_authority(tmp_path)
    forged = authority.sign(
        request.make_request(holder.key.read_bytes()),
        certificate=certificate,
        key=key,
        uri=authority.read_certificate(holder.certificate.read_text(), site.ca).uri,
        now=time.time(),
    )
    assert renewal(site, holder, certificate=forged.certificate).status_code == 403
    assert renewal(site, holder, certificate="nonsense").status_code == 400
    assert renewal(site, holder, certificate=site.ca).status_code in (400, 403)
    member = site.keep(site.home.front_key.read_bytes(), site.home.front_certificate.read_text())
    assert renewal(site, member).status_code == 403, "a member's certificate is its own affair"


@pytest.mark.parametrize("ahead_days", [-100, 365])
def test_the_front_renews_its_own_certificate_also_when_it_has_expired_or_came_of_a_wrong_clock(
    site: Site, ahead_days: int
) -> None:
    reader = site.reader
    row = trust.standing(reader)
    key = site.home.front_key.read_bytes()
    old = authority.sign(
        request.make_request(key),
        certificate=row.certificate,
        key=authority.unseal(row.box, site.home.member_age.read_text()),
        uri=authority.uri_of(reader.cluster().cluster_id, "member/m1"),
        now=time.time() + ahead_days * 86_400,
        server=True,
    )
    trust.write(site.home.front_certificate, old.certificate.encode())

    async def certified() -> bool:
        async with connect(site.home.ledger_socket) as ledger:
            made = await trust.certify(ledger, reader, site.home, "m1")
            return made and not await trust.certify(ledger, reader, site.home, "m1")

    assert asyncio.run(certified())
    reader.close()
    shown = authority.read_certificate(site.home.front_certificate.read_text(), site.ca)
    assert 80 * 86_400 < shown.not_after - time.time() < 91 * 86_400


# --- nothing leaks ----------------------------------------------------------------------------------------------------


def test_secrets_appear_nowhere(site: Site) -> None:
    """Canaries: a used and an unused token, the recovery key, the authority's key, a user's key."""
    reader = site.reader
    row = trust.standing(reader)
    reader.close()
    box_key = authority.unseal(row.box, site.home.member_age.read_text()).decode()
    used, unused = site.token("user", "kim", role="read"), site.token("user", "lea", role="read")
    user_key = request.new_key()
    assert site.join(secret_of(used), user_key).status_code == 200
    for broken in ({"secret": secret_of(unused)}, {"secret": [secret_of(unused)], "csr": 1}):
        with site.http() as http:
            answer = http.post("/v1/join", json=broken)
            assert answer.status_code == 400
            assert secret_of(unused) not in answer.text
    assert site.join(secret_of(used), request.new_key()).status_code == 403
    middle = [line for line in box_key.splitlines() if not line.startswith("-")]
    canaries = [secret_of(used), secret_of(unused), site.recovery, middle[0], user_key.decode().splitlines()[1]]
    for path in (path for folder in (site.home.data, site.home.run) for path in folder.rglob("*")):
        if path.is_file() and path.name not in ("ballast",):
            data = path.read_bytes()
            assert not [canary for canary in canaries if canary.encode() in data], path
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = status.read_bytes()
        except OSError:
            continue
        assert not [canary for canary in canaries if canary.encode() in argv], argv
    with site.local() as http:
        said = http.get("/v1/events?limit=10000").text + http.get("/v1/tokens").text + http.get("/v1/users").text
    assert not [canary for canary in canaries if canary in said]
    assert secret_of(used) not in repr(used)
    assert secret_of(used) not in repr(api.JoinRequest(secret=secret_of(used), csr=""))


def test_files_with_keys_are_nobody_elses(site: Site) -> None:
    state = [site.home.member_age, site.home.front_key]
    assert [path.stat().st_mode & 0o777 for path in state] == [0o600, 0o600]
    copies = site.home.front / "front.key"
    assert copies.stat().st_mode & 0o007 == 0
    assert site.home.front_run.stat().st_mode & 0o007 == 0


# --- trying too often -------------------------------------------------------------------------------------------------


def test_attempts_are_bounded_for_each_source_and_for_all() -> None:
    attempts = Attempts()
    assert [attempts.take("192.0.2.1", 0.0) for _ in range(int(AT_ONCE) + 1)][-2:] == [True, False]
    assert attempts.take("192.0.2.2", 0.0)
    assert attempts.take("192.0.2.1", 1.0)
    taken = sum(attempts.take(f"10.0.{n // 256}.{n % 256}", 1.0) for n in range(5000))
    assert taken < 500
    assert len(attempts._by_source) <= 2000
    assert attempts.take("198.51.100.7", 60.0)


def test_an_ipv6_source_is_a_network() -> None:
    assert source_of("2001:db8:1:2:3:4:5:6") == source_of("2001:db8:1:2::9") != source_of("2001:db8:1:3::9")
    assert source_of("::ffff:192.0.2.1") == source_of("192.0.2.1")
    assert source_of("") == source_of("nonsense") == "unknown"


def test_who_tries_too_often_is_told_to_wait_and_others_are_not(site: Site) -> None:
    asked = msgspec.json.encode(api.JoinRequest(secret="a" * 32, csr="x"))
    with site.http(address="127.0.0.9") as http:
        last = [http.post("/v1/join", content=asked).status_code for _ in range(int(AT_ONCE) + 30)][-1]
        answer = http.post("/v1/renew", content=asked)
    assert last == 429
    assert answer.status_code in (400, 429)
    assert site.join("a" * 32, request.new_key()).status_code == 403
