"""What a member keeps an eye on beside the log: its disk, the clocks, the others' rows; and which alarms it raises.

Looks, notes what changed in the log, and keeps what status() shows as alarms. Acts on nothing but the ballast file and, when
this member must serve no more, the mark that says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from slum.ledger import clocks, disk, fence
from slum.ledger.beginning import Note
from slum.ledger.commands import Member, NoteEvent
from slum.ledger.peers import Peers
from slum.ledger.refusal import REJOIN, Refusal
from slum.ledger.rows import Differ, Rows
from slum.ledger.status import Alarm

CLOCKS_PERIOD_S = 0.3
LOOKS = 3
"""A clock is wrong that is found so as often in a row: when ours jumps, the others' words of after it come one by one."""
CLOCK_HINT = "set it right (chrony or systemd-timesyncd keep it so); nothing was harmed"


class Watch:
    def __init__(
        self, me: str, peers: Peers, rows: Rows, guard: disk.Guard, *, clock: Callable[[], float], note: Note
    ) -> None:
        self._me = me
        self._peers = peers
        self._guard = guard
        self._clock = clock
        self._note = note
        self._next_clocks = 0.0
        self._rows = rows
        self._rows_differ: Differ | None = None
        self._refusal: Refusal | None = None
        self._wrong: dict[str, float] = {}
        self._looks: deque[dict[str, float]] = deque(maxlen=LOOKS)
        self._differ: dict[str, float] = {}
        self._told: frozenset[str] = frozenset()

    @property
    def own_clock_is_wrong(self) -> bool:
        return self._me in self._wrong

    @property
    def rows_agree(self) -> bool:
        return self._rows_differ is None

    def look(self, members: Collection[Member]) -> None:
        """Look at what is due; raise the Refusal that ends this member when a majority of *members* has other rows."""
        for event in self._guard.check(self._clock()):
            self._note(event, free_bytes=self._guard.free_bytes)
        now = self._clock()
        if now >= self._next_clocks:
            self._next_clocks = now + CLOCKS_PERIOD_S
            self._look_at_clocks()
            self._look_at_rows({row.id for row in members})

    def _look_at_rows(self, members: Collection[str]) -> None:
        if self._refusal is not None:
            raise self._refusal
        was, self._rows_differ = self._rows_differ, self._rows.differ(members)
        differ = self._rows_differ
        if differ is None or differ == was:
            return
        self._note("rows_differ", peers=differ.peers)
        if differ.certain and self._me in members:
            at = self._rows.mine.place[1] if self._rows.mine is not None else 0
            # Raised at the next look: until then the others hear which rows these are.
            self._refusal = fence.refuse_for_good(
                self._guard.folder,
                f"the rows of {self._me}'s state.db were not those of {', '.join(differ.peers)} at the beginning of epoch {at}: "
                "this member serves no more",
                REJOIN,
            )

    def _look_at_clocks(self) -> None:
        offsets = self._peers.offsets
        was = {**self._wrong, **self._differ}
        found = clocks.wrong(offsets, self._me)
        self._looks.append(found)
        surely = len(self._looks) == LOOKS
        self._wrong = {name: off for name, off in found.items() if surely and all(name in look for look in self._looks)}
        self._differ = clocks.differ(offsets, self._me)
        for event, found in (("clock_wrong", self._wrong), ("clocks_differ", self._differ)):
            for name, off_s in found.items():
                if name not in was:
                    self._note(event, member=name, seconds=round(off_s, 1))

    def news(self, at: float) -> tuple[NoteEvent, ...]:
        """Return what the leader should record for all to see, once each."""
        fresh = sorted(self._wrong.keys() - self._told)
        self._told = frozenset(self._wrong)
        return tuple(
            NoteEvent(kind="clock_wrong", subject=f"member:{name}", at=at, why=_off(self._wrong[name]))
            for name in fresh
        )

    def alarms(self) -> tuple[Alarm, ...]:
        """Return what is wrong with this member, or as it sees it."""
        found, differ = [], self._rows_differ
        if differ is not None:
            why = f"its rows and those of {', '.join(differ.peers)} differ, and there is no majority to tell whose are wrong"
            hint = "bring the other members back: whoever differs from a majority stops by itself"
            found.append(Alarm(kind="rows_differ", member=self._me, why=why, hint=hint))
        if self._guard.low:
            why = f"{self._guard.free_bytes >> 20} MiB are free on its disk: only removals are taken"
            found.append(
                Alarm(kind="disk_low", member=self._me, why=why, hint=f"free space under {self._guard.folder}")
            )
        for name, off_s in self._wrong.items():
            found.append(Alarm(kind="clock_wrong", member=name, why=_off(off_s), hint=CLOCK_HINT))
        for name, off_s in self._differ.items():
            why = f"its clock and ours are {abs(off_s):.0f} s apart"
            found.append(Alarm(kind="clocks_differ", member=name, why=why, hint=CLOCK_HINT))
        return tuple(found)


def _off(seconds: float) -> str:
    return f"its clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the others'"
