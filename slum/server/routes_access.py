"""The API's routes about who may come in: making and removing tokens, listing users and certificates, revoking.

A token is said once, in the answer that makes it; the ledger has a hash. Every change is an event of its own.
"""

from __future__ import annotations

import re
import secrets
import time

from slum import api
from slum.errors import ConfigError
from slum.frozen import Frozen
from slum.ledger.access import KINDS, ROLES, machine_of
from slum.ledger.commands import AddToken, AnyCommand, Done, RemoveToken, Revoke, new_request_id
from slum.ledger.reader import CertificateRow, TokenRow
from slum.model import NAME_PATTERN
from slum.pki import authority, tokens
from slum.server import trust
from slum.server.control import Control, rejection
from slum.server.problems import Missing
from slum.server.route import Call
from slum.server.routes_join import living_key, servers

TTL_S_MIN, TTL_S_MAX = 1.0, 30 * 86_400.0
USER = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,30}[a-z0-9])?")
WHY_MAX = 200


class RemoveQuery(Frozen, forbid_unknown_fields=True):
    host: str = ""


async def post_tokens(call: Call) -> api.NewToken:
    """Make a join token."""
    asked: api.TokenRequest = call.body
    return await issue(
        call.control,
        kind=asked.kind,
        subject=asked.subject,
        role=asked.role,
        ttl_s=asked.ttl_s,
        actor=call.peer.actor(asked.host),
    )


async def issue(
    control: Control, *, kind: str, subject: str, role: str = "", ttl_s: float = 3600.0, actor: str
) -> api.NewToken:
    """Make a join token and return it, the only time that it is said. ConfigError when it could open nothing.

    *subject*: a user's name, a machine's name or key ("machine.incarnation"), a member's id or "". Repeated, it makes another.
    """
    row = trust.standing(control.view.reader)
    subject = _checked(control, kind, subject, role)
    if not TTL_S_MIN <= ttl_s <= TTL_S_MAX:
        raise ConfigError(f"a token holds from {TTL_S_MIN:g} s to 30 days, not {ttl_s:g} s")
    secret, name, ends = tokens.new_secret(), secrets.token_hex(4), time.time() + ttl_s
    command = AddToken(
        id=name, hash=tokens.hash_of(secret), kind=kind, subject=subject, role=role, expires_at=round(ends, 3)
    )
    await _commit(control, command, actor)
    mine = {f"https://{member.api}" for member in control.world().cluster.members if member.id == control.me}
    return api.NewToken(
        id=name,
        token=tokens.token_text(authority.digest_of(row.certificate), secret),
        kind=kind,
        subject=subject,
        expires_at=command.expires_at,
        # The one that answers is there: it is the first to name.
        servers=tuple(sorted(servers(control), key=lambda url: url not in mine)),
    )


async def get_tokens(call: Call) -> tuple[api.TokenView, ...]:
    now = time.time()
    return tuple(_token_view(row, now) for row in call.control.view.reader.tokens())


async def delete_token(call: Call) -> api.Revoked:
    """Remove a token; a certificate that it gave stays, see revoke."""
    command = RemoveToken(id=call.connection.path_params["id"])
    return api.Revoked(seq=(await _commit(call.control, command, call.peer.actor(call.query.host))).seq, certificates=0)


async def get_users(call: Call) -> tuple[api.UserView, ...]:
    now = time.time()
    by_name: dict[str, list[api.CertificateView]] = {}
    for row in call.control.view.reader.certificates():
        kind, _, name = row.subject.partition("/")
        if kind == "user":
            by_name.setdefault(name, []).append(_certificate_view(row, now))
    return tuple(
        api.UserView(
            name=name,
            role=next((one.role for one in reversed(found) if one.state == "valid"), ""),
            certificates=tuple(found),
        )
        for name, found in by_name.items()
    )


async def delete_user(call: Call) -> api.Revoked:
    """Revoke every certificate of a user, and the tokens made for it; open connections end within a second."""
    command = Revoke(subject=f"user/{call.connection.path_params['name']}", why="removed")
    return await _revoke(call, command, call.query.host)


async def get_certificates(call: Call) -> tuple[api.CertificateView, ...]:
    now = time.time()
    return tuple(_certificate_view(row, now) for row in call.control.view.reader.certificates())


async def post_revoke(call: Call) -> api.Revoked:
    """Revoke a certificate, or all of a subject; open connections end within a second."""
    asked: api.RevokeRequest = call.body
    if bool(asked.subject) == bool(asked.serial):
        raise ConfigError("revoke either a subject or a serial", hint='"user/ana", "node/workers-1", "member/m2"')
    command = Revoke(subject=asked.subject, serial=asked.serial.lower(), why=asked.why[:WHY_MAX])
    return await _revoke(call, command, asked.host)


async def _revoke(call: Call, command: Revoke, host: str) -> api.Revoked:
    done = await _commit(call.control, command, call.peer.actor(host))
    call.control.sessions.end_revoked(call.control.view)
    return api.Revoked(seq=done.seq, certificates=done.value or 0)


def _checked(control: Control, kind: str, subject: str, role: str) -> str:
    """Return the subject that a token is to be for; ConfigError or Missing when there can be none."""
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is none of {', '.join(KINDS)}")
    if kind == "user":
        if not USER.fullmatch(subject):
            raise ConfigError(f"{subject!r} is no user's name: small letters, digits, dots and dashes, at most 32")
        if role not in ROLES:
            raise ConfigError(f"{role!r} is no role: {' or '.join(ROLES)}")
        return subject
    if role:
        raise ConfigError(f"a {kind} has no role")
    if kind == "member":
        if subject and not re.fullmatch(NAME_PATTERN, subject):
            raise ConfigError(f"{subject!r} is no member's id: small letters, digits and dashes, at most 32")
        return subject
    machine = machine_of(subject) or subject
    key = living_key(control, machine)
    if not key or subject not in (machine, key):
        raise Missing(
            f"the fleet has no machine {subject!r}", hint="declare it and apply first; `slum status` lists the machines"
        )
    return key


async def _commit(control: Control, command: AnyCommand, actor: str) -> Done:
    result = await control.commit(command, new_request_id(control.view.reader.seq()), actor)
    if isinstance(result, Done):
        return result
    raise Missing(result.why) if result.code == "missing" else rejection(result)


def _token_view(row: TokenRow, now: float) -> api.TokenView:
    return api.TokenView(
        id=row.id,
        kind=row.kind,
        subject=row.subject,
        role=row.role,
        state="used" if row.key_hash else "expired" if row.expires_at < now else "open",
        made_at=row.made_at,
        made_by=row.made_by,
        expires_at=row.expires_at,
        used_at=row.used_at,
    )


def _certificate_view(row: CertificateRow, now: float) -> api.CertificateView:
    return api.CertificateView(
        serial=row.serial,
        subject=row.subject,
        role=row.role,
        state="revoked" if row.revoked_at else "expired" if row.not_after < now else "valid",
        made_at=row.made_at,
        not_after=row.not_after,
    )
