"""fly.toml: one app for each image and instance, with its Dockerfile.

A Fly app has one image, one environment and one address; a tenement has as many as it has services. So services that
share source, build, variables and secrets become process groups of one app, at most one of them with an address, and
every other service and every instance id gets an app of its own. Pure. Keys as in flyctl's internal/appconfig.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import tomli_w

from slum.exports.base import File, Losses, Rendered, Site, service_path
from slum.exports.compose import duration
from slum.exports.container import DATA, Run, own_socket, run_of
from slum.exports.dockerfile import dockerfile, image_of, shell_line
from slum.exports.readme import fly_readme
from slum.exports.tomltext import tidy
from slum.model import (
    DEFAULT_ID,
    Deploy,
    Fleet,
    FlyOperator,
    Level,
    Listen,
    Operator,
    Restart,
    Service,
    Settings,
    Tenement,
    host_name,
)

OPERATOR = "fly"
ORG = "personal"
APP_NAME_MAX = 63
STEP_MB = 256
KILL_TIMEOUT_MAX_S = 300
CHECK_TIMEOUT = "5s"
VOLUME = "data"
CHDIR = ("/bin/sh", "-c", 'cd "$0" && exec "$@"')
"""What stands before a command that starts elsewhere: fly.toml has no key for it. The folder follows as $0."""

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
    _fleet_losses(fleet, groups, names, losses)
    alone = len({t.operator for t, _ in groups}) == 1
    for tenement in fleet.tenements:
        _tenement_losses(tenement, losses, alone=alone)
        for service in tenement.services:
            _service_losses(tenement, service, losses)
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


def internal_port(service: Service) -> int:
    """Return the port that the image serves on; the service's own port stays free for it."""
    return 8081 if service.port == 8080 else 8080


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
        size = f"{(machine or _DEFAULT).volume_gb}gb"
        document["mounts"] = [{"source": VOLUME, "destination": DATA, "initial_size": size, "processes": data}]
    if routed is not None:
        document |= _http_service(tenement, routed)
    document["restart"] = [_restart(tenement, run) for run in app.runs]
    document["vm"] = _vms(app, machine or _DEFAULT)
    return document


_DEFAULT = FlyOperator(name=OPERATOR, org=ORG, region="iad")


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
        "grace_period": duration(_within(service.startup_timeout_s, 1, 60)),
        "interval": duration(_within(tenement.settings.health_check_interval_s, 2, 60)),
        "timeout": CHECK_TIMEOUT,
    }
    if service.health is not None:
        http["checks"] = [{"method": "GET", "path": service.health, **times}]
        return {"http_service": http}
    check = {"type": "tcp", "port": internal_port(service), **times, "processes": [service.name]}
    return {"http_service": http, "checks": {"accepts": check}}


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _restart(tenement: Tenement, run: Run) -> Toml:
    kinds = {Restart.ALWAYS: "always", Restart.ON_FAILURE: "on-failure", Restart.NEVER: "never"}
    policy: Toml = {"policy": kinds[run.service.restart]}
    if run.service.restart is Restart.ON_FAILURE:
        policy["retries"] = tenement.settings.max_restarts
    return policy | {"processes": [run.service.name]}


def _vms(app: App, machine: FlyOperator) -> list[Toml]:
    kind: Toml = {"cpu_kind": machine.cpu_kind, "cpus": machine.cpus}
    found: list[Toml] = [kind | {"memory": f"{machine.memory_mb}mb"}]
    limited = [(run.service.name, memory) for run in app.runs if (memory := _memory_mb(run.service)) is not None]
    return found + [kind | {"memory": f"{memory}mb", "processes": [name]} for name, memory in limited]


def _memory_mb(service: Service) -> int | None:
    wanted = service.memory_limit_mb if service.memory_limit_mb is not None else service.memory_mb
    return None if wanted is None else math.ceil(wanted / STEP_MB) * STEP_MB


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


def _fleet_losses(
    fleet: Fleet, groups: Sequence[tuple[Tenement, tuple[Run, ...]]], names: Sequence[str], losses: Losses
) -> None:
    told = (fleet_of(n, t.name, r[0].service.name, r[0].id) for (t, r), n in zip(groups, names, strict=True))
    if next(filter(None, told), "default") != fleet.name:
        losses.add("fleet.name", fleet.name, "no app's name, of 63 characters, tells it beyond doubt", "another name")
    if fleet.domain != "localhost":
        losses.add(
            "fleet.domain", fleet.domain, "fly.toml names no hosts", "`fly certs add HOST --app APP`, see README.md"
        )
    used = {t.operator: t for t, _ in groups}
    mounted = {t.operator for t, runs in groups if any(run.uses_data for run in runs)}
    for operator in fleet.operators:
        at = f"operators.{operator.name}"
        if not isinstance(operator, FlyOperator):
            losses.add(at, f'type "{operator.__struct_config__.tag}"', "a fly.toml runs on Fly's machines only")
        elif operator.name != OPERATOR or operator.name not in used or len(used) > 1:
            losses.add(at, "its name", "fly.toml knows regions and sizes, not who asks for them")
        else:
            why = {
                "org": "an app's organisation is named when it is created",
                "image": "an app runs its own image, not slum's",
                "token_env": "flyctl has its own login",
                "secrets_ref": "flyctl has its own login",
            } | ({} if operator.name in mounted else {"volume_gb": "no service writes into its folder"})
            for key, reason in why.items():
                if getattr(operator, key) != getattr(_DEFAULT, key):
                    losses.add(
                        f"{at}.{key}",
                        str(getattr(operator, key)),
                        reason,
                        "`fly apps create --org`" if key == "org" else "",
                    )


def fleet_of(app: str, tenement: str, service: str, instance: str) -> str:
    """Return the fleet that an app's name tells, given the first of its services; "" when it tells none."""
    plain = f"-{tenement}-{service}"
    for end in (f"{plain}-{instance}", *((plain,) if instance == DEFAULT_ID else ())):
        if app.endswith(end):
            return app.removesuffix(end)
    return ""


def _tenement_losses(tenement: Tenement, losses: Losses, *, alone: bool) -> None:
    """Several operators' tenements come back with operators named by what their apps say of machines."""
    at = f"tenement.{tenement.name}"
    if not tenement.services:
        losses.add(at, "a machine without services", "an app has nothing to run there")
        return
    if tenement.operator != OPERATOR or not alone:
        losses.add(f"{at}.operator", tenement.operator, "a fly.toml runs on Fly's machines, whoever asks for them")
    if tenement.count > 1:
        losses.add(
            f"{at}.count",
            str(tenement.count),
            "fly.toml has no number of machines",
            f"`fly scale count {tenement.count}`",
        )
    if tenement.labels:
        names = ", ".join(label.name for label in tenement.labels)
        losses.add(f"{at}.labels", names, "fly.toml has no metadata", "`fly machine update --metadata`")
    if tenement.routing_listen != Tenement(name="x", operator="x").routing_listen:
        losses.add(f"{at}.routing.listen", ", ".join(tenement.routing_listen), "Fly answers on ports 80 and 443")
    reasons = {
        "data_dir": "an instance's folder is the app's volume",
        "restart_window_s": "Fly counts restarts in all",
        "backoff_base_ms": "Fly's own backoff cannot be set",
        "backoff_max_ms": "Fly's own backoff cannot be set",
    }
    if not any(service.restart is Restart.ON_FAILURE for service in tenement.services):
        reasons["max_restarts"] = "only an on-failure policy has a number of retries"
    interval = tenement.settings.health_check_interval_s
    if not any(service.listen is not Listen.NONE for service in tenement.services):
        reasons["health_check_interval_s"] = "no service is probed"
    elif _within(interval, 2, 60) != interval:
        reasons["health_check_interval_s"] = "Fly probes every 2 to 60 seconds"
    for field, why in reasons.items():
        value = getattr(tenement.settings, field)
        if value != getattr(Settings(), field):
            losses.add(f"{at}.settings.{field.removesuffix('_s')}", str(value), why)


def _service_losses(tenement: Tenement, service: Service, losses: Losses) -> None:
    def lost(key: str, what: object, why: str, instead: str = "") -> None:
        losses.add(service_path(tenement.name, service.name, key), str(what), why, instead)

    listens, default = service.listen is not Listen.NONE, Service(name="x", command=())
    runs = [run_of(tenement.name, service, one) for one in service.instances]
    if service.isolation is not Level.NAMESPACE:
        lost("isolation", f'"{service.isolation}"', "every Fly machine is a Firecracker VM of its own")
    if service.deploy is Deploy.OVERLAP and any(run.uses_data for run in runs):
        lost("deploy", '"overlap"', "a volume belongs to one machine", "keep data elsewhere, e.g. in a database")
    if service.pre_deploy is not None and any(run.uses_data for run in runs):
        lost("pre_deploy", "its data folder", "a release command runs on a machine without the volume")
    if list(service.instances) != sorted(service.instances):
        lost("instances", "their order", "apps have none", "the first id's app gets the service's own host name")
    if service.listen is Listen.PORT and len(tenement.services) > 1:
        where = f"127.0.0.1:{service.port}"
        lost("port", where, "every app is a machine of its own", f"APP.internal:{internal_port(service)}")
    for secret in service.secrets:
        lost(
            f"secrets.{secret.name}", secret.source, "fly.toml holds no secrets", f"`fly secrets set {secret.name}=...`"
        )
    if service.depends_on:
        lost("depends_on", ", ".join(service.depends_on), "apps start on their own", "let the program try again")
    if service.idle_timeout_s is not None:
        lost("idle_timeout", f"{service.idle_timeout_s:g} s", "Fly's proxy decides itself when a machine is idle")
    if service.request_timeout_s is not None:
        lost("request_timeout", f"{service.request_timeout_s:g} s", "Fly's proxy has no such limit")
    if service.drain_timeout_s != default.drain_timeout_s:
        lost("drain_timeout", f"{service.drain_timeout_s:g} s", "fly.toml has `kill_timeout` only")
    startup = service.startup_timeout_s
    if startup != default.startup_timeout_s and (not listens or _within(startup, 1, 60) != startup):
        lost("startup_timeout", f"{startup:g} s", "a grace period is 1 to 60 seconds, of a service that is probed")
    if service.stop_timeout_s > KILL_TIMEOUT_MAX_S:
        lost("stop_timeout", f"{service.stop_timeout_s:g} s", f"`kill_timeout` is at most {KILL_TIMEOUT_MAX_S} seconds")
    if service.memory_limit_mb != _memory_mb(service):
        lost("memory_limit_mb", service.memory_limit_mb, f"a machine's memory comes in steps of {STEP_MB} MB")
    for key, why in (
        ("cpu_shares", "a machine has its own CPUs"),
        ("pids_limit", "a machine has no such limit"),
        ("storage_quota_mb", "a volume's size is the limit"),
        ("rootfs", "a machine starts from an image"),
        ("kernel", "Fly has its own kernel"),
        ("memory_mb", "it is the machine's memory, which is the limit as well"),
        ("vcpus", "the operator's `cpus` are the machine's"),
    ):
        if (value := getattr(service, key)) is not None:
            lost(key, value, why)
    if service.image is not None and (image_of(service) is None or service.isolation is Level.VM):
        lost("image", service.image, "the Dockerfile builds on it" if image_of(service) else "it is no image reference")
    if service.socket is not None and own_socket(service) is None:
        lost("socket", service.socket, "an environment cannot name it safely", "letters, digits, `.`, `_`, `-` and `/`")
    if service.bundle is not None and service.source is None:
        lost("bundle", service.bundle[:12], "the bundle's files are with the control plane", "name a `source`")
