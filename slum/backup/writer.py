"""One claim's life: take or resume a prefix, mirror what the ledger commits, send it, move HEAD; stop when superseded.

Order of a step: apply to the mirror, send new bundles, let Litestream send and say so, then HEAD by compare-and-swap. So
what HEAD names is always there whole. A claim is resumed only by whoever holds its token, and whose mirror still is a
prefix of the ledger; else a new one is made from a fresh copy. Everything blocks; one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from slum import __version__
from slum.backup import bundles, claims, litestream, manifest
from slum.backup.config import Keys, Settings
from slum.backup.litestream import Child, LitestreamFailed
from slum.backup.manifest import Head, Verified
from slum.backup.mirror import Feed, Mirror, backlog_bytes
from slum.backup.store import Store, Taken, Tell, probe
from slum.errors import SlumError
from slum.ledger import follow, schema
from slum.ledger.schema import Position
from slum.paths import Home

SYNC_S = 10.0
"""Litestream goes on by itself after it; only then is it known what there is."""
SYNC_BYTES_S = 256 << 10
"""The slowest line that a first upload is waited for."""
START_S = 20.0
ROWS_SHARE = 0.05
"""At most this share of the time goes into hashing all rows."""
TIDY_S = 3600.0
Note = Callable[..., Any]


class Superseded(SlumError):
    """Another claim is in force: this one is over."""


class Overfull(SlumError):
    """The store was away for so long that what waits for it outgrew its bound."""


class Writer:
    """A claim in force. Make one with opened()."""

    def __init__(
        self,
        home: Home,
        settings: Settings,
        keys: Keys,
        store: Store,
        claim: str,
        mirror: Mirror,
        lock: int,
        tell: Tell = lambda: None,
    ) -> None:
        self._home = home
        self._tell = tell
        self._settings = settings
        self._store = store
        self._mirror = mirror
        self._lock = lock
        self._feed = Feed(home.state)
        self._folder = home.backup
        self.claim = claim
        self.head: Head | None = None
        """The HEAD that this claim moved last, or the one of before."""
        self._tag = ""
        self._sent_blobs: set[str] = set()
        self._rows: tuple[str, int] = ("", -1)
        self._rows_cost_s = 0.0
        self._rows_at = 0.0
        self._tidied_at = 0.0
        self._first: tuple[int, float] | None = None
        self.verified: Verified | None = None
        self._control = home.private / "backup.sock"
        self._document = litestream.configuration(
            settings, litestream.replica(settings, keys, claim), mirror.path, self._control
        )
        self._child = Child(self._control, self._document, lock)
        self._is_doubtful = False
        """Litestream failed to send, and nobody knows whether that is its own trouble or the store's."""

    @property
    def child_pid(self) -> int:
        return self._child.pid

    @property
    def runs(self) -> bool:
        return self._child.runs

    @property
    def seq(self) -> int:
        """All up to here is in the store."""
        return self.head.seq if self.head is not None and self.head.claim == self.claim else -1

    @property
    def ledger_seq(self) -> int:
        return self._feed.seq

    @property
    def backlog_bytes(self) -> int:
        return backlog_bytes(self._mirror.path)

    def start(self) -> None:
        """Wait until Litestream answers, and make HEAD ours."""
        self._wait_for_child()
        self._read_head()
        self.step()

    def step(self) -> bool:
        """Mirror, send and name what is new; True when there is more at once. Raises what stands in the way."""
        applied = self.mirror()
        if self._is_doubtful or not self._child.runs:
            # Its own patience with a store grows to minutes; a new one begins at once, as soon as the store answers.
            self._store.get(manifest.HEAD)
            self._restart_child()
            self._is_doubtful = False
        if self.seq < self._mirror.position.seq or self._has_more_to_say():
            self._send()
        self._tidy()
        return applied

    def mirror(self) -> bool:
        """Only mirror what is new; True when there is more at once. Overfull when too much waits for the store."""
        applied = self._apply()
        if self.backlog_bytes > self._settings.backlog_mb << 20:
            raise Overfull(f"more than {self._settings.backlog_mb} MiB wait for the store")
        return applied

    def _restart_child(self) -> None:
        self._child.kill()
        self._child = Child(self._control, self._document, self._lock)
        self._wait_for_child()

    def _wait_for_child(self) -> None:
        end = time.monotonic() + START_S
        while not self._child.listens:
            if not self._child.runs or time.monotonic() > end:
                raise LitestreamFailed("litestream does not start", hint="its words are in the log of the backup")
            self._tell()
            time.sleep(0.01)

    def close(self) -> None:
        self._child.stop()
        self._feed.close()
        self._mirror.close()

    def _apply(self) -> bool:
        """Apply a bounded number of entries; True when it was not all."""
        end = time.monotonic() + self._settings.interval_ms / 1000
        while batch := self._feed.next(self._mirror.position):
            self._tell()
            done = 0
            while done < len(batch):
                taken = self._mirror.apply(batch[done:], time.time())
                done += taken
                if self._mirror.position.applied == 0:
                    # A Seal: what may lie behind it in the journal never counts.
                    break
            if time.monotonic() > end:
                return True
        return False

    def _has_more_to_say(self) -> bool:
        head = self.head
        if head is None or head.claim != self.claim:
            return True
        return head.verified != self.verified or (head.rows_seq != head.seq and self._may_hash())

    def _may_hash(self) -> bool:
        return time.monotonic() - self._rows_at >= self._rows_cost_s / ROWS_SHARE

    def _send(self) -> None:
        named = self._mirror.blobs_named() - self._sent_blobs
        if named:
            there, _missing = bundles.send(self._store, self._home.blobs, named)
            self._sent_blobs |= there
        at = self._mirror.position
        first_s = self._mirror.path.stat().st_size / SYNC_BYTES_S if self.seq < 0 else 0.0
        # Alarms are looked at in between.
        try:
            synced = self._child.sync(first_s + max(2.0, min(SYNC_S, self._settings.alarm / 2)), self._tell)
        except LitestreamFailed:
            self._is_doubtful = True
            raise
        if synced.replicated_txid < synced.txid:
            raise LitestreamFailed(f"litestream sent transaction {synced.replicated_txid} of {synced.txid}")
        if self._may_hash():
            began = time.monotonic()
            self._rows = (self._mirror.row_hash(self._tell), at.seq)
            self._rows_at = time.monotonic()
            self._rows_cost_s = self._rows_at - began
        self._move_head(at, synced.txid)

    def _move_head(self, at: Position, txid: int) -> None:
        """Make HEAD name *at*; Superseded when it is a later claim's by now."""
        while True:
            if self.head is not None and self.head.claim != self.claim and self.head.seq > at.seq:
                # The claimant of before is still at work and further on; the next step mirrors more.
                return
            data = manifest.encode(head := self._next_head(at, txid))
            try:
                self._tag = (
                    self._store.replace(manifest.HEAD, data, self._tag)
                    if self._tag
                    else self._store.create(manifest.HEAD, data)
                )
            except Taken:
                was = self._tag
                self._read_head(at)
                if self._tag == was:
                    raise
                continue
            self.head = head
            return

    def _next_head(self, at: Position, txid: int) -> Head:
        now = time.time()
        if self._first is None:
            self._first = (at.seq, now)
        was = self.head
        ours = was is not None and was.claim == self.claim
        keep_s = self._settings.keep_days * 86400.0
        former = manifest.kept(was.former, now, keep_s) if ours and was else manifest.former_of(was, now, keep_s)
        return Head(
            format=manifest.FORMAT,
            cluster=at.cluster_id,
            generation=at.generation,
            lineage=at.lineage,
            claim=self.claim,
            member=at.leader.partition("/")[0],
            schema=schema.SCHEMA,
            version=__version__,
            seq=at.seq,
            chain=at.chain,
            revision=at.revision,
            at=now,
            txid=txid,
            bytes=self._mirror.path.stat().st_size,
            rows=self._rows[0],
            rows_seq=self._rows[1],
            first_seq=was.first_seq if ours and was else self._first[0],
            first_at=was.first_at if ours and was else self._first[1],
            former=former,
            verified=self.verified,
        )

    def _read_head(self, at: Position | None = None) -> None:
        """Read HEAD; Superseded when it is a later claim's, NotAllowed when it is of another history."""
        found = self._store.get(manifest.HEAD)
        self.head, self._tag = (None, "") if found is None else (manifest.decode_head(found.data), found.tag)
        if self.head is None:
            return
        at = at or self._mirror.position
        is_ours = self.head.generation == at.generation and self.head.lineage == at.lineage
        if is_ours and manifest.number_of(self.head.claim) > manifest.number_of(self.claim):
            raise Superseded(f"claim {self.head.claim} of {self.head.member} has replaced {self.claim}")
        claims.allow(self.head, at)
        if self.verified is None:
            self.verified = self.head.verified

    def _tidy(self) -> None:
        """Once an hour forget what is older than the retention: entries, former claims, bundles."""
        if time.monotonic() - self._tidied_at < TIDY_S and self._tidied_at:
            return
        self._tidied_at = time.monotonic()
        head, now, keep_s = self.head, time.time(), self._settings.keep_days * 86400.0
        self._mirror.prune(now - keep_s)
        if head is None or head.claim != self.claim:
            return
        kept = {span.claim for span in head.spans}
        for listed in list(self._store.list(manifest.CLAIMS)):
            claim = listed.name.split("/")[1]
            # What is not named and young may be a claim that somebody is just making.
            if claim not in kept and now - listed.at > 86400.0:
                self._store.delete(listed.name)
        for digest in self._mirror.unnamed(bundles.in_store(self._store), now, keep_s):
            self._store.delete(f"{manifest.BLOBS}/{digest}")
            self._sent_blobs.discard(digest)


def opened(
    home: Home,
    settings: Settings,
    keys: Keys,
    store: Store,
    *,
    member: str,
    note: Note,
    lock: int,
    tell: Tell = lambda: None,
) -> Writer:
    """Return the writer of the claim that this member has or takes now, its HEAD moved; *tell* is called all the while.

    NotAllowed and Ignored say that a person must decide; StoreError and LitestreamFailed that it may be tried again.
    """
    folder = home.backup
    head_found = store.get(manifest.HEAD)
    head = None if head_found is None else manifest.decode_head(head_found.data)
    standing = follow.standing(home.state)
    claims.allow(head, standing)
    claims.check_follows(head, home.state, standing)
    probe(store)
    writer = None
    resumed = claims.resumed(folder, settings, store, head, standing)
    if resumed is None:
        mirror = Mirror.make(home.state, folder / claims.MIRROR, tell)
        try:
            claim = claims.claim_of_our_own(folder, settings, store, head, mirror.position, member)
        except BaseException:
            mirror.close()
            raise
        note("backup_claimed", claim=claim, seq=mirror.position.seq, bytes=mirror.path.stat().st_size)
    else:
        claim, mirror = resumed
        note("backup_resumed", claim=claim, seq=mirror.position.seq)
    try:
        writer = Writer(home, settings, keys, store, claim, mirror, lock, tell)
        writer.start()
    except BaseException:
        if writer is not None:
            writer.close()
        else:
            mirror.close()
        raise
    return writer
