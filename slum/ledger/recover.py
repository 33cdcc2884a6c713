"""Start a new generation from state.db as it stands: `python -m slum.ledger.recover --data-dir D`.

The way out when a journal is damaged or gone. With one member nothing acknowledged is lost by it, because every answer
waited for state.db's commit; an entry that was logged but never answered may be. The new generation is higher than any
before, so that headers, intents and pushed configs of the old one are fenced. Refuses unless state.db passes every check
of its own, the whole chain of events included. Run it while no ledger process runs; repeating it is harmless.
"""

from __future__ import annotations

import argparse
import getpass
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from slum.errors import SlumError
from slum.ledger import folder, journal
from slum.ledger.refusal import RESTORE, Refusal
from slum.ledger.schema import EpochRow, Position
from slum.ledger.state import State
from slum.ledger.world import Config


def recover(home: Path, *, actor: str, now: float, epoch_bytes: int = Config().epoch_bytes) -> Position:
    """Give the ledger in folder *home* a new generation and an empty journal; return where it stands then."""
    with folder.locked(home):
        path = folder.current(home)
        if path is None:
            raise Refusal(f"{home} holds no ledger", hint=RESTORE)
        state = State.open(path)
        try:
            state.check_events()
            if len(state.position.members) > 1:
                # What was acknowledged may be in the journals of a majority and not yet in this state.db.
                raise Refusal(
                    f"this is one of {len(state.position.members)} members: state.db alone does not hold all that was answered",
                    hint="remove this member at the leader, then let it join as a new one; while a majority runs nothing is lost",
                )
            generation = max(state.position.generation + 1, int(now * 1000))

            def make_journal(epoch: EpochRow) -> None:
                identity = folder.journal_id(state.position.cluster_id, epoch)
                journal.create(folder.journal_path(home, epoch), identity, epoch_bytes).close()

            return state.begin_generation(generation, uuid.uuid4().hex[:16], actor=actor, at=now, make=make_journal)
        finally:
            state.close()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m slum.ledger.recover", description="Start a new generation of the ledger from its state.db."
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    home = parser.parse_args(arguments).data_dir / "state"
    try:
        at = recover(home, actor=f"{getpass.getuser()}@{socket.gethostname()}", now=time.time())
    except (SlumError, OSError, sqlite3.Error) as error:
        hint = error.hint.replace("DIR", str(home.parent)) if isinstance(error, SlumError) else ""
        sys.stderr.write(f"{error}\n{hint}\n")
        return 1
    sys.stderr.write(f"generation {at.generation} begins at sequence {at.seq}; start the ledger again\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
