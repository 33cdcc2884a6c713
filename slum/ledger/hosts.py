"""The keys of hosts with SSH: the first that was seen is pinned, by whichever member saw it, until somebody says forget.

A row without a key stands for a host that was forgotten: what members remember of it from before does not count. Runs
inside state.apply's transaction.
"""

from __future__ import annotations

import base64
import binascii
from hashlib import sha256

from slum.ledger.commands import ForgetHost, PinHost, Result
from slum.ledger.schema import HOSTS_PROTOCOL
from slum.ledger.turn import Turn

HOSTS_MAX = 20_000
HOST_CHARS_MAX = 300
KEY_CHARS_MAX = 8192
TOO_OLD = f"the keys of hosts are kept from protocol {HOSTS_PROTOCOL} on"


def pin_host(turn: Turn, command: PinHost) -> Result:
    """Believe this key from now on; the one that stands stays."""
    if turn.protocol < HOSTS_PROTOCOL:
        return turn.rejected("invalid", TOO_OLD)
    if not 0 < len(command.host) <= HOST_CHARS_MAX or not 0 < len(command.key) <= KEY_CHARS_MAX:
        return turn.rejected("invalid", "this is no host, or no key of one")
    shown = fingerprint(command.key)
    if not shown:
        return turn.rejected("invalid", "this is no public key")
    standing = _key_of(turn, command.host)
    if standing == command.key:
        return turn.done()
    if standing:
        return turn.rejected("conflict", f"{command.host} is known by the key {fingerprint(standing)}, not {shown}")
    (count,) = turn.db.execute("SELECT count(*) FROM hosts").fetchone()
    if standing is None and count >= HOSTS_MAX:
        return turn.rejected("invalid", f"the keys of {count} hosts are known; more are not kept")
    _write(turn, command.host, command.key)
    turn.events.add("host_pinned", f"host:{command.host}", actor=turn.actor, after={"fingerprint": shown})
    return turn.done()


def forget_host(turn: Turn, command: ForgetHost) -> Result:
    """Believe the next key that the host shows."""
    if turn.protocol < HOSTS_PROTOCOL:
        return turn.rejected("invalid", TOO_OLD)
    if not 0 < len(command.host) <= HOST_CHARS_MAX:
        return turn.rejected("invalid", "this is no host")
    standing = _key_of(turn, command.host)
    if standing == "":
        return turn.done()
    _write(turn, command.host, "")
    before = {"fingerprint": fingerprint(standing)} if standing else None
    turn.events.add("host_forgotten", f"host:{command.host}", actor=turn.actor, before=before)
    return turn.done()


def fingerprint(key: str) -> str:
    """Return "SHA256:..." of the public key "ssh-ed25519 AAAA...", as ssh-keygen shows it; "" when it is none."""
    kind, _, rest = key.partition(" ")
    try:
        blob = base64.b64decode(rest, validate=True)
    except (binascii.Error, ValueError):
        return ""
    name = kind.encode()
    # RFC 4253, 6.6: the blob begins with the name of its kind.
    if not name or blob[: 4 + len(name)] != len(name).to_bytes(4, "big") + name:
        return ""
    return f"SHA256:{base64.b64encode(sha256(blob).digest()).decode().rstrip('=')}"


def _key_of(turn: Turn, host: str) -> str | None:
    row = turn.db.execute("SELECT key FROM hosts WHERE host = ?", (host,)).fetchone()
    return None if row is None else str(row[0])


def _write(turn: Turn, host: str, key: str) -> None:
    turn.db.execute("INSERT OR REPLACE INTO hosts VALUES (?, ?, ?, ?)", (host, key, turn.at, turn.actor))
