"""`slum server recover`: a member that goes on alone when a majority is lost for good.

What asks and says is here; what it holds, and what may be lost, is found in slum.ledger.recover.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from slum.cli.base import Invocation, command, consent
from slum.cli.server_steps import actor, run_quietly, start
from slum.errors import ConfigError, Conflict, SlumError

if TYPE_CHECKING:
    from slum.ledger.recover import Survivor


@command(
    "recover",
    examples="""
    slum server recover
    slum server recover --yes
    """,
)
def recover(asked: Invocation) -> None:
    """Let this member go on alone, when a majority of the members is lost for good. Shows first what may be lost.

    It keeps all that it holds and begins a new generation; whoever comes back is fenced and can join as a new member. Machines
    and services are left as they are until `slum resume`. Refused while the others could go on without loss.
    """
    import sqlite3

    from slum.ledger import identity
    from slum.ledger.recover import examine
    from slum.ledger.recover import recover as begin_anew
    from slum.server import boot, founding

    if identity.load(asked.home.state) is None:
        raise ConfigError(
            "this machine is no member of a replicated control plane",
            hint=f"a control plane of one whose journal is damaged: python -m slum.ledger.recover --data-dir {asked.home.data}",
        )
    asked.note("stopping ledger and server of this member; services go on")
    boot.shut_down_servers(asked.home)
    try:
        found = examine(asked.home.state)
        alone = found.members == (found.member,)
        obstacle = "it is the only member, and its log is whole" if alone and not found.log_problem else found.obstacle
        if obstacle:
            raise Conflict(f"{found.member} does not go on alone: {obstacle}", hint="nothing was changed")
        for line in _survivor_lines(found, time.time()):
            asked.note(line)
        if not consent(asked, f"Go on alone? Type the member's name, {found.member}", typed=found.member):
            raise ConfigError("nothing was changed")
        at = begin_anew(asked.home.state, actor=actor(), now=time.time())
    except (OSError, sqlite3.Error) as error:
        raise SlumError(
            f"{asked.home.state} cannot be read: {error}", hint="`slum server join` makes it a new member"
        ) from error
    finally:
        start(asked, again=False, wait=False)
    boot.wait_for_api(asked.home)
    run_quietly(founding.seal_alone(asked.home, actor()))
    if asked.json:
        asked.emit({"member": found.member, "generation": at.generation, "seq": at.seq, "missing": found.missing})
        return
    asked.say(f"{found.member} goes on alone with generation {at.generation}, sequence {at.seq}")
    if alone:
        return
    asked.say(
        "next: look with `slum status` and `slum events`, then `slum resume`; until then machines are left as they are"
    )
    asked.say("      then `slum token new member`, and on each of the others `slum server join`: they are fenced")


def _survivor_lines(found: Survivor, now: float) -> list[str]:
    """Say what a member holds that is to go on alone, and what may be lost by it."""
    from slum.render import seconds

    others = [name for name in found.members if name != found.member]
    answering = ", ".join(one.member for one in found.reached) or "none"
    lines = [
        f"{found.member} of {len(found.members)} members; of {', '.join(others) or 'nobody else'} these answer: {answering}",
        f"it holds all up to sequence {found.seq}, last event {seconds(max(0.0, now - found.last_at))} ago,"
        f" and {found.unapplied} entries behind it, which are kept too",
    ]
    lines += [f"may be lost: {what}" for what in found.missing]
    return lines
