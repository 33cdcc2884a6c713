"""What clients asked, when, and what they were told: written down as it happens, by many threads."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Asked:
    """One operation of one client. *outcome* stays "unknown" until somebody has answered."""

    id: str
    """Unique; the actor of the events that it causes ends with it."""
    kind: str
    """swap, add, fresh (a linearizable read) or seen (any other read)."""
    member: str
    key: str = ""
    expected: str = ""
    invoked: float = 0.0
    returned: float | None = None
    outcome: str = "unknown"
    """done, conflict, unknown or refused."""
    seq: int = 0
    tries: int = 0
    register: str = ""
    counters: Mapping[str, int] = field(default_factory=dict)
    """What a read showed."""
    why: str = ""


class History:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.all: list[Asked] = []
        self.newest_seq = 0

    def begin(self, asked: Asked) -> Asked:
        asked.invoked = time.monotonic()
        with self._lock:
            self.all.append(asked)
        return asked

    def end(self, asked: Asked, outcome: str, seq: int = 0) -> None:
        asked.returned = time.monotonic()
        asked.outcome, asked.seq = outcome, seq
        with self._lock:
            self.newest_seq = max(self.newest_seq, seq)

    def count(self) -> Counter[str]:
        with self._lock:
            return Counter(f"{asked.kind} {asked.outcome}" for asked in self.all)

    def writes_done(self) -> int:
        with self._lock:
            return sum(asked.outcome == "done" and asked.kind in ("swap", "add") for asked in self.all)

    def longest_pause_s(self) -> float:
        """Return the longest time between two answered writes, whoever's."""
        ends = sorted(a.returned for a in self.all if a.outcome == "done" and a.kind in ("swap", "add") and a.returned)
        return max((after - before for before, after in itertools.pairwise(ends)), default=0.0)

    def save(self, path: Path) -> None:
        with path.open("w") as file:
            for asked in self.all:
                file.write(json.dumps(asdict(asked)) + "\n")
