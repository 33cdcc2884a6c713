"""Read Compose files as a fleet: those that `slum export compose` wrote give the same fleet, a stranger's the nearest one.

Whatever a file says that a fleet cannot hold becomes a loss with its place in that file. No variable, secret or file
beside the ones given is read. Pure.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Any

import msgspec

from slum.errors import ConfigError
from slum.exports.assemble import Found, name_of, tenement_of
from slum.exports.base import Imported, Losses
from slum.exports.caddyfile import read_timeouts
from slum.exports.compose import PRE_DEPLOY
from slum.exports.compose_service import read_service
from slum.exports.compose_shape import SECRETS, SERVICE, shaped
from slum.exports.compose_variables import Project
from slum.exports.interpolation import fill
from slum.exports.yamltext import load
from slum.model import Fleet, Level, LocalOperator, Operator, Settings, SshHost, SshOperator, Tenement

TOP_LEVEL = ("version", "name", "services", "volumes", "secrets", "networks")
"""What is read, or means nothing to a fleet by itself."""


def import_compose(files: Mapping[str, str]) -> Imported:
    """Return the fleet that the Compose files in *files* declare, one tenement each; the others lie beside them."""
    losses = Losses()
    projects = [path for path in files if path.endswith((".yaml", ".yml"))]
    read = [_project(path, files, losses) for path in projects]
    names = [project.tenement for project in read]
    for number, project in enumerate(read):
        if project.tenement in names[:number]:
            raise ConfigError(f"{projects[number]} declares tenement {project.tenement} as another file does")
    if len(read) <= 1:
        operator: Operator = LocalOperator(name="local")
    else:
        operator = SshOperator(name="machines", hosts=tuple(SshHost(host=name) for name in sorted(names)))
        losses.add("operators.machines.hosts", ", ".join(sorted(names)), "Compose files name no machines", "name them")
    tenements = [_tenement(project, operator.name, losses) for project in read]
    fleet = Fleet(
        name=next((p.fleet for p in read if p.fleet), "default"),
        domain=next((p.domain for p in read if p.domain), "localhost"),
        operators=(operator,),
        tenements=tuple(sorted(tenements, key=lambda t: t.name)),
    )
    return Imported(fleet=fleet, losses=losses.all())


def companions(path: str, text: str) -> tuple[str, ...]:
    """Return the files that tell more of *path*, relative to its folder and below it: Caddyfile and Dockerfiles."""
    found = {"Caddyfile"}
    document = load(text, path)
    services = document.get("services") if isinstance(document, dict) else None
    for service in services.values() if isinstance(services, dict) else ():
        build = service.get("build") if isinstance(service, dict) else None
        if isinstance(build, str | dict):
            found.add(dockerfile_of("", build))
    return tuple(sorted(name for name in found if not posixpath.isabs(name) and not name.startswith("../")))


def dockerfile_of(folder: str, build: str | dict[str, Any]) -> str:
    """Return where the Dockerfile of a `build` lies, relative as *folder* is."""
    table = {"context": build} if isinstance(build, str) else build
    context = str(table.get("context", "."))
    return posixpath.normpath(posixpath.join(folder, context, str(table.get("dockerfile", "Dockerfile"))))


def _project(path: str, files: Mapping[str, str], losses: Losses) -> Project:
    document = load(files[path], path)
    if not isinstance(document, dict) or not isinstance(document.get("services"), dict):
        raise ConfigError(f"{path}: has no `services`", hint="is it a Compose file?")
    for key in document:
        if key not in TOP_LEVEL and not str(key).startswith("x-"):
            losses.add(str(key), "the whole section", "a fleet has nothing like it")
    folder = posixpath.dirname(path)
    for network, settings in _table(document.get("networks")).items():
        if network != "default" or settings:
            losses.add(f"networks.{network}", "a network", "a tenement's services share its loopback")
    services: dict[str, Any] = {
        str(name): shaped({} if value is None else value, SERVICE, f"{path}: services.{name}")
        for name, value in document["services"].items()
    }
    routers = [name for name in services if _is_router(services[name])]
    router = services.pop(routers[0]) if routers else {}
    caddyfile = files.get(posixpath.join(folder, "Caddyfile"), "") if router else ""
    ours = [_environment(service) for service in services.values()]
    tenement = next((env["SLUM_TENEMENT"] for env in ours if "SLUM_TENEMENT" in env), "")
    named = fill(str(document.get("name") or "")).text
    domain = fill(str(_environment(router).get("DOMAIN", ""))).text
    if tenement and named.endswith(f"-{tenement}"):
        fleet = named.removesuffix(f"-{tenement}")
    else:
        fleet = name_of(named) if named else ""
        tenement = name_of(tenement or "here")
    return Project(
        path=path,
        folder=folder,
        fleet=fleet,
        domain=domain,
        tenement=tenement,
        listen=tuple(str(port).rpartition(":")[0] for port in router.get("ports", ())),
        services=services,
        volumes=_table(document.get("volumes")),
        secrets=shaped(_table(document.get("secrets")), SECRETS, f"{path}: secrets"),
        timeouts=read_timeouts(caddyfile),
        files=files,
    )


def _table(value: object) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def _environment(service: Mapping[str, Any]) -> dict[str, str]:
    env = service.get("environment")
    return {str(k): str(v) for k, v in env.items() if v is not None} if isinstance(env, dict) else {}


def _is_router(service: Mapping[str, Any]) -> bool:
    """Tell whether it is the Caddy of an export: its Caddyfile beside it, and the domain as its only variable."""
    mounts = service.get("volumes")
    ours = isinstance(mounts, list) and "./Caddyfile:/etc/caddy/Caddyfile:ro" in mounts
    return ours and list(_environment(service)) == ["DOMAIN"]


def _tenement(project: Project, operator: str, losses: Losses) -> Tenement:
    found: list[Found] = []
    labels: dict[str, str] = {}
    intervals: list[float] = []
    once = {name.removesuffix(PRE_DEPLOY): s for name, s in project.services.items() if name.endswith(PRE_DEPLOY)}
    plain = {name: s for name, s in project.services.items() if not name.endswith(PRE_DEPLOY)}
    names: dict[str, str] = {}
    for name, service in plain.items():
        ours = _environment(service).get("SLUM_SERVICE")
        names[name] = ours or name_of(name, tuple(names.values()))
        if ours is None and names[name] != name:
            losses.add(f"services.{name}", names[name], "slum's names are of a-z, 0-9 and inner dashes, at most 32")
    for name, service in plain.items():
        read = read_service(project, name, service, names, once.get(name), losses)
        found += read.found
        labels |= read.labels
        intervals += [] if read.interval_s is None else [read.interval_s]
    found = _apart(found, losses)
    return tenement_of(
        project.tenement,
        operator,
        found,
        losses,
        settings=Settings(health_check_interval_s=min(intervals, default=Settings().health_check_interval_s)),
        labels=labels,
        routing=project.listen,
    )


def _apart(found: list[Found], losses: Losses) -> list[Found]:
    """Containers may all listen on one port; programs that share a machine may not."""
    ports: dict[int, str] = {}
    kept = []
    for item in found:
        port, service = item.service.port, item.service
        if port is not None and ports.setdefault(port, service.name) != service.name:
            free = next(number for number in range(port + 1, 65536) if number not in ports)
            ports[free] = service.name
            what, why = (
                f"port {port} becomes {free}",
                f"{ports[port]} has it, and services of a tenement share a network",
            )
            losses.add(f"services.{service.name}.ports", what, why, "let the program listen on $PORT")
            service = msgspec.structs.replace(service, port=free)
        if service.image is not None and service.isolation not in (Level.SANDBOX, Level.VM):
            service = msgspec.structs.replace(service, isolation=Level.SANDBOX)
        kept.append(msgspec.structs.replace(item, service=service))
    return kept
