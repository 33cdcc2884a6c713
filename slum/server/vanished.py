"""When machines that were made are gone at their operators: which are made again, and when that stops. Pure.

One that was deleted by hand is made again. Many at once are more likely a mistake about them (another project's token, a list
that is not whole) than a loss of all: beyond a tenth of them, and two, none is made again until somebody says so. A new leader
waits a little before it believes that anything is gone. Silence of an agent is no reason for anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from slum.operators.base import Machine
from slum.server.decide import Known, key_of

GRACE_S = 10.0
"""How long one must lead before what is not seen counts as gone."""
MANY = 2
SHARE = 10
WHY = (
    "{gone} of {all} machines are gone at their operators, all at once: none is made again. If that is right, take them out"
    " of slum.toml, apply, and put them back"
)


def vanished(
    known: Collection[Known],
    wanted: Collection[str],
    observed: Mapping[str, tuple[Machine, ...]],
    hosts: Collection[str],
    led_s: float,
) -> tuple[frozenset[str], str]:
    """Return the machines that are not to be made again now, and why when they are too many at once, else "".

    *wanted* are machines that the fleet declares, *hosts* operators of machines that are always there (local ones).
    """
    made = [
        row
        for row in known
        if row.state == "created" and row.machine in wanted and row.operator in observed and row.operator not in hosts
    ]
    seen = {machine.key for machines in observed.values() for machine in machines}
    gone = frozenset(row.machine for row in made if key_of(row.machine, row.incarnation) not in seen)
    if len(gone) >= MANY and len(gone) * SHARE > len(made):
        return gone, WHY.format(gone=len(gone), all=len(made))
    return (gone, "") if led_s < GRACE_S else (frozenset(), "")
