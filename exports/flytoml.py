"""fly.toml: one app for each image and instance, with its Dockerfile.

A Fly app has one image, one environment and one address; a tenement has as many as it has services. So services that
share source, build, variables and secrets become process groups of one app, at most one of them with an address, and
every other service and every instance id gets an app of its own. Pure. Keys as in flyctl's internal/appconfig.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import tomli_w

from slum.exports.base import File, Losses, Rendered, Site
from slum.exports.compose import duration
from slum.exports.container import DATA, Run, run_of
from slum.exports.dockerfile import dockerfile, shell_line
from slum.exports.fly_losses import fleet_losses, service_losses, tenement_losses
from slum.exports.flyrules import (
    APP_NAME_MAX,
    CHDIR,
    CHECK_TIMEOUT,
    KILL_TIMEOUT_MAX_S,
    USUAL,
    VOLUME,
    internal_port,
    memory_mb_of,
    within,
)
from slum.exports.readme import fly_readme
from slum.exports.tomltext import tidy
from slum.model import (
    DEFAULT_ID,
    Deploy,
    Fleet,
    FlyOperator,
    Listen,
    Operator,
    Restart,
    Tenement,
    host_name,
)

Toml = dict[str, Any]


class App(msgspec.Struct, frozen=True, kw_only=True):
    """Instances that one app runs, as process groups; the first is the one with an address, if any has one."""

    name: str
    runs: tuple[Run, ...]

    @property
    def routed(self) -> Run | None:
        return next((run for run in self.runs if run.service.listen is not Listen.NONE), None)


def export_fly(fleet: Fleet, site: Site) -> Rendered:
    """Return one folder an app, and what fly.toml cannot say."""
    losses = Losses()
    files: list[File] = []
    told: list[tuple[str, str, str, Sequence[str]]] = []
    operators = {operator.name: operator for operator in fleet.operators}
    groups = [(t, group) for t in fleet.tenements for group in _groups(t)]
    names = _names(fleet, groups)
    for (tenement, runs), name in zip(groups, names, strict=True):
        app = App(name=name, runs=runs)
        files += _app_files(tenement, app, operators.get(tenement.operator), site)
        told.append(
            (
                name,
                name,
                site.folder(tenement.name, runs[0].service) if runs[0].service.source else ".",
                tuple(_commands(fleet, app)),
            )
        )
    fleet_losses(fleet, groups, names, losses)
    alone = len({t.operator for t, _ in groups}) == 1
    for tenement in fleet.tenements:
        tenement_losses(tenement, losses, alone=alone)
        for service in tenement.services:
            service_losses(tenement, service, losses)
    if files:
        files.append(File(path="README.md", text=fly_readme(fleet, told, losses.all())))
    return Rendered(files=tuple(files), losses=losses.all())


def _groups(tenement: Tenement) -> list[tuple[Run, ...]]:
    """Return the instances of *tenement*, those together that one app can run; the one with an address first."""
    found: dict[object, list[Run]] = {}
    for service in tenement.services:
        for one in service.instances:
            run = run_of(tenement.name, service, one)
            alike = (one, service.source, service.build, service.image, run.env, service.secrets, service.pre_deploy)
            key: object = (*alike, service.deploy, service.stop_timeout_s)
            members = found.setdefault(key, [])
            if service.listen is not Listen.NONE and any(m.service.listen is not Listen.NONE for m in members):
                key = (key, service.name)
            found.setdefault(key, []).append(run)
    return [
        tuple(sorted(members, key=lambda run: (run.service.listen is Listen.NONE, run.service.name)))
        for members in found.values()
        if members
    ]


def _names(fleet: Fleet, groups: Sequence[tuple[Tenement, tuple[Run, ...]]]) -> list[str]:
    """Return an app's name for each group: FLEET-TENEMENT-SERVICE[-ID], with a digest where that is long or not unique."""
    plain = []
    for tenement, runs in groups:
        lead = runs[0]
        parts = [fleet.name, tenement.name, lead.service.name]
        plain.append("-".join(parts if lead.service.instances == (DEFAULT_ID,) else [*parts, lead.id]))
    counts = Counter(plain)
    names = []
    for (tenement, runs), name in zip(groups, plain, strict=True):
        if len(name) > APP_NAME_MAX or counts[name] > 1:
            whole = "/".join((fleet.name, tenement.name, runs[0].service.name, runs[0].id))
            digest = hashlib.sha256(whole.encode()).hexdigest()[:10]
            name = f"{name[: APP_NAME_MAX - 11].rstrip('-')}-{digest}"
        names.append(name)
    return names


def _app_files(tenement: Tenement, app: App, operator: Operator | None, site: Site) -> Iterator[File]:
    lead = app.runs[0].service
    machine = operator if isinstance(operator, FlyOperator) else None
    head = (
        f"# {tenement.name}: deploy with the command in README.md. What slum says and this file cannot: losses.json.\n"
    )
    yield File(path=f"{app.name}/fly.toml", text=head + _text(_toml(tenement, app, machine)))
    routed = app.routed
    tcp = "-" if routed is None else f"{internal_port(routed.service)}:{routed.service.name}"
    context = site.folder(tenement.name, lead, up="../") if lead.source is not None else None
    copy = "" if lead.source is not None else None
    yield File(path=f"{app.name}/Dockerfile", text=dockerfile(lead, copy=copy, context=context, tcp=tcp))


def _text(document: Toml) -> str:
    """Return *document* with the checks of its http_service as a table of their own."""
    http = document.get("http_service", {})
    checks = {"http_service": {"checks": http["checks"]}} if "checks" in http else {}
    rest = document | ({"http_service": {k: v for k, v in http.items() if k != "checks"}} if checks else {})
    before, mark, after = tidy(tomli_w.dumps(rest)).partition("\n[http_service]\n")
    if not checks:
        return before + mark + after
    own, blank, others = after.partition("\n\n")
    made = "".join(
        "\n\n[[http_service.checks]]\n" + tomli_w.dumps(check).rstrip() for check in checks["http_service"]["checks"]
    )
    return before + mark + own + made + blank + others


def _toml(tenement: Tenement, app: App, machine: FlyOperator | None) -> Toml:
    lead = app.runs[0]
    routed = app.routed
    document: Toml = {"app": app.name}
    if machine is not None:
        document["primary_region"] = machine.region
    document |= {
        "kill_signal": "SIGTERM",
        "kill_timeout": duration(min(lead.service.stop_timeout_s, KILL_TIMEOUT_MAX_S)),
    }
    document["build"] = {"dockerfile": "Dockerfile"}
    document["deploy"] = {"strategy": "bluegreen" if _overlaps(app) else "rolling"}
    if lead.service.pre_deploy is not None:
        document["deploy"]["release_command"] = shell_line(("/bin/sh", "-c", lead.service.pre_deploy))
    document["env"] = _own(lead) | {v.name: v.value for v in lead.env}
    document["processes"] = {run.service.name: _process(run) for run in app.runs}
    data = [run.service.name for run in app.runs if run.uses_data]
    if data:
        size = f"{(machine or USUAL).volume_gb}gb"
        document["mounts"] = [{"source": VOLUME, "destination": DATA, "initial_size": size, "processes": data}]
    if routed is not None:
        document |= _http_service(tenement, routed)
    document["restart"] = [_restart(tenement, run) for run in app.runs]
    document["vm"] = _vms(app, machine or USUAL)
    return document


def _own(run: Run) -> dict[str, str]:
    """Fly tells a machine its process group, which is the service's name."""
    return {name: value for name, value in run.own.items() if name != "SLUM_SERVICE"}


def _process(run: Run) -> str:
    return shell_line(run.command if run.workdir is None else (*CHDIR, run.workdir, *run.command))


def _overlaps(app: App) -> bool:
    """Tell whether old and new machines may run side by side: it is asked for, and no volume ties them."""
    return app.runs[0].service.deploy is Deploy.OVERLAP and not any(run.uses_data for run in app.runs)


def _http_service(tenement: Tenement, run: Run) -> Toml:
    service = run.service
    sleeps = service.idle_timeout_s is not None
    http: Toml = {
        "internal_port": internal_port(service),
        "force_https": True,
        "auto_stop_machines": "stop" if sleeps else "off",
        "auto_start_machines": True,
        "min_machines_running": 0 if sleeps else 1,
        "processes": [service.name],
    }
    times = {
        "grace_period": duration(within(service.startup_timeout_s, 1, 60)),
        "interval": duration(within(tenement.settings.health_check_interval_s, 2, 60)),
        "timeout": CHECK_TIMEOUT,
    }
    if service.health is not None:
        http["checks"] = [{"method": "GET", "path": service.health, **times}]
        return {"http_service": http}
    check = {"type": "tcp", "port": internal_port(service), **times, "processes": [service.name]}
    return {"http_service": http, "checks": {"accepts": check}}


def _restart(tenement: Tenement, run: Run) -> Toml:
    kinds = {Restart.ALWAYS: "always", Restart.ON_FAILURE: "on-failure", Restart.NEVER: "never"}
    policy: Toml = {"policy": kinds[run.service.restart]}
    if run.service.restart is Restart.ON_FAILURE:
        policy["retries"] = tenement.settings.max_restarts
    return policy | {"processes": [run.service.name]}


def _vms(app: App, machine: FlyOperator) -> list[Toml]:
    kind: Toml = {"cpu_kind": machine.cpu_kind, "cpus": machine.cpus}
    found: list[Toml] = [kind | {"memory": f"{machine.memory_mb}mb"}]
    limited = [(run.service.name, memory) for run in app.runs if (memory := memory_mb_of(run.service)) is not None]
    return found + [kind | {"memory": f"{memory}mb", "processes": [name]} for name, memory in limited]


def _commands(fleet: Fleet, app: App) -> Iterator[str]:
    """What fly.toml cannot hold and one command says: secrets and host names. Never a value."""
    for secret in app.runs[0].service.secrets:
        kind, _, where = secret.source.partition(":")
        value = f'"${where}"' if kind == "env" else f'"$(cat {shell_line((where,))})"'
        yield f"fly secrets set {secret.name}={value} --stage --app {app.name}"
    if app.routed is not None and "." in fleet.domain:
        name, first = app.routed.service.name, app.routed.service.instances[0]
        hosts = [host_name(name, app.routed.id, fleet.domain)]
        hosts += [host_name(name, None, fleet.domain)] if app.routed.id == first else []
        yield from (f"fly certs add {host} --app {app.name}" for host in hosts)
