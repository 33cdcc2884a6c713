"""Any point of a backup as a file: which claim holds it, Litestream's restore, and the entries in between replayed.

Litestream restores moments at which it sent something; every entry in between is in the mirror's own log. So a point is
made from the last such moment before it and the log of a later one, and its chain proves that it is the one. What cannot
be restored is said together with the newest that can. Reads a store and writes below one folder, nothing else.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from slum import __version__
from slum.backup import litestream, manifest, mirror
from slum.backup.config import Keys, Settings
from slum.backup.litestream import LitestreamFailed
from slum.backup.manifest import Head, Span
from slum.backup.store import Store
from slum.errors import ConfigError, SlumError, Unhealthy
from slum.frozen import Frozen
from slum.ledger import schema
from slum.ledger.refusal import Damaged, Refusal
from slum.ledger.schema import Position
from slum.ledger.state import State

STEPS_S = (2.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 86_400.0, 3 * 86_400.0, 10 * 86_400.0, 30 * 86_400.0)
ATTEMPTS = 24
Tell = Callable[[str], None]


class NoBackup(ConfigError):
    """There is nothing to restore, or not what was asked for."""


class Broken(Unhealthy):
    """The backup does not hold what its HEAD says; the message says what can be restored."""


class Point(Frozen):
    """A restored state, checked; *path* is a database with the mirror's own tables still in it."""

    path: Path
    position: Position
    at: float
    """The time of its last entry, by the leader's clock; that of HEAD when the log does not tell."""
    member: str
    """Who wrote it."""
    generation: int
    """The highest one that the backup knows of."""


def read_head(store: Store) -> Head:
    """Return HEAD; NoBackup when there is none, Broken when it cannot be read; both name the claims that are there."""
    found = store.get(manifest.HEAD)
    try:
        if found is not None:
            return manifest.decode_head(found.data)
    except manifest.NotReadable as error:
        raise _headless(store, error.message, Broken) from error
    raise _headless(store, f"there is no backup at this address: {manifest.HEAD} is not there", NoBackup)


def _headless(store: Store, why: str, kind: type[NoBackup | Broken]) -> SlumError:
    claims = sorted({listed.name.split("/")[1] for listed in store.list(manifest.CLAIMS)}, key=manifest.order_of)
    if not claims:
        return kind(why, hint="is this the right address? `slum backup status` shows the one in use")
    return kind(
        f"{why}; the newest of {len(claims)} claims is {claims[-1]}",
        hint=f"is this the right address? then `slum restore --claim {claims[-1]}` takes what is there",
    )


def restored(
    store: Store,
    settings: Settings,
    keys: Keys,
    folder: Path,
    *,
    seq: int | None = None,
    at: float | None = None,
    claim: str | None = None,
    tell: Tell = lambda _: None,
) -> Point:
    """Restore the newest point, or the one at *seq*, or the last one not after *at*, into *folder*, and check it.

    With *claim* it is the newest that can be had of that claim, whatever HEAD says. NoBackup when the point is not there,
    Broken when it should be.
    """
    if claim is not None:
        return _newest_of(store, settings, keys, folder, claim, tell)
    head = read_head(store)
    _check_readable(head)
    if seq is None and at is None:
        return _newest(store, settings, keys, folder, head, tell)
    span = manifest.span_for(head.spans, seq=seq, at=at)
    if span is None or (seq is not None and not span.first_seq <= seq):
        reach = f"from sequence {head.spans[0].first_seq} to {head.seq}"
        raise NoBackup(f"the backup does not hold this point; it reaches {reach}", hint="choose one in between")
    return _earlier(store, settings, keys, folder, head, span, seq, at, tell)


def _newest(store: Store, settings: Settings, keys: Keys, folder: Path, head: Head, tell: Tell) -> Point:
    span = head.span
    target = litestream.replica(settings, keys, span.claim)
    path = folder / "newest.db"
    tell(f"restoring claim {span.claim}")
    try:
        litestream.restore(target, path)
        position = check(path, head)
    except (LitestreamFailed, Refusal) as error:
        path.unlink(missing_ok=True)
        raise _broken(store, settings, keys, folder, head, span, error) from error
    if position.seq < span.last_seq:
        raise Broken(
            f"the store gives sequence {position.seq}, but {span.last_seq} had been sent: "
            f"{span.last_seq - position.seq} entries are lost",
            hint=f"take what there is with --seq {position.seq}",
        )
    return _point(path, position, head)


def _newest_of(store: Store, settings: Settings, keys: Keys, folder: Path, claim: str, tell: Tell) -> Point:
    """Return the newest that can be had of *claim*, which needs no HEAD."""
    if not manifest.is_claim(claim):
        raise NoBackup(f"{claim[:60]!r} is no claim", hint="they are called as in 1795345389476-000003")
    found = store.get(f"{manifest.prefix_of(claim)}/claim.json")
    by = None if found is None else manifest.decode_claim(found.data)
    path = folder / "newest.db"
    tell(f"restoring claim {claim}")
    try:
        _restore_what_is_left(litestream.replica(settings, keys, claim), path)
        position = check(path, None)
    except (LitestreamFailed, Refusal) as error:
        path.unlink(missing_ok=True)
        raise Broken(f"nothing can be restored of claim {claim}: {error}", hint="name another one") from error
    last = mirror.logged(path, seq=position.seq)
    return Point(
        path=path,
        position=position,
        at=last.at if last else by.at if by else 0.0,
        member=by.member if by else "",
        generation=position.generation,
    )


def _point(path: Path, position: Position, head: Head, at: float | None = None) -> Point:
    if at is None:
        found = mirror.logged(path, seq=position.seq)
        at = head.at if found is None else found.at
    return Point(path=path, position=position, at=at, member=head.member, generation=head.generation)


def _earlier(
    store: Store,
    settings: Settings,
    keys: Keys,
    folder: Path,
    head: Head,
    span: Span,
    seq: int | None,
    at: float | None,
    tell: Tell,
) -> Point:
    """Return the point at *seq* or *at* within *span*."""
    log, target = folder / "log.db", litestream.replica(settings, keys, span.claim)
    tell(f"restoring the log of claim {span.claim}")
    try:
        _restore_what_is_left(target, log)
        end = check(log, None)
    except (LitestreamFailed, Refusal) as error:
        log.unlink(missing_ok=True)
        raise _broken(store, settings, keys, folder, head, span, error) from error
    first = seq if seq is not None and seq <= end.seq else None
    if seq is not None and first is None:
        if seq <= span.last_seq:
            raise Broken(
                f"sequence {seq} had been sent, but the store gives no more than {end.seq}",
                hint=f"take what there is with --seq {end.seq}",
            )
        first = end.seq
    wanted = mirror.logged(log, seq=first) if first is not None else mirror.logged(log, at=at)
    if wanted is not None and wanted.seq == end.seq:
        return _point(log, end, head, wanted.at)
    path = folder / "point.db"
    for base in _bases(target, path, wanted.mirrored_at if wanted else span.first_at, tell):
        if wanted is None:
            # Before the first entry of the log: the claim's own beginning is as near as it gets.
            if first is None or base.seq == first:
                return _point(path, base, head, span.first_at)
        elif base.seq <= wanted.seq:
            try:
                position = mirror.replay(path, log, wanted.seq)
            except Refusal as error:
                raise _broken(store, settings, keys, folder, head, span, error) from error
            return _point(path, position, head, wanted.at)
        path.unlink()
    raise NoBackup(
        "the backup holds no state from before this point any more", hint="choose a later one: keep_days bounds it"
    )


def _bases(target: dict[str, Any], path: Path, before: float, tell: Tell) -> Iterator[Position]:
    """Yield states at *path* from ever longer before that moment, last the oldest that there is."""
    found = litestream.segments(target)
    oldest = min((segment.at for segment in found), default=before)
    for step_s in STEPS_S:
        if before - step_s < oldest:
            break
        with suppress(LitestreamFailed, Refusal):
            path.unlink(missing_ok=True)
            litestream.restore(target, path, at=before - step_s)
            tell(f"found a state from {step_s:g} s before")
            yield check(path, None)
    for segment in sorted({segment.last for segment in found})[:3]:
        with suppress(LitestreamFailed, Refusal):
            path.unlink(missing_ok=True)
            litestream.restore(target, path, txid=segment)
            yield check(path, None)


def _restore_what_is_left(target: dict[str, Any], path: Path) -> None:
    """Restore the newest state that can be; LitestreamFailed when none can."""
    try:
        litestream.restore(target, path)
        return
    except LitestreamFailed as error:
        failed = error
    lasts = sorted({segment.last for segment in litestream.segments(target)}, reverse=True)
    # The newest few one by one, then in ever larger steps: a gap makes all that follows it useless.
    tried = sorted({*lasts[:8], *(lasts[n] for n in _steps(len(lasts)))}, reverse=True)[:ATTEMPTS]
    for last in tried:
        try:
            litestream.restore(target, path, txid=last)
        except LitestreamFailed:
            continue
        return
    raise failed


def _steps(count: int) -> Iterator[int]:
    at = 8
    while at < count:
        yield at
        at = at * 3 // 2
    if count:
        yield count - 1


def _broken(
    store: Store, settings: Settings, keys: Keys, folder: Path, head: Head, span: Span, error: SlumError
) -> SlumError:
    """Return the error that says what is wrong, and what can be restored all the same."""
    if span == head.span and next(iter(store.list(manifest.prefix_of(span.claim))), None) is None:
        return _headless(store, f"{manifest.HEAD} names claim {span.claim}, of which there is nothing", Broken)
    for claim in (span, *(one for one in reversed(head.former) if one != span)):
        path = folder / "left.db"
        try:
            _restore_what_is_left(litestream.replica(settings, keys, claim.claim), path)
            left = check(path, None)
        except (SlumError, OSError):
            continue
        finally:
            path.unlink(missing_ok=True)
        lost = head.seq - left.seq
        return Broken(
            f"sequence {span.last_seq} cannot be restored: {error}; sequence {left.seq} can, {lost} entries would be lost",
            hint=f"take what there is with --seq {left.seq}",
        )
    return Broken(f"nothing can be restored from this backup: {error}", hint="look at what is left in the store")


def check(path: Path, head: Head | None) -> Position:
    """Check the database at *path* whole: SQLite's integrity, the ledger row, all events, the log's chain, and *head*.

    Refusal says what is wrong. Touches nothing but SQLite's own files beside it.
    """
    try:
        with closing(schema.connect(path)) as db:
            schema.check_version(db, "the backup")
            (verdict,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    except sqlite3.Error as error:
        raise Damaged(f"the backup's database cannot be read: {error}", hint="") from error
    if verdict != "ok":
        raise Damaged(f"the backup's database is damaged: {verdict}", hint="")
    state = State.open(path, pages=False)
    try:
        state.check_events()
        position = state.position
        rows = state.row_hash() if head is not None and head.rows_seq == position.seq else ""
    finally:
        state.close()
    _check_log(path, position)
    if head is not None:
        if (head.cluster, head.generation, head.lineage) != (
            position.cluster_id,
            position.generation,
            position.lineage,
        ):
            raise Damaged("what was restored is not of the history that HEAD names", hint="")
        chain = position.chain if head.seq == position.seq else _chain_at(path, head.seq)
        if head.seq <= position.seq and chain is not None and chain != head.chain:
            raise Damaged(f"the chain at sequence {head.seq} is not the one that HEAD names", hint="")
        if rows and rows != head.rows:
            raise Damaged(f"the rows at sequence {position.seq} are not those that HEAD names", hint="")
    return position


def _check_log(path: Path, position: Position) -> None:
    last = mirror.logged(path, seq=position.seq)
    if last is not None and last.chain != position.chain:
        raise Damaged("the log in the backup does not end where its state does", hint="")


def _chain_at(path: Path, seq: int) -> str | None:
    found = mirror.logged(path, seq=seq)
    return None if found is None else found.chain


def _check_readable(head: Head) -> None:
    if head.schema > schema.SCHEMA:
        raise ConfigError(
            f"the backup has schema {head.schema}, this slum {__version__} knows {schema.SCHEMA}",
            hint=f"install slum {head.version}, which wrote it",
        )
