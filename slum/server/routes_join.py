"""The API's open routes: the authority's certificate, joining with a token, renewing with a key that is known.

Whoever asks here is a stranger. What is wrong with a token or certificate is said to the log, with the address, and to the
stranger only that it opens nothing. A token's secret is hashed as soon as it is read, and kept, logged and passed on nowhere.
"""

from __future__ import annotations

import re
import time

from slum import api, log
from slum.errors import ConfigError
from slum.ledger.access import machine_of
from slum.ledger.commands import Done, NoteCertificate, UseToken, new_request_id
from slum.ledger.reader import CertificateRow, TokenRow
from slum.model import NAME_PATTERN
from slum.pki import authority, tokens
from slum.pki.request import key_hash
from slum.server import cluster, trust
from slum.server.control import Control
from slum.server.decide import key_of
from slum.server.guard import BEHIND_S
from slum.server.peer import HOST, Visitor
from slum.server.problems import Forbidden, TooMany
from slum.server.route import Call

SECRET_CHARS_MAX = 200
LIVING = frozenset({"creating", "created", "destroying"})
ASK_AGAIN = "make a new one where the control plane runs: `slum token new`"


async def get_ca(call: Call) -> api.Authority:
    """Anybody may know it; a joiner compares it with its token before it says a word."""
    reader = call.control.view.reader
    return api.Authority(certificate=trust.standing(reader).certificate, cluster=reader.cluster().cluster_id)


async def post_join(call: Call) -> api.JoinAnswer:
    """Give a certificate for a token: once, to the first key that comes with it; that key gets the same one again."""
    asked: api.JoinRequest = call.body
    control = call.control
    _count(call)
    trust.standing(control.view.reader)
    hashed = key_hash(authority.read_request(asked.csr))
    secret = tokens.hash_of(asked.secret[:SECRET_CHARS_MAX])
    row = await _token(control, secret)
    why = _why_not(row, hashed, time.time())
    if row is None or why:
        raise _refused(call, "token", row.id if row else "", why)
    subject = _subject(control, row, asked.member)
    if row.kind == "member" and asked.member is not None:
        await cluster.check_addition(control, cluster.row_of(asked.member))
        reader, actor = control.view.reader, f"slum@{control.me}"
        await trust.seal_to(control.link, reader, control.home, add=(asked.member.recipient,), actor=actor)
    if not row.key_hash:
        row = await _use(call, row, asked, subject, secret)
    used = control.view.reader.certificate(row.serial)
    if used is None or used.revoked_at:
        raise _refused(call, "token", row.id, "its certificate was revoked")
    if row.kind == "member" and asked.member is not None:
        control.adding.begin(cluster.row_of(asked.member))
    return _answer(control, used, row.certificate)


async def post_renew(call: Call) -> api.JoinAnswer:
    """Give a new certificate for one of ours, expired or not, to whoever shows that the key is there."""
    asked: api.RenewRequest = call.body
    control = call.control
    _count(call)
    reader = control.view.reader
    shown = authority.read_certificate(asked.certificate, trust.standing(reader).certificate)
    row = reader.certificate(shown.serial) if shown.is_ours else None
    why = _why_no_renewal(control, shown, row, key_hash(authority.read_request(asked.csr)))
    if row is None or why:
        raise _refused(call, "certificate", shown.serial, why)
    now = await cluster.time_of_members(control) or time.time()
    signed = trust.sign(reader, control.home, asked.csr, row.subject, now=now)
    command = NoteCertificate(
        serial=signed.serial,
        subject=row.subject,
        role=row.role,
        key_hash=signed.key_hash,
        not_after=signed.not_after,
    )
    result = await control.commit(
        command, new_request_id(control.view.reader.seq()), _actor(row.subject, asked.host, call)
    )
    noted = reader.certificate(signed.serial)
    if not isinstance(result, Done) or noted is None:
        raise _refused(call, "certificate", shown.serial, getattr(result, "why", "it is gone"))
    return _answer(control, noted, signed.certificate)


def servers(control: Control) -> tuple[str, ...]:
    """Return where the members' fronts are."""
    return tuple(f"https://{member.api}" for member in control.world().cluster.members if member.api)


def living_key(control: Control, machine: str) -> str:
    """Return the key of the newest incarnation of *machine*, "" when it is to be no more."""
    row = control.world().machines.get(machine)
    return key_of(machine, row.incarnation) if row is not None and row.state in LIVING else ""


def _count(call: Call) -> None:
    """Raise TooMany when this address, or all of them together, ask too often."""
    peer = call.peer
    if isinstance(peer, Visitor) and not call.control.attempts.take(peer.address, time.monotonic()):
        raise TooMany("too many attempts to join or renew", hint="wait some seconds and do it again")


async def _token(control: Control, secret: bytes) -> TokenRow | None:
    """Return the token; one that another member has just made may be on its way to our state."""
    seen, row = control.committed.count, control.view.reader.token(secret)
    if row is None:
        await control.committed.wait(seen, BEHIND_S)
        row = control.view.reader.token(secret)
    return row


def _why_not(row: TokenRow | None, hashed: str, now: float) -> str:
    if row is None:
        return "no such token"
    if row.key_hash:
        return "" if row.key_hash == hashed else "it was used with another key"
    return "it has expired" if row.expires_at < now else ""


def _subject(control: Control, row: TokenRow, offer: api.MemberOffer | None) -> str:
    """Return whose certificate this becomes; ConfigError when what the joiner says of itself does not fit."""
    if row.kind == "node":
        machine = machine_of(row.subject)
        if living_key(control, machine) != row.subject:
            raise ConfigError(
                f"the fleet has no machine {row.subject} any more", hint="`slum status` lists those it has"
            )
        return f"node/{machine}/{row.subject}"
    if row.kind == "user":
        return f"user/{row.subject}"
    if offer is None:
        raise ConfigError("this is a member's token", hint="`slum server join` uses it")
    if not re.fullmatch(NAME_PATTERN, offer.id) or row.subject not in ("", offer.id):
        raise ConfigError(f"the token is not for a member {offer.id[:40]!r}", hint=ASK_AGAIN)
    return f"member/{offer.id}"


async def _use(call: Call, row: TokenRow, asked: api.JoinRequest, subject: str, secret: bytes) -> TokenRow:
    """Sign, bind the token to the key, and return it as it stands then: another attempt may have been first."""
    control = call.control
    now = await cluster.time_of_members(control) or time.time()
    signed = trust.sign(control.view.reader, control.home, asked.csr, subject, now=now)
    command = UseToken(
        id=row.id,
        key_hash=signed.key_hash,
        subject=subject,
        serial=signed.serial,
        certificate=signed.certificate,
        not_after=signed.not_after,
    )
    result = await control.commit(command, new_request_id(control.view.reader.seq()), _actor(subject, asked.host, call))
    used = control.view.reader.token(secret)
    if not isinstance(result, Done) or used is None or used.key_hash != signed.key_hash:
        raise _refused(call, "token", row.id, getattr(result, "why", "it was used with another key"))
    log.get().info("joined", subject=subject, token=row.id, serial=used.serial, address=_address(call))
    return used


def _why_no_renewal(control: Control, shown: authority.Shown, row: CertificateRow | None, hashed: str) -> str:
    if not shown.is_ours:
        return "another authority signed it"
    if row is None:
        return "the ledger does not know it"
    if shown.uri != authority.uri_of(control.world().cluster.cluster_id, row.subject):
        return "it is for somebody else"
    if row.revoked_at:
        return "it was revoked"
    if hashed != shown.key_hash:
        return "the request is for another key"
    kind, name, *rest = row.subject.split("/")
    if kind == "node" and living_key(control, name) != rest[0]:
        return "its machine is no more"
    return "members renew by themselves" if kind == "member" else ""


def _answer(control: Control, row: CertificateRow, certificate: str) -> api.JoinAnswer:
    world = control.world()
    kind, name, *rest = row.subject.split("/")
    tenement = world.tenement_of(name) if kind == "node" else None
    members = world.cluster.members if kind == "member" else ()
    return api.JoinAnswer(
        kind=kind,
        subject=row.subject,
        cluster=world.cluster.cluster_id,
        certificate=certificate,
        ca=trust.standing(control.view.reader).certificate,
        not_after=row.not_after,
        servers=servers(control),
        role=row.role,
        machine=name if kind == "node" else "",
        key=rest[0] if kind == "node" else "",
        tenement=tenement.name if tenement else "",
        fleet=world.fleet.name if world.revision else "",
        members=tuple(
            api.MemberOffer(**{field: getattr(member, field) for field in api.MemberOffer.__struct_fields__})
            for member in members
        ),
    )


def _refused(call: Call, what: str, which: str, why: str) -> Forbidden:
    log.get().warning(f"{what}_refused", which=which, why=why, address=_address(call))
    if what == "token":
        return Forbidden("this token opens nothing here: it is unknown, was used, or has expired", hint=ASK_AGAIN)
    return Forbidden("this certificate cannot be renewed", hint="join again with a new token: `slum token new`")


def _actor(subject: str, host: str, call: Call) -> str:
    kind, name, *_ = subject.split("/")
    if kind == "user":
        return f"{name}@{host if HOST.fullmatch(host) else _address(call)}"
    return f"node/{name}" if kind == "node" else f"slum@{name}"


def _address(call: Call) -> str:
    return call.peer.address if isinstance(call.peer, Visitor) else "local"
