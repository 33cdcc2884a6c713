"""How machines that operators make come home: a join token for each, good for that machine alone.

A token that was given out and not used yet is given again, so that who fails to make a machine all day makes few; it is
kept in memory only, the ledger has its hash. Must never log a token.
"""

from __future__ import annotations

import time

import msgspec

from slum.operators.base import Join
from slum.pki import tokens
from slum.server.control import Control
from slum.server.routes_access import issue
from slum.server.routes_join import servers

TOKEN_S = 3600.0
"""How much longer than asked for a machine's token is good: it has to boot."""


class Joins:
    def __init__(self, control: Control) -> None:
        self._control = control
        self._given: dict[str, tuple[Join, float]] = {}
        """By a machine's key: what it was last given, and until when that is good."""

    async def of(self, key: str, lasts_s: float) -> Join:
        """Return how the machine *key* shall join, with a token that lasts *lasts_s* or longer; ConfigError when none can.

        Its intent must be committed: a token is for a machine that is to be.
        """
        now = time.time()
        self._given = {name: held for name, held in self._given.items() if held[1] > now + lasts_s}
        join, _ = self._given.get(key, (None, 0.0))
        if join is not None and self._is_unused(join):
            return msgspec.structs.replace(join, server=" ".join(servers(self._control)))
        actor = f"slum@{self._control.me}"
        made = await issue(self._control, kind="node", subject=key, ttl_s=lasts_s + TOKEN_S, actor=actor)
        join = Join(server=" ".join(made.servers), token=made.token)
        self._given[key] = (join, made.expires_at)
        return join

    def _is_unused(self, join: Join) -> bool:
        row = self._control.view.reader.token(tokens.hash_of(tokens.parse(join.token).secret))
        return row is not None and not row.key_hash
