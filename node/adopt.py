"""What the keeper's children say about the instances, folded into what was remembered: how an agent takes over. Pure.

A child's meta names its instance, release, socket and restarts. A living child that nobody remembers is taken over in the
stage that its route tells: what serves is healthy until a probe says otherwise, what came before it drains, what came
after it still has to prove itself. What was remembered as living and is no child any more has ended unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from slum.frozen import Frozen
from slum.model import Key, Service
from slum.node.keeperclient import Child
from slum.node.observed import Generation, Observed, Ready, Stage, Starting, reaped, started
from slum.paths import short_key

Define = Callable[[Key, str], Service]
"""Gives the definition of a release that runs."""


def child_name(key: Key, number: int) -> str:
    """Return the name of a generation in the keeper: two of the same cannot be."""
    return f"i/{short_key(str(key))}/{number}"


def listener_name(key: Key, socket: int) -> str:
    return f"i/{short_key(str(key))}/s{socket}"


def meta_of(key: Key, generation: Generation) -> dict[str, str | int | None]:
    return {
        "tenement": key.tenement,
        "service": key.service,
        "id": key.id,
        "number": generation.number,
        "socket": generation.socket,
        "release": generation.release,
        "restarts": generation.restarts,
    }


def key_of(child: Child) -> Key | None:
    """Return the instance that *child* is a generation of; None when it is something else."""
    meta = child.meta
    if not child.name.startswith("i/") or not {"tenement", "service", "id", "number"} <= meta.keys():
        return None
    return Key(tenement=str(meta["tenement"]), service=str(meta["service"]), id=str(meta["id"]))


class End(Frozen):
    """A generation that turned out to have ended; *status* is None when nobody saw how."""

    number: int
    status: int | None
    at: float


def adopt(seen: Observed, children: Iterable[Child], define: Define, now: float) -> tuple[Observed, tuple[End, ...]]:
    """Return *seen* with the generations that *children* (all of this instance) are, and those that have ended.

    What was begun but is no child was never started and is dropped. May be repeated.
    """
    known = {int(str(child.meta["number"])): child for child in children}
    serving = max(
        (number for number, child in known.items() if child.running and child.meta.get("socket") == seen.serving),
        default=None,
    )
    ends = []
    for number, child in sorted(known.items()):
        there = seen.generation(number)
        if there is None:
            seen = started(seen, _generation(seen.key, number, child, serving, define, now))
        elif there.pid is None:
            seen = _with_pid(seen, number, child.pid)
        if not child.running:
            ends.append(End(number=number, status=child.status, at=child.exited_at or now))
    for generation in seen.generations:
        if generation.number not in known:
            if generation.pid is None or not generation.alive:
                seen = reaped(seen, generation.number)
            else:
                ends.append(End(number=generation.number, status=None, at=now))
    return seen, tuple(ends)


def _generation(key: Key, number: int, child: Child, serving: int | None, define: Define, now: float) -> Generation:
    meta = child.meta
    release = str(meta.get("release"))
    stage: Stage = Starting(since=now)
    if serving is not None and number <= serving:
        stage = Ready(since=child.started_at)
    return Generation(
        number=number,
        socket=int(str(meta.get("socket", number))),
        release=release,
        restarts=int(str(meta.get("restarts") or 0)),
        service=define(key, release),
        started_at=child.started_at,
        stage=stage,
        pid=child.pid,
    )


def _with_pid(seen: Observed, number: int, pid: int) -> Observed:
    changed = tuple(msgspec.structs.replace(g, pid=pid) if g.number == number else g for g in seen.generations)
    return msgspec.structs.replace(seen, generations=changed)
