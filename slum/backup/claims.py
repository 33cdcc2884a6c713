"""Claims: whose prefix of a store it is, on this machine and there; taken, resumed, forgotten, and refused.

A claim is made by one create in the store and remembered here with its random token; only who holds that goes on below it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from slum.backup import litestream, manifest
from slum.backup.config import Settings
from slum.backup.manifest import Claim, Head
from slum.backup.mirror import Feed, Mirror, remove
from slum.backup.store import Store, Taken
from slum.errors import ConfigError, SlumError
from slum.ledger import follow
from slum.ledger.refusal import Refusal
from slum.ledger.schema import Position
from slum.paths import Home

MIRROR, MINE = "mirror.db", "claim.json"
PUT_BACK = "if the disk of this control plane was put back to an earlier state, restore from what is there"


class Behind(SlumError):
    """This ledger has less than what is backed up there; that passes."""


class NotAllowed(ConfigError):
    """This ledger may not be backed up there; a person must decide."""


def forget(home: Home) -> None:
    """Remove the mirror and the right to go on below its prefix."""
    folder = home.backup
    (folder / MINE).unlink(missing_ok=True)
    remove(folder / MIRROR)


def locked(home: Home, wait_s: float) -> int:
    """Return a descriptor that holds the backup's lock, which a Litestream that still ends may keep for a moment."""
    folder = home.backup
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(descriptor)
                raise SlumError(f"{folder}: another backup process runs on it", hint="stop that one first") from None
            time.sleep(0.05)


class _Mine(msgspec.Struct):
    """What is remembered of the claim on this machine."""

    claim: str
    token: str
    url: str


def resumed(
    folder: Path, settings: Settings, store: Store, head: Head | None, standing: Position
) -> tuple[str, Mirror] | None:
    """Return the claim and mirror of before, when both still are in force; None, and nothing of them left, otherwise."""
    mirror = None
    with suppress(OSError, *manifest.NOT_JSON, Refusal, follow.Gone):
        mine = msgspec.json.decode((folder / MINE).read_bytes(), type=_Mine)
        found = store.get(f"{manifest.prefix_of(mine.claim)}/claim.json")
        claim = None if found is None else manifest.decode_claim(found.data)
        if (
            claim is not None
            and claim.token == mine.token
            and mine.url == settings.url
            and claim.generation == standing.generation
            and not _is_past(mine.claim, head)
        ):
            mirror = Mirror.open(folder / MIRROR)
            at = mirror.position
            feed = Feed(folder.parent / "state")
            try:
                feed.next(at)
            finally:
                feed.close()
            if head is None or head.claim != mine.claim or at.seq >= head.seq:
                return mine.claim, mirror
    if mirror is not None:
        mirror.close()
    (folder / MINE).unlink(missing_ok=True)
    remove(folder / MIRROR)
    return None


def _is_past(claim: str, head: Head | None) -> bool:
    """Tell whether *head* is at a later claim; one that HEAD has not come to yet may still move it."""
    if head is None:
        return False
    return manifest.order_of(head.claim) > manifest.order_of(claim)


def claim_of_our_own(
    folder: Path, settings: Settings, store: Store, head: Head | None, at: Position, member: str
) -> str:
    """Create a claim of our own and return its name."""
    token = secrets.token_hex(16)
    while True:
        names = {listed.name.split("/")[1] for listed in store.list(manifest.CLAIMS)}
        name = manifest.next_claim(head, at.generation, names)
        claim = Claim(
            format=manifest.FORMAT,
            cluster=at.cluster_id,
            generation=at.generation,
            member=member,
            token=token,
            at=time.time(),
            seq=at.seq,
        )
        try:
            store.create(f"{manifest.prefix_of(name)}/claim.json", manifest.encode(claim))
        except Taken:
            continue
        litestream.write_private(folder / MINE, {"claim": name, "token": token, "url": settings.url})
        return name


def allow(head: Head | None, at: Position) -> None:
    """Return if the ledger that stands *at* may write where *head* is; NotAllowed otherwise."""
    why = manifest.why_not(head, cluster=at.cluster_id, generation=at.generation, lineage=at.lineage)
    if why:
        hint = "give this cluster an address of its own in server.toml, or restore from what is there"
        raise NotAllowed(why, hint=hint)


def check_follows(head: Head | None, ledger: Path, at: Position) -> None:
    """Return if the ledger in folder *ledger*, which stands *at*, comes from what *head* names.

    Behind while it has not come so far, as it may not have after an election; NotAllowed when it came another way.
    """
    if head is None or head.generation != at.generation:
        return
    if head.seq > at.seq:
        raise Behind(f"sequence {head.seq} is backed up there, which this ledger has not come to", hint=PUT_BACK)
    chain = follow.chain_at(ledger, head.seq)
    if chain is not None and chain != head.chain:
        raise NotAllowed(f"what is backed up there at sequence {head.seq} is not what this ledger has", hint=PUT_BACK)
