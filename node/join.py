"""Joining a fleet: this machine gets a key, a certificate for it, and word of where its members are.

The key and the request are made here. The token's first half names the authority: whoever cannot show it is told nothing.
Every step can be repeated: the key is on disk before the token is shown, and a token gives the same key the same answer
again. home.json is written last. Starts nothing; slum.node.service does.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Sequence

import msgspec

from slum import api
from slum.errors import ConfigError, QuorumLost, SlumError, Unreachable
from slum.frozen import Sparse
from slum.node import home as homes
from slum.node.front import Stranger, ask, authority_at
from slum.node.store import write_atomically
from slum.paths import Home
from slum.pki.authority import digest_of
from slum.pki.request import make_request, new_key
from slum.pki.tokens import Token, parse

ASK_S = 15.0
PAUSE_MIN_S, PAUSE_MAX_S = 0.5, 15.0


class Begun(Sparse):
    """join.json, while a join is under way: its key, and sha256 of its token."""

    token: str
    key: str


class Identity(Sparse):
    """identity.json. The agent reads *tenement* (its machine's name in the fleet) and *machine*."""

    tenement: str
    machine: str
    cluster: str
    key: str
    of: str = ""
    """The [tenement.X] that the machine is one of."""


def join(
    home: Home,
    *,
    urls: Sequence[str],
    machine: str,
    token: str,
    wait_s: float = 0.0,
    say: Callable[[str], None] = lambda text: None,
) -> bool:
    """Make this machine the node *machine* (what the token says when ""); False when this token has made it one already.

    Nobody answering, and a control plane that cannot commit, are tried again for *wait_s* seconds; *say* hears so. ConfigError
    for a token that is none, is used up, or is another machine's; Stranger when no URL leads to the token's fleet.
    """
    servers = tuple(dict.fromkeys(homes.checked_url(url) for url in urls))
    parsed = parse(token)
    of_token = homes.digest(token.strip())
    check_place(home)
    known, identity = homes.read_home(home), homes.read_identity(home)
    if known is not None and known.token == of_token and identity is not None:
        _check_name(machine, identity.tenement)
        if not set(servers) <= {*known.joined, *known.servers}:
            homes.write_home(home, msgspec.structs.replace(known, joined=servers))
        return False
    begun = _begin(home, of_token)
    request = api.JoinRequest(secret=parsed.secret, csr=make_request(begun.key.encode()), host=homes.host_name())
    answer = answered(servers, parsed, request, wait_s, say)
    if answer.kind != "node":
        raise ConfigError(
            f"this token is for a {answer.kind}, not for a node", hint="make one with `slum token new node MACHINE`"
        )
    _check_name(machine, answer.machine)
    _keep(home, begun, answer, servers)
    return True


def check_place(home: Home) -> None:
    """Return unless this data folder is a control plane's; ConfigError then."""
    if (home.state / "member.json").exists() or (home.state / "CURRENT").exists():
        raise ConfigError(
            f"{home.data} holds a control plane, and its machine is the fleet's already by a local operator",
            hint="nothing needs to join here; a node of another fleet takes folders of its own: --data-dir, --run-dir",
        )


def keep_answer(home: Home, answer: api.JoinAnswer, told: homes.HomeFile) -> homes.HomeFile:
    """Have the certificate of *answer*, and *told* with its dates, on disk; return that."""
    from cryptography import x509

    of = homes.files(home)
    parsed = x509.load_pem_x509_certificate(answer.certificate.encode())
    write_atomically(of.certificate, answer.certificate.encode(), sync=True)
    told = msgspec.structs.replace(
        told,
        not_before=parsed.not_valid_before_utc.timestamp(),
        not_after=parsed.not_valid_after_utc.timestamp(),
    )
    homes.write_home(home, told)
    return told


def _check_name(asked: str, given: str) -> None:
    if asked and asked != given:
        raise ConfigError(
            f"this token is for the machine {given!r}, not for {asked!r}",
            hint=f"make one with `slum token new node {asked}`",
        )


def _begin(home: Home, of_token: str) -> Begun:
    """Return the key for this token, on disk: the one of an attempt before, or a new one."""
    home.data.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
    home.agent.mkdir(mode=0o700, exist_ok=True)
    file = home.agent / "join.json"
    try:
        begun = msgspec.json.decode(file.read_bytes(), type=Begun)
    except (FileNotFoundError, msgspec.DecodeError):
        begun = None
    if begun is None or begun.token != of_token:
        begun = Begun(token=of_token, key=new_key().decode())
        write_atomically(file, msgspec.json.encode(begun), sync=True)
    return begun


def answered(
    servers: Sequence[str], token: Token, request: api.JoinRequest, wait_s: float, say: Callable[[str], None]
) -> api.JoinAnswer:
    """Return the answer of the first of *servers* that lets us in; see ``join`` for what is tried again and what raises."""
    end, pause_s = time.monotonic() + wait_s, PAUSE_MIN_S
    while True:
        whys: list[SlumError] = []
        for url in servers:
            try:
                return _ask(url, token, request)
            except (Unreachable, QuorumLost, Stranger) as error:
                whys.append(error)
        passing = [why for why in whys if not isinstance(why, Stranger)]
        if not passing or time.monotonic() + pause_s > end:
            raise (passing or whys)[0]
        say(f"{passing[0].message}; trying again")
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, PAUSE_MAX_S)


def _ask(url: str, token: Token, request: api.JoinRequest) -> api.JoinAnswer:
    """Ask *url* to let us in, once it has shown the token's authority: first the certificate, then by it the connection."""
    authority = _canonical(authority_at(url, timeout_s=ASK_S).certificate)
    if digest_of(authority) != token.authority:
        raise Stranger(
            f"{url} has another authority than the token's fleet; it was not told the token",
            hint="look at the address; a token is for one control plane alone",
        )
    tls = homes.trusting(authority)
    answer = ask(url, "POST", "/v1/join", kind=api.JoinAnswer, tls=tls, timeout_s=ASK_S, body=request)
    return msgspec.structs.replace(answer, ca=authority)


def _canonical(certificate: str) -> str:
    """Return the one certificate that *certificate* begins with.

    What stands after the padding of its base64 is not decoded, so it is not in the hash either: whoever could add a second
    authority there would be believed as well.
    """
    try:
        return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(certificate.strip() + "\n"))
    except ValueError as error:
        raise Stranger(f"what is shown as an authority is no certificate: {error}") from error


def _keep(home: Home, begun: Begun, answer: api.JoinAnswer, servers: tuple[str, ...]) -> None:
    of = homes.files(home)
    identity = Identity(
        tenement=answer.machine,
        machine=f"node:{answer.key}",
        cluster=answer.cluster,
        key=answer.key,
        of=answer.tenement,
    )
    of.home.unlink(missing_ok=True)
    write_atomically(of.key, begun.key.encode(), sync=True)
    write_atomically(of.authority, answer.ca.encode(), sync=True)
    write_atomically(home.identity, msgspec.json.encode(identity), sync=True)
    told = homes.HomeFile(
        cluster=answer.cluster,
        servers=tuple(homes.checked_url(url) for url in answer.servers) or servers,
        joined=servers,
        token=begun.token,
        fleet=answer.fleet,
    )
    keep_answer(home, answer, told)
    (home.agent / "join.json").unlink(missing_ok=True)
