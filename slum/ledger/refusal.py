"""Why the ledger will not start or go on: its files are not what they should be, and guessing would lose writes.

Each Refusal names the file and place, and its hint says the way out (DIR stands for the data folder, which the process
fills in). Nothing here acts.
"""

from __future__ import annotations

from slum.errors import SlumError

MARK = "refused.json"
"""In the folder of a member that must not start any more: why, and the way out (see slum.ledger.fence)."""

RECOVER = "all that was acknowledged is in state.db: `python -m slum.ledger.recover --data-dir DIR` starts a new generation from it"
RESTORE = (
    "move DIR/state away, then `slum restore --from URL` brings back the backup; without one, put back a copy of DIR/state made "
    "while the ledger was stopped, or begin an empty ledger "
    "(services keep running; apply the fleet again)"
)

REJOIN = (
    "the other members have everything: remove this one there (`slum server members remove NAME`) and join as new here (`slum server "
    "join` with a new token, which puts the old state aside); if a majority of them is lost for good, run `slum server recover` on "
    "the one that has most"
)


class Refusal(SlumError):
    """The ledger does not start; *hint* is the way out. Nothing was changed."""

    exit_code = 7
    code = "no_quorum"


class Damaged(Refusal):
    """A file holds bytes that nobody wrote, at *offset*."""

    def __init__(self, message: str, *, offset: int = 0, hint: str = RECOVER) -> None:
        super().__init__(message, hint=hint)
        self.offset = offset
