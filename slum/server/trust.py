"""This member and the fleet's authority: founding it, opening its key to sign, sealing it anew, and the front's certificate.

Any member can sign, because the authority's key lies in the ledger sealed to each member's own age identity. What is
opened is used at once and kept nowhere. Inputs are a ledger to propose to, a Reader of state.db beside it (which shows a
proposal's effect as soon as it was answered), and a Home.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from slum.errors import ConfigError, SlumError
from slum.ledger import journal
from slum.ledger.commands import (
    AnyCommand,
    Done,
    NoteCertificate,
    Proposal,
    Rejected,
    Result,
    SetAuthority,
    new_request_id,
)
from slum.ledger.reader import AuthorityRow, Reader
from slum.node.home import RENEW_AT
from slum.paths import Home
from slum.pki import authority, request

PROPOSE_S = 10.0
ATTEMPTS = 5
NO_AUTHORITY = "this control plane has no authority yet: it is reachable from this machine only"


class Proposes(Protocol):
    """A Ledger or a Link."""

    async def propose(self, proposal: Proposal, *, deadline_s: float) -> Result: ...


def own_recipient(home: Home) -> str:
    """Return the recipient of this member's age identity, which is made if there is none."""
    try:
        return authority.recipient_of(home.member_age.read_text())
    except FileNotFoundError:
        identity, recipient = authority.new_identity()
        home.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write(home.member_age, f"{identity}\n".encode())
        return recipient


async def found(ledger: Proposes, reader: Reader, home: Home, *, actor: str) -> str:
    """Make the fleet's authority, sealed to us and to a new recovery key; return that key, which is said only now.

    Returns "" when there is an authority already. Files: member.age, ca.crt.
    """
    own = own_recipient(home)
    if reader.authority() is None:
        identity, recovery = authority.new_identity()
        made = authority.make(reader.cluster().cluster_id, time.time())
        box = authority.seal(made.key, {own, recovery})
        command = SetAuthority(certificate=made.certificate, box=box, recovery=recovery, recipients=(own,))
        result = await _propose(ledger, reader, command, actor)
        if isinstance(result, Done):
            write(home.authority_certificate, made.certificate.encode())
            return identity
        if result.code != "conflict":
            raise ConfigError(result.why)
    write(home.authority_certificate, standing(reader).certificate.encode())
    return ""


async def seal_to(
    ledger: Proposes,
    reader: Reader,
    home: Home,
    *,
    add: Iterable[str] = (),
    drop: Iterable[str] = (),
    recovery: str = "",
    actor: str,
) -> bool:
    """Seal the authority's key to the members of now and to *add*, not to *drop*, and to the recovery key (*recovery*: a new one).

    Returns whether that was anything new. Whoever kept an old box and its key still opens that one.
    """
    more, less = frozenset(add), frozenset(drop)
    for _ in range(ATTEMPTS):
        row = standing(reader)
        members = {member.recipient for member in reader.cluster().members if member.recipient}
        wanted = (members | more | set(row.recipients)) - less
        last = recovery or row.recovery
        if (wanted, last) == (set(row.recipients), row.recovery):
            return False
        command = SetAuthority(
            certificate=row.certificate,
            box=authority.reseal(row.box, _identity(home), wanted | {last}),
            recovery=last,
            recipients=tuple(sorted(wanted)),
            replaces=sha256(row.box).hexdigest(),
        )
        result = await _propose(ledger, reader, command, actor)
        if isinstance(result, Done):
            return True
        if result.code != "conflict":
            raise ConfigError(result.why)
    raise SlumError("the authority's key is being sealed anew all the time", hint="do it again")


def sign(
    reader: Reader, home: Home, csr: str, subject: str, *, now: float, days: float = authority.LEAF_DAYS
) -> authority.Signed:
    """Return a certificate of the fleet's authority for *subject* and the key of *csr*, from *now* on; noted nowhere yet."""
    row = standing(reader)
    return authority.sign(
        csr,
        certificate=row.certificate,
        key=authority.unseal(row.box, _identity(home)),
        uri=authority.uri_of(reader.cluster().cluster_id, subject),
        now=now,
        days=days,
        server=subject.startswith("member/"),
    )


def standing(reader: Reader) -> AuthorityRow:
    """Return the fleet's authority; ConfigError when it has none."""
    row = reader.authority()
    if row is None:
        raise ConfigError(NO_AUTHORITY, hint="`slum server init` opens it")
    return row


async def certify(ledger: Proposes, reader: Reader, home: Home, member: str, *, now: float | None = None) -> bool:
    """Make the front's key and certificate, or renew that after two thirds of its life; return whether it is a new one.

    *now* is unix seconds, by this machine's clock if not given.
    """
    row = standing(reader)
    now = time.time() if now is None else now
    if not _is_due(home, row.certificate, authority.uri_of(reader.cluster().cluster_id, f"member/{member}"), now):
        return False
    key = home.front_key.read_bytes() if home.front_key.exists() else request.new_key()
    write(home.front_key, key)
    signed = sign(reader, home, request.make_request(key), f"member/{member}", now=now)
    command = NoteCertificate(
        serial=signed.serial, subject=f"member/{member}", role="", key_hash=signed.key_hash, not_after=signed.not_after
    )
    result = await _propose(ledger, reader, command, f"slum@{member}")
    if isinstance(result, Rejected):
        raise ConfigError(f"this member's certificate was not accepted: {result.why}")
    write(home.authority_certificate, row.certificate.encode())
    write(home.front_certificate, signed.certificate.encode())
    return True


def write(path: Path, data: bytes) -> None:
    """Put *data* at *path*, 0600, whole or not at all, and durable."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    journal.sync_folder(path.parent)


def _identity(home: Home) -> str:
    try:
        return home.member_age.read_text()
    except FileNotFoundError:
        raise ConfigError(
            f"{home.member_age} is gone: this member cannot open the authority's key",
            hint="another member can sign meanwhile; join this one again",
        ) from None


def _is_due(home: Home, certificate: str, uri: str, now: float) -> bool:
    try:
        shown = authority.read_certificate(home.front_certificate.read_text(), certificate)
    except (FileNotFoundError, ConfigError):
        return True
    life_s = authority.LEAF_DAYS * 86_400
    left_s = shown.not_after - now
    # One that is not valid yet was made by a clock that was ahead.
    in_time = life_s * (1 - RENEW_AT) <= left_s <= life_s + authority.SKEW_S
    return not shown.is_ours or shown.uri != uri or not in_time or not home.front_key.exists()


async def _propose(ledger: Proposes, reader: Reader, command: AnyCommand, actor: str) -> Result:
    request_id = new_request_id(reader.seq())
    return await ledger.propose(Proposal(command=command, request_id=request_id, actor=actor), deadline_s=PROPOSE_S)
