"""All that the agent knows, in memory: what is desired, what is observed, what is to be told. No I/O but the store.

``fold`` is the one way in which an Observed changes: what must outlive the agent is on disk when it returns, the instance
(and whatever waits for it) is decided on again, and its report is due. Must never start or signal anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from slum import log
from slum.model import Key, Service, Settings, Stamp, host_name
from slum.node import observed as seen_of
from slum.node.actions import PREPARED, Broken, Missing, Plan, Preparation, Want
from slum.node.observed import Observed, routed
from slum.node.reports import report_of
from slum.node.store import Store, observed_of
from slum.node.supervise import keys_of, plan, waits_for, wants_of
from slum.wire import Desired, InstanceReport, InstanceStats, Note, Report

NOTES_BURST = 40
NOTES_PER_S = 0.5
"""Starts and exits noted of one instance: a crash loop shall not drown what happens elsewhere."""
REPORTS_MAX = 500
FREQUENT = frozenset({"generation_started", "instance_exited"})


class Clock:
    """Unix seconds that never jump while the agent lives: the wall clock at its start, and time passed since."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        return time.monotonic() + self._offset


class Entry:
    """One instance. *health* is the last answer worth telling."""

    __slots__ = ("allowance", "allowed_at", "health", "report", "seen", "stats", "suppressed")

    def __init__(self, seen: Observed) -> None:
        self.seen = seen
        self.health = ""
        self.report: InstanceReport | None = None
        self.stats: InstanceStats | None = None
        self.allowance = float(NOTES_BURST)
        self.allowed_at = 0.0
        self.suppressed = 0


class Roster:
    """*note* is called with what people will ask about, *changed* after anything changed."""

    def __init__(self, store: Store, clock: Clock, note: Callable[[Note], None], changed: Callable[[], None]) -> None:
        self.desired: Desired | None = None
        self.refused = ""
        self.stamp = Stamp()
        """Of the newest config, also of a refused one."""
        self.wants: dict[Key, Want] = {}
        self.entries: dict[Key, Entry] = {}
        self.preparations: dict[str, Preparation] = {}
        self.dirty: set[Key] = set()
        self._store = store
        self._clock = clock
        self._note = note
        self._changed = changed
        self._ids: dict[str, list[Key]] = {}
        self._dependents: dict[str, set[Key]] = {}
        self._stale: set[Key] = set()
        self._gone: set[tuple[str, str]] = set()
        self._told: tuple[Stamp, str] | None = None
        self._trouble = ""

    @property
    def settings(self) -> Settings:
        return self.desired.settings if self.desired else Settings()

    # --- what comes in ------------------------------------------------------------------------------------------------
    def remember(self, *, rebooted: bool) -> int:
        """Take up what the store kept; return how many lines of it cannot be read."""
        memories, bad = self._store.memories()
        self._kept("", self._store.compact)
        kept = self._store.desired()
        policies = {service.name: service.restart for service in kept.services} if kept else {}
        for memory in memories:
            seen = observed_of(memory)
            if rebooted:
                seen = seen_of.rebooted(seen, policies.get(memory.key.service))
            self.entries[memory.key] = Entry(seen)
        return bad

    def desire(self, desired: Desired) -> None:
        """Make *desired* what the instances are compared with."""
        self.desired, self.stamp, self.refused = desired, desired.stamp, ""
        self.wants = wants_of(desired)
        self._ids = keys_of(self.wants)
        self._dependents = {}
        for key, want in self.wants.items():
            for name in want.service.depends_on:
                self._dependents.setdefault(name, set()).add(key)
        now = self._clock.now()
        for key, want in self.wants.items():
            entry = self.entries.get(key)
            if entry is None:
                entry = self.entries[key] = Entry(Observed(key=key))
            seen = seen_of.retargeted(entry.seen, want.target, now)
            if seen is not entry.seen:
                if isinstance(self.preparations.get(want.release), Broken):
                    self.preparations[want.release] = Missing()
                self.fold(seen)
        releases = {want.release: want.service for want in self.wants.values()}
        for entry in self.entries.values():
            if entry.seen.good is not None:
                releases.setdefault(entry.seen.good.release, entry.seen.good.service)
        self.preparations = {
            release: self.preparations.get(release, Missing())
            for release, service in releases.items()
            if needs_preparation(service)
        }
        self.dirty.update(self.entries)
        self._stale.update(self.entries)
        self._changed()

    def refuse(self, stamp: Stamp, why: str) -> None:
        """Remember that the newest config cannot be acted on; the one before it stays in force."""
        self.stamp, self.refused = stamp, why
        self._changed()

    def trouble(self, why: str) -> None:
        """Tell *why* the machine does not do all that is asked although it acts on it; "" when it does."""
        if self._trouble != why:
            self._trouble = why
            self._changed()

    def prepared(self, release: str, state: Preparation) -> None:
        """Note how far *release* is; every instance of it, now or as its fallback, is decided on again."""
        self.preparations[release] = state
        for key, entry in self.entries.items():
            want, good = self.wants.get(key), entry.seen.good
            if (want and want.release == release) or (good and good.release == release):
                self.touch(key)

    def fold(self, seen: Observed) -> None:
        """Replace what is known of one instance, on disk first where it must outlive the agent."""
        entry = self.entries.get(seen.key)
        if entry is None:
            entry = self.entries[seen.key] = Entry(seen)
        self._kept(str(seen.key), lambda: self._store.save(seen))
        entry.seen = seen
        self.touch(seen.key)

    def _kept(self, what: str, write: Callable[[], None]) -> None:
        """Do *write*. A full disk must not end supervision: what a next agent would miss is history."""
        try:
            write()
        except OSError as error:
            log.get().error("history_not_kept", key=what, why=str(error))

    def touch(self, key: Key) -> None:
        """Have *key*, and what waits for it, decided on and reported again."""
        self.dirty.add(key)
        self._stale.add(key)
        for dependent in self._dependents.get(key.service, ()):
            self.dirty.add(dependent)
            self._stale.add(dependent)
        if key not in self.wants:
            self.dirty.update(other for other in self.entries if other not in self.wants)
        self._changed()

    def forget(self, key: Key) -> None:
        self._kept(str(key), lambda: self._store.forget(key))
        self.entries.pop(key, None)
        self.dirty.discard(key)
        self._stale.discard(key)
        self._gone.add((key.service, key.id))
        self._changed()

    # --- questions ----------------------------------------------------------------------------------------------------
    def seen(self, key: Key) -> Observed:
        entry = self.entries.get(key)
        return entry.seen if entry else Observed(key=key)

    def _known(self, key: Key) -> Observed | None:
        entry = self.entries.get(key)
        return entry.seen if entry else None

    def plan(self) -> Plan:
        """Return what to do about everything that changed since the last call."""
        keys, self.dirty = self.dirty, set()
        if self.desired is None or not keys:
            return Plan()
        observed = {key: entry.seen for key, entry in self.entries.items()}
        return plan(self.wants, observed, self.preparations, self.settings, self._clock.now(), keys)

    def define(self, key: Key, release: str) -> Service:
        """Return the definition of a release that runs; only timings are lost when none was kept."""
        want = self.wants.get(key)
        if want is not None and want.release == release:
            return want.service
        return self._store.service(key, release) or Service(name=key.service, command=("?",))

    def is_first(self, key: Key) -> bool:
        """Tell whether *key* is the first instance of its service, which the service's own name leads to."""
        ids = self._ids.get(key.service)
        return ids is None or ids[0] == key

    def url(self, key: Key) -> str | None:
        """Return the address of an instance's route at the router's first listener."""
        if self.desired is None or not self.desired.routing_listen:
            return None
        host = host_name(key.service, None if self.is_first(key) else key.id, self.desired.domain)
        port = self.desired.routing_listen[0].rpartition(":")[2]
        return f"http://{host}" + ("" if port == "80" else f":{port}")

    # --- what goes out ------------------------------------------------------------------------------------------------
    def note(self, kind: str, key: Key, detail: str, *, number: int | None = None, release: str | None = None) -> None:
        """Note what happened, unless this instance had too much to say lately: then it is only counted."""
        entry, now = self.entries.get(key), self._clock.now()
        if entry is not None and kind in FREQUENT:
            entry.allowance = min(NOTES_BURST, entry.allowance + (now - entry.allowed_at) * NOTES_PER_S)
            entry.allowed_at = now
            if entry.allowance < 1:
                entry.suppressed += 1
                return
            entry.allowance -= 1
            if entry.suppressed:
                detail = f"{detail} (and {entry.suppressed} like it not noted)"
                entry.suppressed = 0
        self._note(
            Note(kind=kind, service=key.service, id=key.id, at=now, detail=detail, generation=number, release=release)
        )

    def report(self, *, full: bool) -> Report | None:
        """Return the reports that differ from what was last told (all when *full*); None when there is none.

        At most REPORTS_MAX at once, to keep a message small: call again until there is none.
        """
        if self.desired is None and not self.refused:
            return None
        now = self._clock.now()
        keys = sorted(self.entries if full else self._stale)
        for key in keys[REPORTS_MAX:] if full else ():
            self.entries[key].report = None  # so that the next call tells it
        reports = [report for key in keys[:REPORTS_MAX] if (report := self._report(key, now, full=full)) is not None]
        gone = tuple(sorted(gone for gone in self._gone if not full))
        self._stale, self._gone = set(keys[REPORTS_MAX:]), set()
        refused = self.refused or self._trouble
        if not (full or reports or gone or self._told != (self.stamp, refused)):
            return None
        self._told = (self.stamp, refused)
        return Report(stamp=self.stamp, at=now, full=full, instances=tuple(reports), gone=gone, refused=refused)

    def _report(self, key: Key, now: float, *, full: bool) -> InstanceReport | None:
        entry, want = self.entries.get(key), self.wants.get(key)
        if entry is None:
            return None
        before = entry.report
        report = report_of(
            want,
            entry.seen,
            self.settings,
            now,
            preparation=self.preparations.get(want.release, PREPARED) if want else PREPARED,
            waits_for=waits_for(want, self.wants, self._known, self._ids) if want else "",
            health=entry.health,
            url=self.url(key) if want is not None and routed(want.service) else None,
        )
        since = before.since if before is not None and before.phase is report.phase else now
        report = msgspec.structs.replace(report, since=since)
        if before is not None and not full and report == before:
            return None
        entry.report = report
        if entry.stats is None:
            return report
        stats = entry.stats
        return msgspec.structs.replace(
            report, memory_bytes=stats.memory_bytes, cpu_s=stats.cpu_s, requests=stats.requests
        )


def needs_preparation(service: Service) -> bool:
    return bool(service.bundle or service.build or service.pre_deploy)


def releases_in_use(entries: Iterable[Entry], wants: Iterable[Want]) -> dict[str, Service]:
    """Return all releases that run, are wanted, or may be fallen back to, by digest."""
    found = {want.release: want.service for want in wants}
    for entry in entries:
        if entry.seen.good is not None:
            found.setdefault(entry.seen.good.release, entry.seen.good.service)
        for generation in entry.seen.generations:
            found.setdefault(generation.release, generation.service)
    return found
