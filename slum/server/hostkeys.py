"""The keys of hosts with SSH as the fleet knows them: in the ledger, so that whichever member leads believes the same ones.

A key that only this member knew, from before or from its command line, is the one that is expected when the ledger knows
none, and goes into the ledger when the host shows it. Until the ledger is of the protocol that has such keys, each member
keeps its own file; that is no reason to raise it, since it would take the way back from whoever has just upgraded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slum.errors import OperatorError, QuorumLost
from slum.ledger.commands import AnyCommand, Done, ForgetHost, PinHost, Rejected, SetProtocol, new_request_id
from slum.ledger.schema import HOSTS_PROTOCOL
from slum.operators.ssh_hosts import key_file

if TYPE_CHECKING:
    from slum.server.control import Control


class LedgerKeys:
    """A KeyBook for the operators of *control*'s member."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._own = key_file(control.home)

    def find(self, host: str) -> str | None:
        row = self._control.view.reader.host(host)
        return self._own.find(host) if row is None else row.key or None

    async def pin(self, host: str, key: str) -> None:
        row = self._control.view.reader.host(host)
        if row is not None and row.key == key:
            return
        if self._control.view.reader.cluster().protocol < HOSTS_PROTOCOL:
            await self._own.pin(host, key)
            return
        try:
            result = await _commit(self._control, PinHost(host=host, key=key), f"slum@{self._control.me}")
        except QuorumLost as error:
            raise OperatorError(
                f"{host}: its key cannot be written down now, so nothing was sent: {error.message}",
                hint=error.hint,
                provider_code="not_pinned",
            ) from error
        if isinstance(result, Rejected):
            raise OperatorError(f"{host}: {result.why}; nothing was sent", provider_code="host_key")

    def forgetting(self, host: str) -> str:
        return f"`slum hostkey forget {host}`"


async def forget(control: Control, host: str, actor: str) -> Done | Rejected:
    """Believe the next key that *host* shows. Conflict while some member is too old for that."""
    if control.view.reader.cluster().protocol < HOSTS_PROTOCOL:
        await _commit(control, SetProtocol(version=HOSTS_PROTOCOL), actor)
    return await _commit(control, ForgetHost(host=host), actor)


async def _commit(control: Control, command: AnyCommand, actor: str) -> Done | Rejected:
    return await control.commit(command, new_request_id(control.view.reader.seq()), actor)
