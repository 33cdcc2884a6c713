"""Who of the other members answers, and how far each is: asked by somebody whose own ledger does not run.

One connection to each, as a member makes it; a hello is all that is said and heard. Changes nothing anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path

from slum.ledger import identity
from slum.ledger.commands import Member
from slum.ledger.links import Links
from slum.ledger.net import Up
from slum.ledger.peerwire import Hello

STEP_S = 0.05


def hellos(home: Path, others: Collection[Member], mine: Hello, wait_s: float) -> dict[str, Hello]:
    """Return what those of *others* say that answer within *wait_s*; nobody, when *home* has no identity."""
    me = identity.load(home)
    if me is None or not others:
        return {}
    links = Links(home, me, lambda _event, **_fields: None)
    found: dict[str, Hello] = {}
    try:
        links.set_members(tuple(others), lambda: mine, {row.id for row in others})
        end = time.monotonic() + wait_s
        while len(found) < len(others) and time.monotonic() < end:
            found.update({event.peer: event.hello for event in links.receive(STEP_S) if isinstance(event, Up)})
    finally:
        links.close()
    return found
