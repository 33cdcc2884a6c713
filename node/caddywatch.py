"""Ends a Caddy that hangs: asks it for an answer now and then, and kills it when it runs and gives none for too long.

Caddy cannot tell the keeper by itself that it lives (slum.alive), so whoever keeps it asks. The keeper starts it again, and
what connected meanwhile waits in the listeners' queues. What counts as hanging is hang.py's to say. Must never kill one
that nobody has asked for the whole of the time, nor one that has just been started.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

from slum import log
from slum.alive import LOOKS
from slum.errors import SlumError
from slum.node.hang import Patience, activity
from slum.node.keeperclient import KeeperClient
from slum.paths import Home


async def watch(
    home: Home,
    name: str,
    wanted: Callable[[], bool],
    ask: Callable[[float], Awaitable[None]],
    limit_s: float,
) -> None:
    """Watch the child *name* of the keeper of *home* until cancelled, whenever *wanted* says that it has to answer.

    *ask* returns when it answered, within the seconds it is given; TimeoutError or another OSError when it did not.
    """
    loop = asyncio.get_running_loop()
    patience, pid = Patience(), 0
    while True:
        next_look = loop.time() + limit_s / LOOKS
        if wanted():
            try:
                await ask(limit_s / LOOKS)
                patience.heard()
            except OSError:  # TimeoutError is one
                patience, pid = await _silent(home, name, patience, pid)
        await asyncio.sleep(max(0.0, next_look - loop.time()))


async def _silent(home: Home, name: str, patience: Patience, pid: int) -> tuple[Patience, int]:
    """Count a look without an answer against process *pid*, or begin anew with the one that runs now."""
    try:
        async with await KeeperClient.connect(home) as keeper:
            child = next((each for each in await keeper.list_children() if each.name == name and each.running), None)
            if child is None or child.pid != pid:
                return Patience(), child.pid if child else 0
            if patience.silent(activity(pid, asyncio.get_running_loop().time())):
                log.get().error("killed_for_it_hung", name=name, pid=pid)
                await keeper.signal(name, signal.SIGKILL)
                return Patience(), 0
    except SlumError as error:
        log.get().warning("not_watched", name=name, why=str(error))
    return patience, pid
