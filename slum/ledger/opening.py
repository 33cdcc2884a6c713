"""Opening a ledger's folder: its lock, its disk, its state file, and the member that runs on them; closed in that order again.

A new cluster begins where there is none. Files that do not agree are refused, never mended here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slum.errors import invariant
from slum.ledger import disk, fence, folder, journal
from slum.ledger.beginning import Note, current_or_new
from slum.ledger.commands import PROTOCOL
from slum.ledger.member import Member
from slum.ledger.net import Alone
from slum.ledger.refusal import RECOVER, REJOIN, Refusal
from slum.ledger.state import State
from slum.ledger.world import Config, World, real_world

EPOCH_ENTRIES_MIN = 8
"""Below it an epoch would be full of what begins an epoch."""


@contextmanager
def opened(
    home: Path,
    config: Config,
    *,
    run: str,
    note: Note,
    now: Callable[[], float] = time.time,
    world: World | None = None,
) -> Iterator[Member]:
    """Open the ledger in folder *home*, a new one when there is none; Refusal when its files do not agree.

    *run* is random for each start of the process; *now* gives unix seconds. Without a *world* there are no peers; the
    network of one that is given is closed at the end.
    """
    invariant(config.epoch_entries >= EPOCH_ENTRIES_MIN, f"an epoch of less than {EPOCH_ENTRIES_MIN} entries")
    own = real_world(Alone(), now) if world is None else world
    try:
        with folder.locked(home):
            fence.check(home)
            guard = disk.Guard(home, disk.marks(config.ballast_bytes, config.epoch_bytes + journal.SLACK_BYTES))
            for event in guard.check(time.monotonic()):
                note(event, free_bytes=guard.free_bytes)
            if config.ballast_bytes and not guard.has_ballast:
                note("ballast_is_missing", wanted_bytes=config.ballast_bytes, free_bytes=guard.free_bytes)
            path = current_or_new(home, config.epoch_bytes, now(), note)
            state = State.open(path, results_kept=config.results_kept)
            try:
                if state.position.protocol > PROTOCOL:
                    raise Refusal(
                        f"{path} is of protocol {state.position.protocol}, this slum speaks {PROTOCOL}",
                        hint="install the version of slum that the other members run; nothing was changed",
                    )
                try:
                    member = Member(home, config, state, guard, run=run, note=note, world=own)
                except Refusal as error:
                    if error.hint != RECOVER or len(state.position.members) == 1:
                        raise
                    # What was acknowledged may be in others' logs and not yet in this state.db.
                    raise Refusal(error.message, hint=REJOIN) from error
                try:
                    yield member
                finally:
                    member.close()
                    state = member.state
            finally:
                state.close()
    finally:
        own.net.close()
