"""What must be so after a run: held against what the clients were told, what every member shows, and what lies on the disks."""

from __future__ import annotations

import bisect
import contextlib
import random
import re
import sqlite3
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from cluster_site import Failed, Host, until

from chaos.history import Asked
from chaos.linear import Add, Operation, Read, Swap, Verdict, check
from chaos.site import KEYS, Site
from slum.ledger import folder
from slum.ledger.schema import read_position, row_hash

PAGE = 1000
OPERATIONS_MAX = 500
"""Of one key, where the choice is ours: of reads as many are left out as it takes."""
SHOWN_MAX = 8
ID = re.compile(r"c[0-9]+-[0-9]+")
"""Of an operation: what clients name as their host."""
BEGINNING = "nobody"
"""What the register holds at first."""


@dataclass(frozen=True)
class Write:
    """One event that a client caused."""

    seq: int
    number: int
    id: str
    kind: str
    key: str
    value: Any


def written(events: Sequence[Mapping[str, Any]]) -> list[Write]:
    """Return the writes of clients among *events*, in their order."""
    found = []
    for event in events:
        who = str(event["actor"]).partition("@")[2]
        if not ID.fullmatch(who):
            continue
        if event["kind"] == "fleet_applied":
            found.append(Write(event["seq"], event["number"], who, "swap", "", who))
        elif event["kind"] == "override_set" and event["why"] == "restart":
            key = event["subject"].rpartition("/")[2]
            found.append(Write(event["seq"], event["number"], who, "add", key, event["after"]["restarts"]))
    return found


def against_the_log(asked: Sequence[Asked], log: Sequence[Write]) -> Iterator[str]:
    """Yield what is lost, doubled, out of order, or was never asked; every operation of every key is held against the one log."""
    by_id: dict[str, list[Write]] = defaultdict(list)
    for write in log:
        by_id[write.id].append(write)
    known = {each.id for each in asked}
    for each in asked:
        found = by_id.get(each.id, [])
        if each.kind not in ("swap", "add"):
            continue
        if len(found) > 1:
            yield f"{each.id} happened {len(found)} times, at seq {[write.seq for write in found]}"
        if each.outcome == "done" and not found:
            yield f"{each.id} was answered with seq {each.seq} and is lost"
        if each.outcome == "done" and found and found[0].seq != each.seq:
            yield f"{each.id} was answered with seq {each.seq} and is at {found[0].seq}"
        if each.outcome == "done" and found and each.key != found[0].key:
            yield f"{each.id} was about {each.key} and changed {found[0].key}"
        if each.outcome in ("conflict", "refused") and found:
            yield f"{each.id} was answered with {each.outcome} and happened at seq {found[0].seq}"
        if each.outcome == "refused":
            yield f"{each.id} was refused: {each.why}"
    strangers = sorted(by_id.keys() - known)
    if strangers:
        yield f"nobody asked for {strangers[:SHOWN_MAX]}"
    yield from _in_real_time(asked, {write.id: write.seq for write in log})
    yield from _as_read(asked, log)


def _in_real_time(asked: Sequence[Asked], at: Mapping[str, int]) -> Iterator[str]:
    """What was answered before another was asked comes before it; a fresh read shows all that was answered before it."""
    ended = sorted(
        (each.returned, each.seq, each.id)
        for each in asked
        if each.outcome == "done" and each.kind != "seen" and each.returned is not None
    )
    moments, highest, newest = [], [], (0, "")
    for returned, seq, whose in ended:
        newest = max(newest, (seq, whose))
        moments.append(returned)
        highest.append(newest)
    for each in asked:
        before = bisect.bisect_left(moments, each.invoked) - 1
        if before < 0 or each.kind == "seen":
            continue
        least, whose = highest[before]
        if each.kind == "fresh" and each.outcome == "done" and each.seq < least:
            yield f"{each.id} read seq {each.seq} after {whose} was answered with {least}"
        if each.kind in ("swap", "add") and each.id in at and at[each.id] <= least:
            yield f"{each.id} is at seq {at[each.id]}, and {whose}, at {least}, was answered before it was asked"


def _as_read(asked: Sequence[Asked], log: Sequence[Write]) -> Iterator[str]:
    """Every read, however old, shows what the log says of its seq."""
    register, counters = BEGINNING, dict.fromkeys(KEYS, 0)
    rest = iter(log)
    write = next(rest, None)
    for each in sorted((a for a in asked if a.kind in ("fresh", "seen") and a.outcome == "done"), key=lambda a: a.seq):
        while write is not None and write.seq <= each.seq:
            if write.kind == "add":
                counters[write.key] = write.value
            else:
                register = write.value
            write = next(rest, None)
        if each.register != register:
            yield f"{each.id} read {each.register!r} at seq {each.seq}, where the log says {register!r}"
        wrong = {key: (seen, counters[key]) for key, seen in each.counters.items() if seen != counters[key]}
        if wrong:
            yield f"{each.id} read at seq {each.seq} (and by the log): {wrong}"


def linearizable(asked: Sequence[Asked], seed: int) -> Iterator[str]:
    """Yield the keys whose history one copy could not have had, by the answers alone: the log is not looked at."""
    chance = random.Random(seed)
    # What was refused for good may have happened when it was tried before.
    asked = [replace(a, returned=None) if a.outcome == "refused" else a for a in asked]
    swaps = [Operation(a.invoked, a.returned, Swap(a.expected, a.id, _done(a))) for a in asked if a.kind == "swap"]
    reads = [a for a in asked if a.kind == "fresh" and a.outcome == "done"]
    histories = {
        "the register": (BEGINNING, [*swaps, *_some(reads, len(swaps), chance, lambda a: a.register)]),
    }
    for key in KEYS:
        adds = [Operation(a.invoked, a.returned, Add()) for a in asked if a.kind == "add" and a.key == key]
        histories[key] = (0, [*adds, *_some(reads, len(adds), chance, lambda a, k=key: a.counters.get(k, 0))])
    for name, (start, operations) in histories.items():
        found = check(operations, start)
        if found.verdict is not Verdict.YES:
            yield f"{name}: {found.verdict} ({len(operations)} operations): {found.stuck[:SHOWN_MAX]}"


def _some(reads: Sequence[Asked], beside: int, chance: random.Random, value: Any) -> list[Operation]:
    count = min(len(reads), max(50, OPERATIONS_MAX - beside))
    return [Operation(a.invoked, a.returned, Read(value(a))) for a in chance.sample(reads, count)]


def _done(asked: Asked) -> bool | None:
    return {"done": True, "conflict": False}.get(asked.outcome)


# --- what members show and hold ---------------------------------------------------------------------------------------


def events_of(site: Site, host: Host) -> list[dict[str, Any]]:
    """Return all events as *host* shows them."""
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["number"] if found else 0
        page = site.ask(host, f"/v1/events?after={after}&limit={PAGE}", timeout_s=30)
        found += page
        if len(page) < PAGE:
            return found


def members_agree(site: Site) -> Iterator[str]:
    """Yield where members differ: seq and chain of the log, the rows of all tables, the events and their order."""
    hosts = [site.hosts[name] for name in site.members]
    try:
        positions = until(lambda: _same_positions(hosts), 60, "the same seq on all members")
    except Failed as error:
        positions = {host.name: _position(host) for host in hosts}
        yield f"{error}: {positions}"
        return
    if len(set(positions.values())) != 1:
        yield f"members differ in (seq, chain, row hash): {positions}"
    shown = {host.name: events_of(site, host) for host in hosts}
    shortest = min(len(events) for events in shown.values())
    first = [event["hash"] for event in shown[hosts[0].name][:shortest]]
    for name, events in shown.items():
        if [event["hash"] for event in events[:shortest]] != first:
            at = next(n for n, (a, b) in enumerate(zip(first, events, strict=False)) if a != b["hash"])
            yield f"{name} and {hosts[0].name} differ from event {at} on"
    for host in hosts:
        ran = site.slum(host, "events", "--verify", check=False)
        if ran.code:
            yield f"on {host.name}: {ran}"


def _same_positions(hosts: Sequence[Host]) -> dict[str, tuple[int, str, str]] | None:
    """Return (seq, chain, row hash) of each once all are at the same seq, read twice with nothing between."""
    before = {host.name: _position(host) for host in hosts}
    if len({position[0] for position in before.values()}) != 1:
        return None
    after = {host.name: _position(host) for host in hosts}
    return before if before == after else None


def _position(host: Host) -> tuple[int, str, str]:
    path = folder.current(host.data / "state")
    if path is None:
        return (0, "", "")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("BEGIN")
        at = read_position(db)
        return (at.seq, str(at.chain), str(row_hash(db)))


def nothing_left(site: Site) -> list[str]:
    """Return what a closed *site* has left on this machine."""
    found = [str(path) for path in (site.base, *(host.run for host in site.hosts.values())) if path.exists()]
    with contextlib.suppress(FileNotFoundError):
        names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout
        found += [line for line in names.splitlines() if site.token in line]
    with open("/proc/mounts") as mounts:
        found += [line.strip() for line in mounts if site.token in line]
    return found
