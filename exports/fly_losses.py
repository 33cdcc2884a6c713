"""What fly.toml cannot say of a fleet, a tenement and a service. Part of flytoml; pure."""

from __future__ import annotations

from collections.abc import Sequence

from slum.exports.base import Losses, service_path
from slum.exports.container import Run, own_socket, run_of
from slum.exports.dockerfile import image_of
from slum.exports.flyrules import (
    KILL_TIMEOUT_MAX_S,
    OPERATOR,
    STEP_MB,
    USUAL,
    fleet_of,
    internal_port,
    memory_mb_of,
    within,
)
from slum.model import Deploy, Fleet, FlyOperator, Level, Listen, Restart, Service, Settings, Tenement


def fleet_losses(
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
                if getattr(operator, key) != getattr(USUAL, key):
                    losses.add(
                        f"{at}.{key}",
                        str(getattr(operator, key)),
                        reason,
                        "`fly apps create --org`" if key == "org" else "",
                    )


def tenement_losses(tenement: Tenement, losses: Losses, *, alone: bool) -> None:
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
    elif within(interval, 2, 60) != interval:
        reasons["health_check_interval_s"] = "Fly probes every 2 to 60 seconds"
    for field, why in reasons.items():
        value = getattr(tenement.settings, field)
        if value != getattr(Settings(), field):
            losses.add(f"{at}.settings.{field.removesuffix('_s')}", str(value), why)


def service_losses(tenement: Tenement, service: Service, losses: Losses) -> None:
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
    if startup != default.startup_timeout_s and (not listens or within(startup, 1, 60) != startup):
        lost("startup_timeout", f"{startup:g} s", "a grace period is 1 to 60 seconds, of a service that is probed")
    if service.stop_timeout_s > KILL_TIMEOUT_MAX_S:
        lost("stop_timeout", f"{service.stop_timeout_s:g} s", f"`kill_timeout` is at most {KILL_TIMEOUT_MAX_S} seconds")
    if service.memory_limit_mb != memory_mb_of(service):
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
