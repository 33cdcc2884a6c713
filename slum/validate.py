"""Judge a fleet: every rule that needs no file, checked over the model and answered as a tuple of problems.

The same rules hold for a fleet that fleetfile read and for one that a client sent, so nothing here may assume that the
names, numbers and texts of the model are sane. Problems speak the files' words (``drain_timeout``, not the model's
``drain_timeout_s``) and name the place by its keys. Pure: what a machine can do arrives as an argument.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter

from slum import credentials
from slum.model import NAME_PATTERN, Fleet, Listen, LocalOperator, Service, Settings, SshOperator, Tenement
from slum.problem import At, Problem, Range, nearest, shown
from slum.validate_operator import check_labels, check_operator
from slum.validate_service import PATH_MAX, check_path, check_ranges, check_service, check_text, repeated
from slum.wire import LevelStatus

OPERATORS_MAX = 100
TENEMENTS_MAX = 1000
SERVICES_MAX = 2000
"""In one tenement."""
FLEET_INSTANCES_MAX = 100_000
TENEMENT_RANGES: Mapping[str, Range] = {"count": Range(low=1, high=1000)}
SETTINGS_RANGES: Mapping[str, Range] = {
    "health_check_interval_s": Range(low=0.1, high=3600),
    "max_restarts": Range(low=0, high=1000),
    "restart_window_s": Range(low=1, high=86_400),
    "backoff_base_ms": Range(low=1, high=3_600_000),
    "backoff_max_ms": Range(low=1, high=3_600_000),
}
LISTEN_MAX = 16

_NAME = re.compile(NAME_PATTERN)
_DOMAIN = re.compile(r"(?=.{1,170}$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")
_UNUSABLE_FOLDERS = ("/", "/proc", "/sys", "/dev", "/etc", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/boot", "/root")


def check_fleet(fleet: Fleet) -> tuple[Problem, ...]:
    """Return all that is wrong with *fleet*, in the order of the model; empty when it may be applied."""
    return tuple(_check_fleet(fleet))


def check_credentials(fleet: Fleet) -> tuple[Problem, ...]:
    """Return a warning for each `env` value that looks like a credential: env is stored and shown in the clear."""
    return tuple(
        Problem(
            at=("tenement", tenement.name, "service", service.name, "env", variable.name),
            message=f"looks like a credential; `env` is not secret, put it under [service.{service.name}.secrets]",
        )
        for tenement in fleet.tenements
        for service in tenement.services
        for variable in service.env
        if credentials.is_credential(variable.name, variable.value)
    )


WITHOUT_EFFECT = {
    "idle_timeout": "services are not put to sleep yet",
    "request_timeout": "the router does not cut requests off yet",
}
"""Keys that are read and kept (exports use them), but that the node does not act on; see docs/status.md."""


def check_effects(fleet: Fleet) -> tuple[Problem, ...]:
    """Return a warning for each key that is asked for and has no effect in this version."""
    return tuple(
        Problem(
            at=("tenement", tenement.name, "service", service.name, key),
            message=f"has no effect in this version: {why}",
        )
        for tenement in fleet.tenements
        for service in tenement.services
        for key, why in WITHOUT_EFFECT.items()
        if getattr(service, f"{key}_s") is not None
    )


def check_capabilities(
    fleet: Fleet, machine: str, levels: Mapping[str, LevelStatus], limits: str
) -> tuple[Problem, ...]:
    """Return what *machine* (a tenement's, by name) cannot do of what its services ask, each with why and the fix.

    *levels* is what the machine proved, by isolation level; *limits* names what enforces limits there ("cgroup v1"), or
    is empty when nothing does. A machine that no tenement has needs nothing.
    """
    tenement = next((t for t in fleet.tenements if machine in t.machine_names), None)
    return () if tenement is None else tuple(_check_capabilities(tenement, machine, levels, limits))


def _check_capabilities(
    tenement: Tenement, machine: str, levels: Mapping[str, LevelStatus], limits: str
) -> Iterator[Problem]:
    for service in tenement.services:
        at: At = ("tenement", tenement.name, "service", service.name)
        status = levels.get(service.isolation)
        if status is None or not status.available:
            why = status.detail if status else "this version of slum has no runner for it"
            fix = f"; {status.fix}" if status and status.fix else ""
            message = f'"{service.isolation}" is not available on {machine}: {why}{fix}'
            yield Problem(at=(*at, "isolation"), message=message)
        for key in ("memory_limit_mb", "cpu_shares", "pids_limit"):
            if getattr(service, key) is not None and not limits:
                message = f"no limits work on {machine}: no cgroup controller is usable; see `slum doctor`"
                yield Problem(at=(*at, key), message=message)
        if service.storage_quota_mb is not None and "storage" not in limits:
            message = f"storage quotas are not available on {machine}; remove it"
            yield Problem(at=(*at, "storage_quota_mb"), message=message)


def _check_fleet(fleet: Fleet) -> Iterator[Problem]:
    yield from _check_name(fleet.name, ("fleet", "name"))
    if not _DOMAIN.fullmatch(fleet.domain):
        yield Problem(at=("fleet", "domain"), message=f"{shown(fleet.domain)} is no lower-case domain name")
    instances = sum(t.count * sum(len(s.instances) for s in t.services) for t in fleet.tenements if 0 < t.count < 10**6)
    for at, what, count, most in (
        (("operators",), "operators", len(fleet.operators), OPERATORS_MAX),
        (("tenement",), "tenements", len(fleet.tenements), TENEMENTS_MAX),
        (
            ("tenement",),
            "services in one tenement",
            max((len(t.services) for t in fleet.tenements), default=0),
            SERVICES_MAX,
        ),
        (("tenement",), "instances", instances, FLEET_INSTANCES_MAX),
    ):
        if count > most:  # looking further at a fleet of any size would take any time
            yield Problem(at=at, message=f"{count:,} {what} are more than {most:,}")
            return
    yield from repeated(tuple(o.name for o in fleet.operators), ("operators",))
    for operator in fleet.operators:
        place: At = ("operators", operator.name)
        yield from _check_name(operator.name, place)
        yield from check_operator(operator, place)
    yield from repeated(tuple(t.name for t in fleet.tenements), ("tenement",))
    for tenement in fleet.tenements:
        yield from _check_tenement(fleet, tenement)
    yield from _check_machines(fleet)


def _check_name(name: str, at: At) -> Iterator[Problem]:
    if not _NAME.fullmatch(name):
        yield Problem(at=at, message=f"{shown(name)} is no name: 1 to 32 of a-z, 0-9 and inner dashes")


def _check_tenement(fleet: Fleet, tenement: Tenement) -> Iterator[Problem]:
    at: At = ("tenement", tenement.name)
    yield from _check_name(tenement.name, at)
    yield from check_ranges(tenement, TENEMENT_RANGES, at)
    known = [operator.name for operator in fleet.operators]
    if tenement.operator not in known:
        message = f"{shown(tenement.operator)} is no operator of this fleet{nearest(tenement.operator, known)}"
        yield Problem(at=(*at, "operator"), message=message)
    if tenement.config is not None:
        yield from check_text(tenement.config, (*at, "config"), PATH_MAX)
    yield from check_labels(tuple((label.name, label.value) for label in tenement.labels), (*at, "labels"))
    yield from _check_settings(tenement.settings, (*at, "settings"))
    yield from repeated(tuple(s.name for s in tenement.services), (*at, "service"))
    for service in tenement.services:
        place = (*at, "service", service.name)
        yield from _check_name(service.name, place)
        yield from check_service(service, place)
    yield from _check_dependencies(tenement, at)
    yield from _check_ports(tenement, at)


def _check_settings(settings: Settings, at: At) -> Iterator[Problem]:
    yield from check_ranges(settings, SETTINGS_RANGES, at)
    if settings.backoff_base_ms > settings.backoff_max_ms:
        message = f"{settings.backoff_base_ms} is more than backoff_max_ms, {settings.backoff_max_ms}"
        yield Problem(at=(*at, "backoff_base_ms"), message=message)
    folder = settings.data_dir
    if folder is not None:
        place = (*at, "data_dir")
        yield from check_path(folder, place)
        clean = "/" + "/".join(part for part in folder.split("/") if part not in ("", "."))
        if not folder.startswith(("/", "~")):
            yield Problem(at=place, message=f"{shown(folder)} is not an absolute path")
        elif clean in _UNUSABLE_FOLDERS or clean.startswith(("/proc/", "/sys/", "/dev/")):
            yield Problem(at=place, message=f"{shown(folder)} belongs to the system; choose a folder of its own")
        elif "{" in folder:
            yield Problem(at=place, message="takes no placeholders; every instance gets a folder of its own below it")


def _check_dependencies(tenement: Tenement, at: At) -> Iterator[Problem]:
    known = {service.name for service in tenement.services}
    graph: dict[str, set[str]] = {}
    for service in tenement.services:
        place = (*at, "service", service.name, "depends_on")
        yield from repeated(service.depends_on, place)
        for other in service.depends_on:
            if other == service.name:
                yield Problem(at=place, message="a service cannot depend on itself")
            elif other not in known:
                message = f"{shown(other)} is no service of this tenement{nearest(other, known)}"
                yield Problem(at=place, message=message)
        graph[service.name] = {other for other in service.depends_on if other in known and other != service.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle = list(reversed(error.args[1][:-1]))  # graphlib lists what is needed before what needs it
        first = cycle.index(min(cycle))
        cycle = cycle[first:] + cycle[:first]
        path = " -> ".join([*cycle, cycle[0]]) if len(cycle) <= 10 else " -> ".join([*cycle[:10], "..."])
        yield Problem(at=(*at, "service", cycle[0], "depends_on"), message=f"is a cycle: {path}")


def _check_ports(tenement: Tenement, at: At) -> Iterator[Problem]:
    """The router's addresses and the services' ports; all share the machine's network."""
    place = (*at, "routing", "listen")
    if not 1 <= len(tenement.routing_listen) <= LISTEN_MAX:
        message = f"{len(tenement.routing_listen)} addresses are not between 1 and {LISTEN_MAX}"
        yield Problem(at=place, message=message)
        return
    router: set[tuple[str, int]] = set()
    for text in tenement.routing_listen:
        address = parse_listen(text)
        if address is None:
            message = f'{shown(text)} is no address and port such as "127.0.0.1:8080" or "[::1]:8080"'
            yield Problem(at=place, message=message)
        elif any(_same_place(address, other) for other in router):
            yield Problem(at=place, message=f"{shown(text)} clashes with another address of the router")
        else:
            router.add(address)
    router_ports = {port for _, port in router}
    by_port: dict[int, Service] = {}
    for service in sorted(tenement.services, key=lambda s: s.name):
        if service.listen is not Listen.PORT or service.port is None:
            continue
        where = (*at, "service", service.name, "port")
        if service.port in router_ports:
            yield Problem(at=where, message=f"{service.port} is the router's port")
        if (other := by_port.setdefault(service.port, service)) is not service:
            yield Problem(at=where, message=f"{service.port} is the port of service {other.name} too")


def parse_listen(text: str) -> tuple[str, int] | None:
    """Return (IP address, port) of "127.0.0.1:8080" or "[::1]:8080", or None when it is neither."""
    found = re.fullmatch(r"(?:([0-9.]{7,15})|\[([0-9a-fA-F:.]{2,45})\]):([1-9][0-9]{0,4})", text)
    if found is None or int(found[3]) > 65535:
        return None
    try:
        return str(ipaddress.IPv4Address(found[1]) if found[1] else ipaddress.IPv6Address(found[2])), int(found[3])
    except ValueError:
        return None


def _same_place(one: tuple[str, int], other: tuple[str, int]) -> bool:
    families = {":" in one[0], ":" in other[0]}
    return (
        one[1] == other[1]
        and len(families) == 1
        and (one[0] == other[0] or {one[0], other[0]} & {"0.0.0.0", "::"} != set())
    )


def _check_machines(fleet: Fleet) -> Iterator[Problem]:
    """Machine names are unique over all tenements; a local or ssh operator has only so many machines."""
    counted = [t for t in fleet.tenements if t.count in range(1, 1001)]
    owners: dict[str, Tenement] = {}
    for tenement in counted:
        for name in tenement.machine_names:
            if len(name) > 32:
                message = f"with count {tenement.count} its machine {shown(name)} has a name over 32 characters"
                yield Problem(at=("tenement", tenement.name), message=message)
                break
            if (other := owners.setdefault(name, tenement)) is not tenement and other.name != tenement.name:
                message = f"its machine {shown(name)} has the name of one of tenement {shown(other.name)}"
                yield Problem(at=("tenement", tenement.name), message=message)
    operators = {operator.name: operator for operator in fleet.operators}
    wanted: Counter[str] = Counter()
    hosts: dict[str | None, Tenement] = {}
    for tenement in counted:
        operator = operators.get(tenement.operator)
        at: At = ("tenement", tenement.name)
        wanted[tenement.operator] += tenement.count
        if isinstance(operator, LocalOperator):
            if tenement.count > 1:
                message = f'{tenement.count} is more than the one machine of a "local" operator'
                yield Problem(at=(*at, "count"), message=message)
            if (other := hosts.setdefault(operator.member, tenement)) is not tenement:
                message = f"is on the machine of tenement {shown(other.name)}; a machine holds one tenement"
                yield Problem(at=(*at, "operator"), message=message)
        if isinstance(operator, SshOperator) and wanted[operator.name] > len(operator.hosts):
            message = f"the tenements of {shown(operator.name)} need {wanted[operator.name]} machines, "
            yield Problem(at=(*at, "count"), message=message + f"it has {len(operator.hosts)} hosts")
