"""fly.toml judged by a strict table of flyctl's keys and by the rules that `fly config validate` holds it to.

Source of KEYS and of the rules: superfly/flyctl, internal/appconfig (the structs of config.go, service.go, toplevelcheck.go
with their toml tags; validation.go) and superfly/fly-go's machine types, as of flyctl commit ad0172face30 (2026-08).
Restated here as data; flyctl itself rejects the same keys with `fly config validate --strict`.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from typing import Any

import pytest
from exports_support import HOSTILE, ROOT, fleets
from hypothesis import HealthCheck, given, settings

from slum.exports.base import Site
from slum.exports.flyrules import APP_NAME_MAX
from slum.exports.flytoml import export_fly
from slum.fleetfile import load
from slum.model import EnvVar, Fleet, FlyOperator, Level, Listen, Restart, Secret, Service, Settings, Tenement

MORE = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
SPAN = "duration"
HTTP_CHECK = {
    "interval": SPAN,
    "timeout": SPAN,
    "grace_period": SPAN,
    "method": str,
    "path": str,
    "protocol": str,
    "tls_skip_verify": bool,
    "tls_server_name": str,
    "headers": {"*": str},
}
TCP_CHECK = {"interval": SPAN, "timeout": SPAN, "grace_period": SPAN}
MACHINE_CHECK = {"command": [str], "image": str, "entrypoint": [str], "kill_signal": str, "kill_timeout": SPAN}
CONCURRENCY = {"type": str, "hard_limit": int, "soft_limit": int}
HTTP_OPTIONS: dict[str, Any] = {"compress": bool, "idle_timeout": int, "response": {"headers": {"*": object}}}
TLS_OPTIONS = {"alpn": [str], "versions": [str], "default_self_signed": bool}
SERVICE: dict[str, Any] = {
    "internal_port": int,
    "auto_stop_machines": str,
    "auto_start_machines": bool,
    "min_machines_running": int,
    "processes": [str],
    "concurrency": CONCURRENCY,
    "machine_checks": [MACHINE_CHECK],
}
VM = {
    "size": str,
    "memory": str,
    "memory_mb": int,
    "cpu_kind": str,
    "cpus": int,
    "gpus": int,
    "gpu_kind": str,
    "kernel_args": [str],
    "host_dedication_id": str,
    "persist_rootfs": str,
    "processes": [str],
}
KEYS: dict[str, Any] = {
    "app": str,
    "primary_region": str,
    "kill_signal": str,
    "kill_timeout": SPAN,
    "swap_size_mb": int,
    "console_command": str,
    "host_dedication_id": str,
    "machine_config": str,
    "container": str,
    "experimental": {
        "cmd": [str],
        "entrypoint": [str],
        "exec": [str],
        "auto_rollback": bool,
        "enable_consul": bool,
        "enable_etcd": bool,
        "lazy_load_images": bool,
        "machine_config": str,
    },
    "build": {
        "builder": str,
        "args": {"*": str},
        "buildpacks": [str],
        "image": str,
        "settings": {"*": object},
        "builtin": str,
        "dockerfile": str,
        "ignorefile": str,
        "build-target": str,
        "compose": {"file": str},
        "compression": str,
        "compression_level": int,
    },
    "deploy": {
        "strategy": str,
        "max_unavailable": float,
        "wait_timeout": SPAN,
        "release_command": str,
        "release_command_timeout": SPAN,
        "release_command_vm": VM,
        "seed_command": str,
    },
    "env": {"*": str},
    "processes": {"*": str},
    "mounts": [
        {
            "source": str,
            "destination": str,
            "initial_size": str,
            "snapshot_retention": int,
            "scheduled_snapshots": bool,
            "auto_extend_size_threshold": int,
            "auto_extend_size_increment": str,
            "auto_extend_size_limit": str,
            "processes": [str],
        }
    ],
    "http_service": {
        **SERVICE,
        "force_https": bool,
        "checks": [HTTP_CHECK],
        "http_options": HTTP_OPTIONS,
        "tls_options": TLS_OPTIONS,
    },
    "services": [
        {
            **SERVICE,
            "protocol": str,
            "ports": [
                {
                    "port": int,
                    "start_port": int,
                    "end_port": int,
                    "handlers": [str],
                    "force_https": bool,
                    "http_options": HTTP_OPTIONS,
                    "tls_options": TLS_OPTIONS,
                }
            ],
            "tcp_checks": [TCP_CHECK],
            "http_checks": [HTTP_CHECK],
        }
    ],
    "checks": {"*": {**HTTP_CHECK, "port": int, "type": str, "processes": [str]}},
    "files": [{"guest_path": str, "local_path": str, "secret_name": str, "raw_value": str, "processes": [str]}],
    "machine_checks": [MACHINE_CHECK],
    "restart": [{"policy": str, "retries": int, "processes": [str]}],
    "vm": [VM],
    "statics": [{"guest_path": str, "url_prefix": str, "tigris_bucket": str, "index_document": str}],
    "metrics": [{"port": int, "path": str, "https": bool, "processes": [str]}],
}


def unknown(value: object, known: Any, at: str = "") -> list[str]:
    """Return what flyctl would not know, or read as another type."""
    if known == SPAN:
        fine = isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"(\d+(\.\d+)?(h|m|s|ms))+", value))
        return [] if fine else [f"{at}: {value!r} is no duration"]
    if isinstance(known, dict):
        if not isinstance(value, dict):
            return [f"{at}: no table"]
        return [
            line
            for key, item in value.items()
            for line in (
                unknown(item, known.get(key, known.get("*")), f"{at}.{key}")
                if key in known or "*" in known
                else [f"{at}.{key}: unknown key"]
            )
        ]
    if isinstance(known, list):
        if not isinstance(value, list):
            return [f"{at}: no list"]
        return [line for item in value for line in unknown(item, known[0], at)]
    kind = known if isinstance(known, type) else object
    return (
        []
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool) or kind is object)
        else [f"{at}: {value!r}"]
    )


def broken(app: dict[str, Any]) -> list[str]:
    """Return which rules of flyctl's validation.go *app* breaks."""
    groups = set(app["processes"])
    services = [app["http_service"]] if "http_service" in app else []
    found = [f"{s}: no such process" for s in services for p in s.get("processes", ["-"]) if p not in groups]
    found += [f"{r}: no such process" for r in app["restart"] for p in r["processes"] if p not in groups]
    found += [f"{r}: no policy" for r in app["restart"] if r["policy"] not in ("always", "never", "on-failure")]
    for check in app.get("checks", {}).values():
        if check["type"] not in ("http", "tcp") or seconds(check["interval"]) < 2 or seconds(check["timeout"]) > 60:
            found.append(f"{check}: invalid")
    for check in (c for s in services for c in s.get("checks", ())):
        spans = [seconds(check[key]) for key in ("interval", "timeout", "grace_period")]
        found += [f"{check}: {span} s" for span in spans if not 1 <= span <= 60]
    if app["deploy"]["strategy"] not in ("canary", "rolling", "immediate", "bluegreen"):
        found.append("strategy")
    if app["deploy"]["strategy"] in ("canary", "bluegreen") and "mounts" in app:
        found.append("a volume belongs to one machine")
    for group in groups:
        if sum(group in mount["processes"] for mount in app.get("mounts", ())) > 1:
            found.append(f"{group}: more than one mount")
    for line in (*app["processes"].values(), app["deploy"].get("release_command", "")):
        shlex.split(line)
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*[a-z0-9]", app["app"]) or len(app["app"]) > APP_NAME_MAX:
        found.append(f"{app['app']}: no app name")
    return found


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def apps(fleet: Fleet) -> dict[str, dict[str, Any]]:
    files = export_fly(fleet, Site()).files
    return {file.path.split("/")[0]: tomllib.loads(file.text) for file in files if file.path.endswith("/fly.toml")}


def fly(*services: Service, **fields: Any) -> Fleet:
    operator = FlyOperator(name="fly", org="personal", region="iad")
    tenement = Tenement(name="here", operator="fly", services=services, **fields)
    return Fleet(operators=(operator,), tenements=(tenement,))


def test_the_table_is_strict() -> None:
    assert unknown(
        {"http_service": {"internal_prot": 1}, "vm": [{"memory": 5}], "kill_timeout": "soon", "app": 1}, KEYS
    ) == [
        ".http_service.internal_prot: unknown key",
        ".vm.memory: 5",
        ".kill_timeout: 'soon' is no duration",
        ".app: 1",
    ]


@MORE
@given(fleets())
def test_generated_fleets_are_what_flyctl_takes(fleet: Fleet) -> None:
    for name, app in apps(fleet).items():
        assert unknown(app, KEYS) == [], name
        assert broken(app) == [], name
        assert app["app"] == name


def test_the_example() -> None:
    found = apps(load(ROOT / "slum.toml.example").fleet)
    assert set(found) >= {
        "example-api-prod-api-acme",
        "example-api-prod-cache",
        "example-here-notes",
        "example-here-ticker",
    }
    for app in found.values():
        assert unknown(app, KEYS) == []
        assert broken(app) == []


def test_sleep_restart_limits_and_mounts() -> None:
    service = Service(
        name="web",
        command=("python3", "app.py", "{data_dir}/x"),
        listen=Listen.FD,
        health="/up",
        idle_timeout_s=60.0,
        memory_limit_mb=300,
        restart=Restart.ON_FAILURE,
    )
    (app,) = apps(fly(service, settings=Settings(max_restarts=3))).values()
    http = app["http_service"]
    assert (http["auto_stop_machines"], http["auto_start_machines"], http["min_machines_running"]) == ("stop", True, 0)
    assert http["checks"][0] == {
        "method": "GET",
        "path": "/up",
        "grace_period": "30s",
        "interval": "10s",
        "timeout": "5s",
    }
    assert app["restart"] == [{"policy": "on-failure", "retries": 3, "processes": ["web"]}]
    assert app["vm"][1] == {"cpu_kind": "shared", "cpus": 1, "memory": "512mb", "processes": ["web"]}
    assert app["mounts"] == [{"source": "data", "destination": "/data", "initial_size": "3gb", "processes": ["web"]}]
    assert app["deploy"]["strategy"] == "rolling"


def test_services_of_one_image_are_process_groups_of_one_app() -> None:
    env = (EnvVar(name="A", value="1"),)
    web = Service(name="web", command=("w",), source="app", env=env, listen=Listen.PORT, port=8080, deploy="replace")  # type: ignore[arg-type]
    worker = Service(name="worker", command=("k", "a b"), source="app", env=env, listen=Listen.NONE, deploy="replace")  # type: ignore[arg-type]
    other = Service(name="other", command=("o",), source="other", listen=Listen.NONE)
    found = apps(fly(web, worker, other))
    assert set(found) == {"default-here-web", "default-here-other"}
    app = found["default-here-web"]
    assert app["processes"] == {"web": "w", "worker": "k 'a b'"}
    assert app["http_service"]["processes"] == ["web"]
    assert app["http_service"]["internal_port"] == 8081, "the program's own port stays free for it"


def test_names_are_unique_and_short() -> None:
    many = [
        Tenement(name=n, operator="fly", services=(Service(name=s, command=("x",)),))
        for n, s in (("a-b", "c"), ("a", "b-c"))
    ]
    long = Tenement(
        name="t" * 32,
        operator="fly",
        services=(Service(name="s" * 32, command=("x",), instances=("i" * 40, "j" * 40)),),
    )
    fleet = Fleet(operators=fly().operators, tenements=(*many, long))
    names = list(apps(fleet))
    assert len(set(names)) == 4
    assert all(len(name) <= APP_NAME_MAX for name in names)


def test_hostile_texts_arrive_unchanged() -> None:
    texts = [a + b for a in HOSTILE for b in ("", "x", "'", "${A}")]
    env = tuple(EnvVar(name=f"E{n}", value=t.replace("{", "{{").replace("}", "}}")) for n, t in enumerate(texts))
    command = ("python3", *(variable.value for variable in env))
    (app,) = apps(fly(Service(name="web", command=command, env=env, pre_deploy="echo '${A}'\nx"))).values()
    assert [app["env"][f"E{n}"] for n in range(len(texts))] == texts
    assert shlex.split(app["processes"]["web"])[1:] == texts
    assert shlex.split(app["deploy"]["release_command"]) == ["/bin/sh", "-c", "echo '${A}'\nx"]


def test_no_secret_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM", "canary-value")
    service = Service(name="web", command=("x",), secrets=(Secret(name="KEY", source="env:FROM"),))
    rendered = export_fly(fly(service), Site())
    assert "canary" not in json.dumps([file.text for file in rendered.files])
    assert any(loss.path == "tenement.here.service.web.secrets.KEY" for loss in rendered.losses)
    assert 'fly secrets set KEY="$FROM"' in next(file.text for file in rendered.files if file.path == "README.md")


@pytest.mark.parametrize("level", Level)
def test_every_level_but_the_usual_is_told(level: Level) -> None:
    losses = export_fly(fly(Service(name="web", command=("x",), isolation=level)), Site()).losses
    assert any(loss.path.endswith(".isolation") for loss in losses) is (level is not Level.NAMESPACE)
