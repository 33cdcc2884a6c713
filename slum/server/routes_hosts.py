"""The API's routes about the keys of hosts with SSH: which are known, and forgetting one."""

from __future__ import annotations

from slum import api
from slum.errors import ConfigError
from slum.frozen import Frozen
from slum.ledger.commands import Rejected
from slum.ledger.hosts import fingerprint
from slum.model import SshOperator
from slum.operators.ssh_hosts import address_of, parse_address
from slum.server.control import rejection
from slum.server.hostkeys import forget
from slum.server.problems import Missing
from slum.server.route import Call


class ForgetQuery(Frozen, forbid_unknown_fields=True):
    host: str = ""
    """Of the user: the machine that they sit at."""


async def get_hostkeys(call: Call) -> tuple[api.HostKey, ...]:
    return tuple(
        api.HostKey(host=row.host, key=row.key, fingerprint=fingerprint(row.key), at=row.at, actor=row.actor)
        for row in call.control.view.reader.hosts()
    )


async def delete_hostkey(call: Call) -> api.Forgotten:
    """Believe the next key that a host shows; Missing when neither the ledger nor the fleet has such a host."""
    try:
        host = parse_address(call.connection.path_params["host"]).id
    except ConfigError as error:
        raise Missing(error.message, hint=error.hint) from error
    control = call.control
    known = {row.host for row in control.view.reader.hosts()}
    for operator in control.world().fleet.operators:
        if isinstance(operator, SshOperator):
            known |= {address_of(one, operator).id for one in operator.hosts}
            known |= {parse_address(operator.jump, operator.user).id} if operator.jump else set()
    if host not in known:
        raise Missing(f"no host {host} is known", hint="`slum hostkey list` shows those that are")
    result = await forget(control, host, call.peer.actor(call.query.host))
    if isinstance(result, Rejected):
        raise rejection(result)
    return api.Forgotten(seq=result.seq, host=host)
