"""Whether a fleet that a client sent may be committed: every reason against it at once, nothing committed on any.

Beyond validate's rules: the bundles are here, the operators' types are part of this version, the members it names exist,
and the machines whose agents are known can do what their services ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from slum.errors import ConfigError
from slum.ledger.commands import Member
from slum.model import Fleet, LocalOperator
from slum.operators.registry import why_unavailable
from slum.problem import Problem
from slum.server.blobs import DIGEST, Blobs
from slum.validate import check_capabilities, check_fleet

if TYPE_CHECKING:
    from slum.server.agents import Seen

PROBLEMS_MAX = 100


def admit(fleet: Fleet, blobs: Blobs, seen: Mapping[str, Seen], members: tuple[Member, ...], *, is_open: bool) -> None:
    """Return when *fleet* may be committed; ConfigError with every problem when not.

    *is_open* tells whether machines elsewhere can join: whether this control plane can be reached over the network.
    """
    problems = check_fleet(fleet)
    if not problems:
        problems = (
            *_operators(fleet, tuple(member.id for member in members), is_open),
            *_bundles(fleet, blobs),
            *_capabilities(fleet, seen),
        )
    if problems:
        count = len(problems)
        raise ConfigError(
            f"{count} problem{'s' if count > 1 else ''} in the fleet",
            hint="nothing was changed",
            problems=[str(problem) for problem in problems[:PROBLEMS_MAX]],
        )


def _operators(fleet: Fleet, members: tuple[str, ...], is_open: bool) -> Iterator[Problem]:
    operators = {operator.name: operator for operator in fleet.operators}
    local: dict[str, str] = {}
    for tenement in fleet.tenements:
        operator = operators[tenement.operator]
        at = ("tenement", tenement.name, "operator")
        why = why_unavailable(operator)
        if why:
            yield Problem(at=at, message=why)
        if not isinstance(operator, LocalOperator):
            if not why and not is_open:
                message = (
                    "its machines join over the network, and this control plane is reachable from its own machine only:"
                    " `slum server init --address HOST` opens it"
                )
                yield Problem(at=at, message=message)
            continue
        if operator.member is None and len(members) > 1:
            message = f"with several members `member` must say whose machine it is: {', '.join(members)}"
            yield Problem(at=("operators", operator.name), message=message)
            continue
        member = operator.member or members[0]
        if member not in members:
            message = f"{member!r} is no member of this control plane; there is {', '.join(members)}"
            yield Problem(at=("operators", operator.name, "member"), message=message)
        elif (other := local.setdefault(member, tenement.name)) != tenement.name:
            yield Problem(at=at, message=f"is on the machine of tenement {other!r}; a machine holds one tenement")


def _bundles(fleet: Fleet, blobs: Blobs) -> Iterator[Problem]:
    for tenement in fleet.tenements:
        for service in tenement.services:
            at = ("tenement", tenement.name, "service", service.name, "source")
            if service.bundle is None:
                if service.source is not None:
                    yield Problem(at=at, message="its bundle is not named: pack and upload it first")
            elif not DIGEST.fullmatch(service.bundle) or not blobs.touch(service.bundle):
                yield Problem(at=at, message=f"its bundle {service.bundle[:64]} was not uploaded")


def _capabilities(fleet: Fleet, seen: Mapping[str, Seen]) -> Iterator[Problem]:
    for tenement in fleet.tenements:
        for machine in tenement.machine_names:
            known = seen.get(machine)
            if known is not None:
                levels = {status.level: status for status in known.hello.levels}
                yield from check_capabilities(fleet, machine, levels, known.hello.limits)
