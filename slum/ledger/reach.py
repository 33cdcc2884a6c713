"""Who of the other members answers, and how far each is: asked by somebody whose own ledger does not run.

One connection to each, as a member makes it; a hello is all that is said and heard. One that does not know us any more ends it
instead, with a TLS alert, after it has proved by its key who it is. Changes nothing anywhere.
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
STRANGER = "ALERT_UNKNOWN_CA"
"""In what OpenSSL says when the other side trusts no such certificate (RFC 8446, alert 48)."""


def hellos(
    home: Path, others: Collection[Member], mine: Hello, wait_s: float
) -> tuple[dict[str, Hello], frozenset[str]]:
    """Return what those of *others* say that answer within *wait_s*, and who of them takes us for a stranger.

    Nobody, when *home* has no identity.
    """
    me = identity.load(home)
    if me is None or not others:
        return {}, frozenset()
    found: dict[str, Hello] = {}
    strange: set[str] = set()

    def note(event: str, **fields: object) -> None:
        if event == "link_ended" and STRANGER in str(fields["why"]):
            strange.add(str(fields["peer"]))

    links = Links(home, me, note)
    try:
        links.set_members(tuple(others), lambda: mine, {row.id for row in others})
        end = time.monotonic() + wait_s
        while len(found.keys() | strange) < len(others) and time.monotonic() < end:
            found.update({event.peer: event.hello for event in links.receive(STEP_S) if isinstance(event, Up)})
    finally:
        links.close()
    return found, frozenset(strange - found.keys())
