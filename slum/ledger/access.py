"""How tokens, certificates and the authority change state.db: who may join, who has, and who may not any more.

A token is known by the hash of its secret and is good for one key. Every certificate of the fleet is a row here; one that
is not, or is revoked, opens nothing, whoever signed it. So rows that nobody can use any more may be dropped, which happens
whenever one is added. Times are the header's. Runs inside state.apply's transaction; no secret ever comes here.
"""

from __future__ import annotations

from hashlib import sha256

from slum.ledger.commands import (
    AddToken,
    NoteCertificate,
    RemoveToken,
    Result,
    Revoke,
    SetAuthority,
    UseToken,
)
from slum.ledger.turn import Turn

KINDS = ("node", "member", "user")
ROLES = ("admin", "read")
TOKENS_MAX = 10_000
WORD_CHARS_MAX = 200
PEM_CHARS_MAX = 8192
A_KEY_MAX = 4
"""Certificates of one key that hold at the same time; a renewal beyond ends the oldest."""
KEPT_S = 7 * 86_400.0
"""How long a token is kept after it expired, so that its key gets its answer again and `slum token list` can tell."""
FORGOTTEN_S = 400 * 86_400.0
"""How long after its end a certificate can still be renewed."""


def set_authority(turn: Turn, command: SetAuthority) -> Result:
    """The first authority, or the same one sealed anew from the box that stands."""
    row = turn.db.execute("SELECT certificate, box FROM authority").fetchone()
    standing = "" if row is None else sha256(row[1]).hexdigest()
    if command.replaces != standing:
        return turn.rejected("conflict", "the authority's key was sealed anew by somebody else meanwhile")
    if row is not None and row[0] != command.certificate:
        return turn.rejected("invalid", "the fleet has another authority")
    if not command.box or len(command.box) > PEM_CHARS_MAX * 4 or len(command.certificate) > PEM_CHARS_MAX:
        return turn.rejected("invalid", "this is no authority")
    turn.db.execute(
        "INSERT OR REPLACE INTO authority VALUES (1, ?, ?, ?, ?)",
        (command.certificate, command.box, command.recovery, " ".join(sorted(command.recipients))),
    )
    kind = "authority_made" if row is None else "authority_sealed"
    after = {"sealed_to": sorted(command.recipients), "recovery": command.recovery}
    turn.events.add(kind, "cluster:authority", actor=turn.actor, after=after)
    return turn.done()


def add_token(turn: Turn, command: AddToken) -> Result:
    """Note a token; those that expired long ago go."""
    problem = _token_problem(command)
    if problem:
        return turn.rejected("invalid", problem)
    turn.db.execute("DELETE FROM tokens WHERE expires_at < ?", (turn.at - KEPT_S,))
    (count,) = turn.db.execute("SELECT count(*) FROM tokens").fetchone()
    if count >= TOKENS_MAX:
        return turn.rejected("invalid", f"there are {count} tokens; remove some with `slum token remove`")
    turn.db.execute(
        "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, 0, '', '', '')",
        (
            command.id,
            command.hash,
            command.kind,
            command.subject,
            command.role,
            float(command.expires_at),
            turn.at,
            turn.actor,
        ),
    )
    after = {"kind": command.kind, "for": command.subject, "role": command.role, "expires_at": command.expires_at}
    turn.events.add("token_added", f"token:{command.id}", actor=turn.actor, after=after)
    return turn.done()


def use_token(turn: Turn, command: UseToken) -> Result:
    """Bind the token to a key and note its certificate, once."""
    row = turn.db.execute(
        "SELECT kind, subject, role, expires_at, key_hash FROM tokens WHERE id = ?", (command.id,)
    ).fetchone()
    if row is None:
        return turn.rejected("missing", "no such token")
    kind, subject, role, expires_at, key_hash = row
    if key_hash == command.key_hash:
        return turn.done()
    if key_hash:
        return turn.rejected("invalid", "the token was used with another key")
    if turn.at > expires_at:
        return turn.rejected("invalid", "the token has expired")
    if not fits(kind, subject, command.subject) or not command.key_hash:
        return turn.rejected("invalid", "the token is for somebody else")
    if len(command.certificate) > PEM_CHARS_MAX or not _is_sound(command):
        return turn.rejected("invalid", "this is no certificate")
    turn.db.execute(
        "UPDATE tokens SET used_at = ?, key_hash = ?, serial = ?, certificate = ? WHERE id = ?",
        (turn.at, command.key_hash, command.serial, command.certificate, command.id),
    )
    turn.events.add(
        "token_used", f"token:{command.id}", actor=turn.actor, after={"by": command.subject, "serial": command.serial}
    )
    return _note(turn, command, role)


def remove_token(turn: Turn, command: RemoveToken) -> Result:
    if turn.db.execute("DELETE FROM tokens WHERE id = ?", (command.id,)).rowcount == 0:
        return turn.rejected("missing", f"there is no token {command.id}")
    turn.events.add("token_removed", f"token:{command.id}", actor=turn.actor)
    return turn.done()


def note_certificate(turn: Turn, command: NoteCertificate) -> Result:
    """Note a member's own certificate, or a renewal: for a subject that has one with this key which is not revoked."""
    rows = turn.db.execute(
        "SELECT role, revoked_at FROM certificates WHERE subject = ? AND key_hash = ?",
        (command.subject, command.key_hash),
    ).fetchall()
    is_first = not rows and command.subject.startswith("member/")
    if not is_first and (command.role, 0.0) not in rows:
        return turn.rejected("missing", f"{command.subject} has no certificate with this key that could be renewed")
    if not _is_sound(command):
        return turn.rejected("invalid", "this is no certificate")
    return _note(turn, command, command.role)


def revoke(turn: Turn, command: Revoke) -> Result:
    """Make certificates useless for ever, and unused tokens of the same subject with them."""
    values: tuple[str | int, ...]
    if command.serial:
        where, values = "serial = ?", (command.serial,)
    elif command.subject:
        where = "(subject = ? OR substr(subject, 1, ?) = ?)"
        values = (command.subject, len(command.subject) + 1, f"{command.subject}/")
    else:
        return turn.rejected("invalid", "neither a subject nor a serial was given")
    rows = turn.db.execute(
        f"SELECT serial, subject FROM certificates WHERE {where} AND revoked_at = 0 ORDER BY serial", values
    ).fetchall()
    tokens = _unused_tokens(turn, command.subject) if command.subject else []
    if not rows and not tokens:
        return turn.rejected("missing", f"{command.subject or command.serial} has no certificate and no token")
    for token in tokens:
        turn.db.execute("DELETE FROM tokens WHERE id = ?", (token,))
        turn.events.add("token_removed", f"token:{token}", actor=turn.actor, why=command.why)
    for serial, subject in rows:
        turn.db.execute("UPDATE certificates SET revoked_at = ? WHERE serial = ?", (turn.at, serial))
        turn.events.add(
            "certificate_revoked", event_subject(subject), actor=turn.actor, why=command.why, after={"serial": serial}
        )
    return turn.done(len(rows))


def fits(kind: str, subject: str, certificate: str) -> bool:
    """Tell whether a token of *kind* for *subject* allows a certificate of the subject *certificate*."""
    found, _, name = certificate.partition("/")
    if found != kind or not name or len(certificate) > WORD_CHARS_MAX:
        return False
    if kind == "node":
        return name == f"{machine_of(subject)}/{subject}"
    return name == subject or (kind == "member" and not subject and "/" not in name)


def machine_of(key: str) -> str:
    """Return the machine's name in a key "machine.incarnation"."""
    return key.rpartition(".")[0]


def event_subject(subject: str) -> str:
    """Return the subject of an event about certificate subject *subject*: "user:ana", "node:workers-1/workers-1.2"."""
    return subject.replace("/", ":", 1)


def _token_problem(command: AddToken) -> str:
    if command.kind not in KINDS:
        return f"{command.kind[:20]!r} is none of {', '.join(KINDS)}"
    if command.kind == "user" and (command.role not in ROLES or not command.subject):
        return f"a user has a name, and a role: {' or '.join(ROLES)}"
    if command.kind == "node" and not machine_of(command.subject):
        return "a node's token is for a machine's incarnation"
    if len(command.hash) != 32 or not command.id or len(command.id) > 32 or len(command.subject) > WORD_CHARS_MAX:
        return "this is no token"
    return ""


def _unused_tokens(turn: Turn, subject: str) -> list[str]:
    kind, _, name = subject.partition("/")
    last = name.rpartition("/")[2]
    rows = turn.db.execute("SELECT id, subject FROM tokens WHERE kind = ? AND key_hash = '' ORDER BY id", (kind,))
    return [token for token, given in rows if given == last or (kind == "node" and machine_of(given) == name)]


def _is_sound(command: UseToken | NoteCertificate) -> bool:
    words = (command.subject, command.serial)
    return all(0 < len(word) <= WORD_CHARS_MAX for word in words) and len(command.key_hash) == 64


def _note(turn: Turn, command: UseToken | NoteCertificate, role: str) -> Result:
    # Of each key the newest stays for long after it expired: a renewal is measured against it.
    turn.db.execute(
        "DELETE FROM certificates WHERE not_after < ? AND subject = ? AND key_hash = ? AND revoked_at = 0",
        (turn.at, command.subject, command.key_hash),
    )
    turn.db.execute("DELETE FROM certificates WHERE not_after < ?", (turn.at - FORGOTTEN_S,))
    turn.db.execute(
        "DELETE FROM certificates WHERE serial IN (SELECT serial FROM certificates WHERE subject = ? AND key_hash = ?"
        " AND revoked_at = 0 ORDER BY made_at DESC, serial LIMIT -1 OFFSET ?)",
        (command.subject, command.key_hash, A_KEY_MAX - 1),
    )
    turn.db.execute(
        "INSERT INTO certificates VALUES (?, ?, ?, ?, ?, ?, 0)",
        (command.serial, command.subject, role, command.key_hash, float(command.not_after), turn.at),
    )
    after = {"serial": command.serial, "role": role, "not_after": command.not_after}
    turn.events.add("certificate_noted", event_subject(command.subject), actor=turn.actor, after=after)
    return turn.done()
