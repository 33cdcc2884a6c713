"""What a ledger is told at its start: when to seal, how long to wait, and which clock, dice and network are its world."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from slum.frozen import Frozen
from slum.ledger.commands import RESULTS_KEPT
from slum.ledger.group import Timing
from slum.ledger.net import Net


class Config(Frozen):
    """An epoch is sealed when its journal holds so many entries or bytes."""

    epoch_entries: int = 200_000
    epoch_bytes: int = 32 << 20
    ballast_bytes: int = 128 << 20
    results_kept: int = RESULTS_KEPT
    """Part of the replicated state: the same on every member, changed in tests only."""
    hash_rows: bool = True
    """Compare all rows with the other members' at each Seal."""
    upgrade_s: float = 3600.0
    """So long all members must have spoken a newer protocol before it is raised, and none of them can go back."""
    timing: Timing = Timing()


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a member takes from the machine it runs on; a simulation brings its own."""

    net: Net
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    """Unix seconds, for people."""
    chance: random.Random
    apart: Callable[[Callable[[], None]], None]
    """Runs something slow beside the ledger's thread."""
    rest: Callable[[float], None] = time.sleep
    """What such work does now and then, for some seconds."""


def real_world(net: Net, now: Callable[[], float] = time.time) -> World:
    def apart(work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="copy", daemon=True).start()

    return World(net=net, now=now, chance=random.Random(), apart=apart)
