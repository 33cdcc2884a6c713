"""How machines that operators make come home: a join token for each, good for that machine alone.

A token that was given out and not used yet is given again, so that who fails to make a machine all day makes few; it is
kept in memory only, the ledger has its hash. Must never log a token.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from slum.errors import ConfigError
from slum.ledger.commands import AddToken, Rejected, new_request_id
from slum.operators.base import Join
from slum.pki.authority import digest_of
from slum.pki.tokens import hash_of, new_secret, parse, token_text

if TYPE_CHECKING:
    from slum.server.control import Control

TOKEN_S = 3600.0
"""How much longer than asked for a machine's token is good: it has to boot."""


class Joins:
    def __init__(self, control: Control) -> None:
        self._control = control
        self._given: dict[str, tuple[Join, float]] = {}
        """By a machine's key: what it was last given, and until when that is good."""

    async def of(self, key: str, lasts_s: float) -> Join:
        """Return how the machine *key* shall join, with a token that lasts *lasts_s* or longer; ConfigError when none can."""
        control = self._control
        authority, servers = control.view.reader.authority(), self.servers()
        if authority is None or not servers:
            raise ConfigError(
                f"{key} could not join: this control plane is reachable from its own machine only",
                hint="`slum server init --address HOST` opens it",
            )
        now = time.time()
        self._given = {name: held for name, held in self._given.items() if held[1] > now}
        join, until = self._given.get(key, (None, 0.0))
        if join is not None and until > now + lasts_s and self._is_unused(join):
            return msgspec.structs.replace(join, server=servers)
        secret, expires_at = new_secret(), now + lasts_s + TOKEN_S
        token = AddToken(
            id=secrets.token_hex(6), hash=hash_of(secret), kind="node", subject=key, role="", expires_at=expires_at
        )
        request_id = new_request_id(secrets.token_hex(16), control.view.seq())
        result = await control.commit(token, request_id, f"slum@{control.me}")
        if isinstance(result, Rejected):
            raise ConfigError(result.why)
        made = Join(server=servers, token=token_text(digest_of(authority.certificate), secret))
        self._given[key] = (made, expires_at)
        return made

    def servers(self) -> str:
        """Return the URLs of all members' fronts, a blank between two; empty when none has one."""
        members = self._control.world().cluster.members
        return " ".join(f"https://{member.api}" for member in members if member.api)

    def _is_unused(self, join: Join) -> bool:
        row = self._control.view.reader.token(hash_of(parse(join.token).secret))
        return row is not None and not row.key_hash
