"""The backup process: ``python -m slum.backup.process --data-dir D --run-dir R``, kept alive by the keeper.

Every member with a [backup] in its server.toml runs one; the one on the leader works, the others wait. It reads the
ledger's files, never writes them, and tells the ledger only what must be known: alarms and verifications, as events.
Killed at any moment, it goes on where it was: what is not in the store yet is in the ledger. Synchronous, one thread (a
verification has one of its own), because SQLite, Litestream and the store are waited for one after the other anyway.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from slum import log
from slum.alive import Alive
from slum.backup import claims, status, verify, writer
from slum.backup.config import Keys, Settings, keys_of, load, secrets_file
from slum.backup.litestream import LitestreamFailed
from slum.backup.manifest import Verified
from slum.backup.status import Status
from slum.backup.store import Store, StoreError, open_store
from slum.errors import ConfigError, SlumError
from slum.ledger import follow
from slum.ledger.client import connect
from slum.ledger.commands import LeaderInfo, NoteEvent, Proposal, Record, new_request_id
from slum.ledger.reader import Reader
from slum.ledger.refusal import Damaged
from slum.paths import Home, checked_home

PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Between attempts to reach a store that does not answer; the last one repeats."""
REFUSED_S = 15.0
LEADER_S = 1.0
LEADER_TIMEOUT_S = 2.0
TELL_S = 5.0
STATUS_S = 5.0
LOCK_S = 10.0
SLICE_S = 0.5
"""So long it waits at a stretch: it tells the keeper in between that it lives."""
SUBJECT = "cluster:backup"


class Backup:
    """The whole process: run() is its life."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._stopping = threading.Event()
        self._alive = Alive()
        self._settings: Settings | None = None
        self._loaded_from: tuple[float, ...] = ()
        self._keys = Keys("", "")
        self._store: Store | None = None
        self._writer: writer.Writer | None = None
        self._member = ""
        self._leads_until = 0.0
        self._attempts = 0
        self._not_before = 0.0
        self._trouble: SlumError | None = None
        self._behind_since = 0.0
        """Monotonic: since when something is committed and not in the store; 0 when nothing is."""
        self._is_alarmed = False
        self._told_of = ""
        self._verifying: threading.Thread | None = None
        self._verified: Verified | None = None
        self._status_at = 0.0
        self._status_said = ""

    def stop(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        self._stopping.set()

    def run(self) -> None:
        lock = claims.locked(self._home, LOCK_S)
        for left in self._home.backup.glob(f"{verify.PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        try:
            with asyncio.Runner() as runner:
                while not self._stopping.is_set():
                    self._alive.tell()
                    more = self._turn(runner, lock)
                    self._say()
                    if not more:
                        self._wait(self._pause())
        finally:
            self._close()
            os.close(lock)

    def _wait(self, pause_s: float) -> None:
        end = time.monotonic() + pause_s
        while (left := end - time.monotonic()) > 0 and not self._stopping.wait(min(left, SLICE_S)):
            self._alive.tell()

    def _pause(self) -> float:
        return (self._settings.interval_ms / 1000) if self._settings is not None and self._writer is not None else 0.25

    def _turn(self, runner: asyncio.Runner, lock: int) -> bool:
        """Do what is due; True when there is more to do at once."""
        try:
            self._load()
            if self._settings is None or self._store is None or not self._leads(runner):
                self._close()
                self._behind_since, self._trouble = 0.0, None
                return False
            return self._work(runner, self._settings, self._store, lock)
        except ConfigError as error:
            self._fail(error, REFUSED_S)
        except sqlite3.OperationalError as error:
            # Locked, full, or a disk that fails: what is in the mirror is judged when it is opened again.
            self._fail(SlumError(f"{self._home.backup}: {error}"), PAUSES_S[min(self._attempts, len(PAUSES_S) - 1)])
        except (follow.Gone, Damaged, writer.Overfull, sqlite3.Error) as error:
            # The mirror is of no use any more; what it is made from is.
            known = error if isinstance(error, SlumError) else SlumError(str(error))
            self._fail(known, PAUSES_S[0])
            claims.forget(self._home)
        except (SlumError, OSError) as error:
            known = error if isinstance(error, SlumError) else SlumError(str(error))
            self._fail(known, PAUSES_S[min(self._attempts, len(PAUSES_S) - 1)])
        self._watch_lag(runner)
        return False

    def _work(self, runner: asyncio.Runner, settings: Settings, store: Store, lock: int) -> bool:
        now = time.monotonic()
        if self._writer is None:
            if now < self._not_before:
                self._watch_lag(runner)
                return False
            self._behind_since = self._behind_since or now
            self._writer = writer.opened(
                self._home,
                settings,
                self._keys,
                store,
                member=self._member,
                note=_note,
                lock=lock,
                tell=self._alive.tell,
            )
            log.get().info("backup_started", claim=self._writer.claim, seq=self._writer.seq, url=settings.url)
        if self._verified is not None:
            self._writer.verified = self._verified
            self._tell_verified(runner, self._verified)
            self._verified = None
        if now < self._not_before:
            more = self._writer.mirror()
            self._watch_lag(runner)
            return more
        more = self._writer.step()
        self._trouble, self._attempts, self._told_of = None, 0, ""
        self._watch_lag(runner)
        self._verify_when_due(settings)
        return more

    def _fail(self, error: SlumError, pause_s: float) -> None:
        if str(error) != str(self._trouble):
            log.get().warning("backup_failed", error=str(error), hint=error.hint, kind=type(error).__name__)
        self._trouble = error
        self._attempts += 1
        self._not_before = time.monotonic() + pause_s
        # What concerns the store or Litestream is tried again with the claim in hand.
        if not isinstance(error, LitestreamFailed | StoreError):
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- what is configured, and whether it is ours to do ------------------------------------------------------------

    def _load(self) -> None:
        """Read the configuration when its files have changed."""
        files = (self._home.server_config, secrets_file(self._home))
        stamps = tuple(file.stat().st_mtime if file.exists() else 0.0 for file in files)
        if stamps == self._loaded_from:
            return
        self._close()
        self._settings = self._store = None
        self._not_before = 0.0
        self._settings = load(self._home)
        if self._settings is not None:
            self._keys = keys_of(self._settings, os.environ, secrets_file(self._home))
            self._store = open_store(self._settings, self._keys, self._alive.tell)
        self._loaded_from = stamps

    def _leads(self, runner: asyncio.Runner) -> bool:
        """Tell whether this member leads; asked once a second."""
        now = time.monotonic()
        if now >= self._leads_until:
            found = runner.run(_leader(self._home))
            self._member = found.member or ""
            if not found.is_self:
                self._leads_until, self._is_alarmed = 0.0, False
                return False
            if self._leads_until == 0.0:
                # Whoever led before may have raised it, or this process before it was killed.
                self._is_alarmed = _is_alarm_out(self._home)
            self._leads_until = now + LEADER_S
        return True

    # --- alarms ------------------------------------------------------------------------------------------------------

    def _watch_lag(self, runner: asyncio.Runner) -> None:
        """Notice since when something waits; beyond the bound it is an alarm, and so is its end."""
        now, there, settings = time.monotonic(), self._writer, self._settings
        why = str(self._trouble) if self._trouble is not None else "it is slower than what is written"
        if isinstance(self._trouble, ConfigError) and self._told_of != why:
            # Nothing will get better by itself: said at once, and once.
            self._told_of = why if self._tell(runner, "backup_refused", why) else ""
        if settings is None:
            return
        if there is not None and self._trouble is None and there.seq >= there.ledger_seq:
            self._behind_since = 0.0
            if self._is_alarmed:
                self._is_alarmed = not self._tell(runner, "backup_caught_up", f"all up to {there.seq} is in the store")
            return
        if self._behind_since == 0.0:
            self._behind_since = now
        is_refused = isinstance(self._trouble, ConfigError)
        if not is_refused and not self._is_alarmed and now - self._behind_since > settings.alarm:
            text = f"for {now - self._behind_since:.0f} s nothing committed has reached the store: {why}"
            self._is_alarmed = self._tell(runner, "backup_behind", text)

    def _tell_verified(self, runner: asyncio.Runner, found: Verified) -> None:
        if found.ok:
            text = f"restored sequence {found.seq} in {found.took_s:.1f} s"
            self._tell(runner, "backup_verified", f"{text}; {found.why}" if found.why else text)
        else:
            self._tell(runner, "backup_verify_failed", found.why)

    def _tell(self, runner: asyncio.Runner, kind: str, why: str) -> bool:
        """Commit an event; False when the ledger does not take it now."""
        (log.get().info if kind in CALM else log.get().warning)(kind, why=why)
        note = NoteEvent(kind=kind, subject=SUBJECT, at=time.time(), why=why)
        try:
            runner.run(_propose(self._home, note, self._member))
        except (SlumError, OSError, TimeoutError) as error:
            log.get().info("event_not_committed", kind=kind, error=str(error))
            return False
        return True

    # --- verification ------------------------------------------------------------------------------------------------

    def _verify_when_due(self, settings: Settings) -> None:
        if settings.verify_hours == 0 or self._writer is None or self._writer.seq < 0:
            return
        if self._verifying is not None:
            if not self._verifying.is_alive():
                self._verifying = None
            return
        last = self._writer.verified
        if last is not None and time.time() - last.at < settings.verify_hours * 3600:
            return
        # With a store of its own, that tells nobody that this process lives: its loop must.
        own = (open_store(settings, self._keys), settings)
        self._verifying = threading.Thread(target=self._verify, args=own, name="verify", daemon=True)
        self._verifying.start()

    def _verify(self, store: Store, settings: Settings) -> None:
        self._verified = verify.verified(store, settings, self._keys, self._home.backup)

    # --- what is shown -----------------------------------------------------------------------------------------------

    def _say(self) -> None:
        now, there = time.monotonic(), self._writer
        state, why, hint = "running", "", ""
        if self._trouble is not None:
            state = "refused" if isinstance(self._trouble, ConfigError) else "waiting"
            why, hint = str(self._trouble), self._trouble.hint
        elif there is None:
            state, why = "waiting", "no [backup] in server.toml" if self._settings is None else "another member leads"
        if self._is_alarmed and state != "refused":
            state = "behind"
        seq = there.seq if there is not None else -1
        said = f"{state} {why} {seq}"
        if said == self._status_said and now - self._status_at < STATUS_S:
            return
        self._status_said, self._status_at = said, now
        status.write(
            self._home,
            Status(
                state=state,
                why=why,
                hint=hint,
                url=self._settings.url if self._settings is not None else "",
                at=time.time(),
                pid=os.getpid(),
                child_pid=there.child_pid if there is not None else 0,
                ledger_seq=there.ledger_seq if there is not None else 0,
                seq=seq,
                lag_s=round(now - self._behind_since, 3) if self._behind_since else 0.0,
                backlog_bytes=there.backlog_bytes if there is not None else 0,
                head=there.head if there is not None else None,
            ),
        )


CALM = frozenset({"backup_caught_up", "backup_verified"})


def _is_alarm_out(home: Home) -> bool:
    """Tell whether the ledger's last word about the backup is that it is behind."""
    with closing(Reader(home.state)) as reader:
        last = {kind: reader.events(kind=kind, limit=1, newest=True) for kind in ("backup_behind", "backup_caught_up")}
    behind, over = (found[-1].number if found else 0 for found in last.values())
    return behind > over


async def _leader(home: Home) -> LeaderInfo:
    async with asyncio.timeout(LEADER_TIMEOUT_S), connect(home.ledger_socket) as ledger:
        return await ledger.leader()


async def _propose(home: Home, note: NoteEvent, member: str) -> None:
    async with asyncio.timeout(TELL_S), connect(home.ledger_socket) as ledger:
        seen = (await ledger.leader()).seq
        made = Proposal(
            command=Record(events=(note,)),
            request_id=new_request_id(seen),
            actor=f"backup@{member}",
        )
        await ledger.propose(made, deadline_s=TELL_S)


def _note(event: str, **fields: Any) -> None:
    log.get().info(event, **fields)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slum.backup.process", description="The backup of one member.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    given = parser.parse_args(argv)
    home = checked_home(given.data_dir, given.run_dir)
    os.umask(0o077)
    logger = log.start("backup")
    backup = Backup(home)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, backup.stop)
    try:
        backup.run()
    except SlumError as error:
        logger.error("backup_ended", error=str(error), hint=error.hint)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
