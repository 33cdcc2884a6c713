"""Compose files: one folder a tenement, with compose.yaml, a Caddyfile and a Dockerfile for each service.

A tenement is one machine whose services share its loopback and are reached through one router, by host name. So the
containers of its services join the router's network, listen on the same sockets and ports as before, and Caddy serves the
same names. Levels that cannot share a kernel's sockets (gVisor, Kata) get the tenement's network and a TCP port. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slum.exports.base import File, Losses, Rendered, Site, service_path
from slum.exports.caddyfile import Upstream, caddyfile
from slum.exports.container import DATA, RUN, Run, own_socket, run_of
from slum.exports.dockerfile import dockerfile, image_of
from slum.exports.readme import compose_readme
from slum.exports.yamltext import dump
from slum.model import (
    DEFAULT_ID,
    Deploy,
    Fleet,
    Level,
    Listen,
    LocalOperator,
    Restart,
    Secret,
    Service,
    Settings,
    Tenement,
)

RUNTIMES = {Level.SANDBOX: "runsc", Level.VM: "io.containerd.kata.v2"}
"""Docker's alternative runtimes: gVisor and Kata Containers."""
RESTARTS = {Restart.ALWAYS: "always", Restart.ON_FAILURE: "on-failure", Restart.NEVER: "no"}
SHARES_PER_WEIGHT = 10.24
"""Docker counts 1024 where cgroup v2 counts 100."""
PRE_DEPLOY = ".pre-deploy"
PROBE_TIMEOUT = "5s"

Yaml = dict[str, Any]


def export_compose(fleet: Fleet, site: Site) -> Rendered:
    """Return one folder of files a tenement, and what Compose cannot say."""
    losses = Losses()
    told = [tenement for tenement in fleet.tenements if tenement.services]
    here = len(told) == 1 and _is_here(fleet, told[0])
    files = [file for tenement in told for file in _tenement_files(fleet, tenement, site, losses, here=here)]
    _fleet_losses(fleet, told, losses, here=here)
    if files:
        files.append(File(path="README.md", text=compose_readme(fleet, tuple(told), losses.all())))
    return Rendered(files=tuple(files), losses=losses.all())


def duration(seconds: float) -> str:
    """Return *seconds* as Go and Compose write durations."""
    text = repr(float(seconds))
    text = f"{seconds:.9f}".rstrip("0") if "e" in text else text.removesuffix(".0")
    return f"{text}s"


def compose_name(service: Service, id: str) -> str:
    """Return the name of an instance among a tenement's containers; dots keep ids and services apart."""
    return service.name if service.instances == (DEFAULT_ID,) else f"{service.name}.{id}"


def _is_here(fleet: Fleet, tenement: Tenement) -> bool:
    """Tell whether "the machine where it is started" is all that *fleet* says of machines."""
    return fleet.operators == (LocalOperator(name="local"),) and tenement.operator == "local"


def _fleet_losses(fleet: Fleet, told: list[Tenement], losses: Losses, *, here: bool) -> None:
    routed = any(service.listen is not Listen.NONE for tenement in told for service in tenement.services)
    if fleet.name != "default" and not told:
        losses.add("fleet.name", fleet.name, "there is nothing to run, so there is no file that could name it")
    if fleet.domain != "localhost" and not routed:
        losses.add("fleet.domain", fleet.domain, "no service takes requests, so there is no router that could serve it")
    if not here:
        for operator in fleet.operators:
            losses.add(
                f"operators.{operator.name}",
                f'type "{operator.__struct_config__.tag}"',
                "Compose runs on the machine where it is started and makes none",
                "make the machines first (`slum export terraform`), then start each tenement's folder on its machine",
            )
    for tenement in fleet.tenements:
        if not tenement.services:
            losses.add(f"tenement.{tenement.name}", "a machine without services", "Compose has nothing to run on it")


def _tenement_files(fleet: Fleet, tenement: Tenement, site: Site, losses: Losses, *, here: bool) -> Iterator[File]:
    at = f"tenement.{tenement.name}"
    if not here:
        losses.add(f"{at}.operator", tenement.operator, "Compose makes no machines", "start its folder on its machine")
    if tenement.count > 1:
        losses.add(f"{at}.count", str(tenement.count), "a project is one machine", "start the folder on each of them")
    project: Yaml = {"name": f"{fleet.name}-{tenement.name}"}
    services: Yaml = {}
    upstreams: list[Upstream] = []
    runs = [run_of(tenement.name, service, one) for service in tenement.services for one in service.instances]
    routed = [run for run in runs if run.service.listen is not Listen.NONE]
    by_name = {service.name: service for service in tenement.services}
    router = "caddy" if "caddy" not in by_name else "caddy.router"
    for run in runs:
        services |= _instance(tenement, run, by_name, site, router=router if routed else "")
        if run.service.listen is not Listen.NONE:
            upstreams.append(_upstream(run))
    volumes = _volumes(runs)
    if routed:
        services = {router: _router(fleet, tenement, routed), **services}
        volumes |= {"caddy.data": {}} if _has_tls(tenement) else {}
        text = caddyfile(fleet.domain, tenement.routing_listen, upstreams)
        yield File(path=f"{tenement.name}/Caddyfile", text=text)
    project["services"] = services
    project |= {"volumes": volumes} if volumes else {}
    secrets = {_secret_name(s, secret): _secret_of(secret) for s in tenement.services for secret in s.secrets}
    project |= {"secrets": secrets} if secrets else {}
    head = "# Start: docker compose up --build --detach. What slum says and this file cannot: losses.json.\n"
    yield File(path=f"{tenement.name}/compose.yaml", text=head + dump(_dollars(project)))
    for service in tenement.services:
        has_source = service.source is not None
        yield File(
            path=f"{tenement.name}/{service.name}.Dockerfile",
            text=dockerfile(service, copy="--from=source " if has_source else None, context=None, tcp=_tcp(service)),
        )
        _service_losses(tenement, service, losses)
    _settings_losses(tenement, losses, probed=bool(routed))


def _dollars(value: Any) -> Any:
    """Return *value* with every dollar in a text doubled: Compose fills in variables in all of them."""
    if isinstance(value, str):
        return value.replace("$", "$$")
    if isinstance(value, dict):
        return {key: _dollars(item) for key, item in value.items()}
    return [_dollars(item) for item in value] if isinstance(value, list) else value


def _apart(service: Service) -> bool:
    """Tell whether another kernel serves the service, so that it cannot share sockets and loopback with the router."""
    return service.isolation in RUNTIMES


def _tcp(service: Service) -> str:
    if not _apart(service) or service.listen is Listen.NONE:
        return "-"
    return "8081" if service.port == 8080 else "8080"


def _instance(tenement: Tenement, run: Run, by_name: Mapping[str, Service], site: Site, *, router: str) -> Yaml:
    service, name = run.service, compose_name(run.service, run.id)
    common: Yaml = {"build": _build(tenement, service, site)}
    own: Yaml = {"command": list(run.command)}
    if run.workdir is not None:
        common["working_dir"] = run.workdir
    common["environment"] = run.own | {v.name: v.value for v in run.env}
    if service.secrets:
        common["secrets"] = [{"source": _secret_name(service, s), "target": s.name} for s in service.secrets]
    common["volumes"] = [f"{name}.data:{DATA}"]
    if run.socket is not None and not _apart(service):
        common["volumes"].append(f"{name}.run:{RUN}")
    if router and not _apart(service):
        common["network_mode"] = f"service:{router}"
    common |= _limits(service) | _wall(service)
    if tenement.labels:
        common["labels"] = {label.name: label.value for label in tenement.labels}
    own |= _health(tenement, service)
    own["restart"] = RESTARTS[service.restart]
    own["stop_grace_period"] = duration(service.stop_timeout_s)
    needs = {
        compose_name(by_name[other], one): {
            "condition": "service_started" if by_name[other].listen is Listen.NONE else "service_healthy"
        }
        for other in service.depends_on
        for one in by_name[other].instances
    }
    found: Yaml = {}
    if service.pre_deploy is not None:
        once = {"command": ["/bin/sh", "-c", service.pre_deploy], "restart": "no"}
        found[name + PRE_DEPLOY] = common | once | ({"depends_on": dict(needs)} if needs else {})
        needs[name + PRE_DEPLOY] = {"condition": "service_completed_successfully"}
    found[name] = common | own | ({"depends_on": needs} if needs else {})
    return found


def _build(tenement: Tenement, service: Service, site: Site) -> Yaml:
    build: Yaml = {"context": ".", "dockerfile": f"{service.name}.Dockerfile"}
    if service.source is not None:
        build["additional_contexts"] = {"source": site.folder(tenement.name, service, up="../")}
    return build


def _limits(service: Service) -> Yaml:
    found: Yaml = {}
    memory = service.memory_mb if service.isolation is Level.VM else service.memory_limit_mb
    if memory is not None:
        found["mem_limit"] = f"{memory}m"
    if service.vcpus is not None:
        found["cpus"] = service.vcpus
    if service.cpu_shares is not None:
        found["cpu_shares"] = round(service.cpu_shares * SHARES_PER_WEIGHT)
    if service.pids_limit is not None:
        found["pids_limit"] = service.pids_limit
    return found


def _wall(service: Service) -> Yaml:
    """The level: a plain container for `process`, which promises no wall; else nothing that is not needed."""
    if service.isolation is Level.PROCESS:
        return {}
    runtime: Yaml = {"runtime": RUNTIMES[service.isolation]} if _apart(service) else {}
    closed = {"read_only": True, "tmpfs": ["/tmp"], "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    return runtime | closed


def _health(tenement: Tenement, service: Service) -> Yaml:
    if service.listen is Listen.NONE:
        return {}
    check = {
        "test": ["CMD", "slum-health", *([service.health] if service.health is not None else [])],
        "interval": duration(tenement.settings.health_check_interval_s),
        "timeout": PROBE_TIMEOUT,
        "retries": 3,
        "start_period": duration(service.startup_timeout_s),
    }
    return {"healthcheck": check}


def _router(fleet: Fleet, tenement: Tenement, routed: list[Run]) -> Yaml:
    ports = [f"{address}:{address.rpartition(':')[2]}" for address in tenement.routing_listen]
    volumes = ["./Caddyfile:/etc/caddy/Caddyfile:ro"]
    for run in routed:
        if run.socket is not None and not _apart(run.service):
            name = compose_name(run.service, run.id)
            kind = "run" if own_socket(run.service) is None else "data"
            volumes.append(f"{name}.{kind}:/run/slum/{name}" + ("" if kind == "run" else ":ro"))
    volumes += ["caddy.data:/data"] if _has_tls(tenement) else []
    return {
        "image": "caddy:2",
        "restart": "always",
        "ports": ports,
        "environment": {"DOMAIN": fleet.domain},
        "volumes": volumes,
    }


def _has_tls(tenement: Tenement) -> bool:
    return any(address.endswith(":443") for address in tenement.routing_listen)


def _upstream(run: Run) -> Upstream:
    service, name = run.service, compose_name(run.service, run.id)
    if _apart(service):
        to = f"{name}:{_tcp(service)}"
    elif run.socket is None:
        to = f"127.0.0.1:{service.port}"
    else:
        base = RUN if own_socket(service) is None else DATA
        to = f"unix//run/slum/{name}{run.socket.removeprefix(base)}"
    return Upstream(
        service=service.name,
        id=run.id,
        first=run.id == service.instances[0],
        to=to,
        timeout_s=service.request_timeout_s,
    )


def _volumes(runs: list[Run]) -> Yaml:
    found: Yaml = {}
    for run in runs:
        name = compose_name(run.service, run.id)
        found[f"{name}.data"] = {}
        if run.socket is not None and not _apart(run.service):
            found[f"{name}.run"] = {}
    return found


def _secret_name(service: Service, secret: Secret) -> str:
    return f"{service.name}.{secret.name}"


def _secret_of(secret: Secret) -> Yaml:
    kind, _, where = secret.source.partition(":")
    return {"file": where} if kind == "file" else {"environment": where}


def _service_losses(tenement: Tenement, service: Service, losses: Losses) -> None:
    def lost(key: str, what: object, why: str, instead: str = "") -> None:
        losses.add(service_path(tenement.name, service.name, key), str(what), why, instead)

    listens = service.listen is not Listen.NONE
    if service.deploy is Deploy.OVERLAP:
        lost("deploy", '"overlap"', "Compose stops the old container before it starts the new one", "two projects")
    if listens:
        lost(
            "health",
            service.health or "accepts connections",
            "Docker marks an unhealthy container and leaves it running",
            "watch `docker compose ps`, or run the project under Swarm",
        )
    if service.drain_timeout_s != Service(name="x", command=()).drain_timeout_s:
        lost("drain_timeout", f"{service.drain_timeout_s:g} s", "Compose does not drain", "`stop_grace_period`")
    if service.startup_timeout_s != Service(name="x", command=()).startup_timeout_s and not listens:
        lost("startup_timeout", f"{service.startup_timeout_s:g} s", "a container that is not probed is never late")
    if service.idle_timeout_s is not None:
        lost("idle_timeout", f"{service.idle_timeout_s:g} s", "Compose puts nothing to sleep")
    if service.storage_quota_mb is not None:
        lost("storage_quota_mb", service.storage_quota_mb, "a volume has no size", "a volume driver with quotas")
    if service.isolation is Level.WASM:
        lost("isolation", '"wasm"', "Docker's wasm shims serve no sockets", "an image with wasmtime in it")
    if service.isolation is Level.VM and service.memory_limit_mb is not None:
        lost("memory_limit_mb", service.memory_limit_mb, "a Kata machine is as large as its limit", "`memory_mb`")
    for key in ("rootfs", "kernel"):
        if (value := getattr(service, key)) is not None:
            lost(key, value, "a container starts from an image", "build an image from it")
    if service.socket is not None and own_socket(service) is None:
        lost("socket", service.socket, "a Caddyfile cannot name it", "letters, digits, `.`, `_`, `-` and `/`")
    if service.image is not None and image_of(service) is None:
        lost("image", service.image, "it is no image reference")
    if service.bundle is not None and service.source is None:
        lost("bundle", service.bundle[:12], "the bundle's files are with the control plane", "name a `source`")


def _settings_losses(tenement: Tenement, losses: Losses, *, probed: bool) -> None:
    reasons = {
        "data_dir": "each instance has a volume of its own",
        "max_restarts": "Docker restarts without end, or a number of times in all",
        "restart_window_s": "Docker does not count restarts within a time",
        "backoff_base_ms": "Docker's own backoff, 100 ms to 1 min, cannot be set",
        "backoff_max_ms": "Docker's own backoff, 100 ms to 1 min, cannot be set",
    } | ({} if probed else {"health_check_interval_s": "no service is probed"})
    for field, why in reasons.items():
        value = getattr(tenement.settings, field)
        if value != getattr(Settings(), field):
            losses.add(f"tenement.{tenement.name}.settings.{field.removesuffix('_s')}", str(value), why)
    if not probed and tenement.routing_listen != Tenement(name="x", operator="x").routing_listen:
        why = "no service takes requests, so there is no router"
        losses.add(f"tenement.{tenement.name}.routing.listen", ", ".join(tenement.routing_listen), why)
