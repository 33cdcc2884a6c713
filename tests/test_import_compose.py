"""Compose files of strangers become the nearest fleet, and everything else is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports_support import ROOT, run, tool
from hypothesis import given, settings
from hypothesis import strategies as st

from slum.errors import ConfigError, SlumError
from slum.exports.base import Imported
from slum.exports.compose_import import companions, import_compose
from slum.exports.container import as_one
from slum.exports.foreign import bytes_of, read_foreign_dockerfile, repository, seconds_of
from slum.exports.interpolation import fill
from slum.exports.slumtoml import slum_toml
from slum.model import Level, Listen, Restart, Service
from slum.validate import check_fleet

EXAMPLE = ROOT / "examples" / "import" / "compose.yaml"


def imported(body: str, **files: str) -> Imported:
    return import_compose({"compose.yaml": f"services:\n{body}", **files})


def service(found: Imported, name: str) -> Service:
    return next(s for t in found.fleet.tenements for s in t.services if s.name == name)


def told(found: Imported) -> dict[str, str]:
    return {loss.path: loss.what for loss in found.losses}


@pytest.fixture(scope="module")
def shop() -> Imported:
    beside = {
        f"examples/import/{name}": (EXAMPLE.parent / name).read_text() for name in ("compose.yaml", "app/Dockerfile")
    }
    return import_compose(beside)


def test_the_example_is_a_file_that_docker_compose_takes() -> None:
    env = {"POSTGRES_PASSWORD": "x", "SECRET_KEY": "y"}
    run(tool("docker-compose"), "-f", str(EXAMPLE), "config", "-q", env=env)


def test_the_example_becomes_a_sound_fleet(shop: Imported) -> None:
    assert check_fleet(shop.fleet) == ()
    assert shop.fleet.name == "shop"
    (tenement,) = shop.fleet.tenements
    assert [s.name for s in tenement.services] == [
        *("cache", "db", "mail", "metrics", "migrate", "proxy", "scheduler", "search", "web", "worker")
    ]
    web = service(shop, "web")
    assert web.command[:2] == ("gunicorn", "shop.wsgi")
    assert (web.source, web.build) == ("examples/import/app", "pip install --requirement requirements.txt")
    assert (web.listen, web.port, web.health, web.startup_timeout_s) == (Listen.PORT, 8000, "/healthz", 40.0)
    assert (web.memory_limit_mb, web.pids_limit, web.depends_on) == (512, 200, ("cache", "db"))
    env = {variable.name: variable.value for variable in web.env}
    assert (env["GREETING"], env["DEBUG"], env["LOG_LEVEL"]) == ("Costs $5, says {{hello}}", "off", "info")
    assert env["REDIS_URL"] == "redis://127.0.0.1:6379/0"
    worker = service(shop, "worker")
    assert (worker.instances, worker.listen, worker.stop_timeout_s) == (("1", "2", "3"), Listen.NONE, 90.0)
    assert service(shop, "migrate").restart is Restart.NEVER
    db = service(shop, "db")
    assert (db.image, db.isolation, db.port, db.command[0]) == (
        "postgres:17",
        Level.SANDBOX,
        5432,
        "docker-entrypoint.sh",
    )
    assert {secret.name: secret.source for secret in db.secrets} == {"POSTGRES_PASSWORD": "file:/etc/slum/db_password"}
    assert {v.name: v.value for v in db.env}["PGDATA"] == "{data_dir}/pgdata"


def test_a_variable_without_a_default_is_read_where_the_service_runs(shop: Imported) -> None:
    secrets = {secret.name: secret.source for secret in service(shop, "web").secrets}
    assert secrets["SECRET_KEY"] == "env:SECRET_KEY"
    assert secrets["DATABASE_URL"] == "env:DATABASE_URL", "a password is in the middle of it"
    assert service(shop, "search").secrets[0].source == "env:MEILI_MASTER_KEY"


def test_what_was_left_out_is_told_with_its_place(shop: Imported) -> None:
    places = told(shop)
    for place in (
        *("networks.frontend", "services.cache.sysctls", "services.mail.profiles", "services.metrics.user"),
        *(
            "services.proxy.volumes",
            "services.proxy.ports",
            "services.web.cpus",
            "services.web.labels",
            "services.db.healthcheck",
        ),
        *("services.worker.logging", "services.web.build.args", "services.metrics.restart", "services.db.shm_size"),
    ):
        assert place in places


def test_its_slum_toml_is_what_validate_takes(shop: Imported, tmp_path: Path) -> None:
    from slum.fleetfile import load

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "slum.toml").write_text(slum_toml(shop.fleet))
    assert load(tmp_path / "slum.toml").fleet == shop.fleet


def test_two_services_on_one_port_are_kept_apart() -> None:
    found = imported("  a: {image: postgres}\n  b: {image: postgres}\n")
    assert [service(found, name).port for name in ("a", "b")] == [5432, 5433]
    assert told(found)["services.b.ports"] == "port 5432 becomes 5433"
    assert check_fleet(found.fleet) == ()


def test_a_service_on_the_routers_port_moves_the_router() -> None:
    found = imported("  a: {image: x, command: x, expose: [8080]}\n")
    assert found.fleet.tenements[0].routing_listen == ("127.0.0.1:8081", "[::1]:8081")
    assert check_fleet(found.fleet) == ()


def test_names_become_slums() -> None:
    found = imported("  My_App.1: {image: x, command: x}\n  my-app-1: {image: x, command: x}\n")
    assert [s.name for s in found.fleet.tenements[0].services] == ["my-app-1", "my-app-1-2"]
    assert check_fleet(found.fleet) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("services: [", "not YAML"),
        ("a: &x [*x]\nservices: {}", "holds itself"),
        ("services: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("x: 1", "has no `services`"),
        ("services: {a: !!python/object:os.system {}}", "not YAML"),
        ("x" * (2 << 20), "larger than"),
    ],
)
def test_what_is_no_compose_file_is_refused_in_a_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        import_compose({"compose.yaml": text})


def test_files_outside_the_folder_are_never_asked_for() -> None:
    text = "services: {a: {build: {context: ../x}}, b: {build: /etc}, c: {build: {context: ., dockerfile: ../../passwd}}, d: {build: d}}"
    assert companions("p/compose.yaml", text) == ("Caddyfile", "d/Dockerfile")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 99_999) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "image",
    "build",
    "command",
    "entrypoint",
    "environment",
    "ports",
    "expose",
    "volumes",
    "depends_on",
    "restart",
    "healthcheck",
    "deploy",
    "secrets",
    "labels",
    "mem_limit",
    "cpus",
    "cpu_shares",
    "pids_limit",
    "working_dir",
    "runtime",
    "stop_grace_period",
    "scale",
    "cap_drop",
]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=5), max_size=3))
def test_whatever_stands_there_gives_a_fleet_or_one_clear_error(services: dict[str, object]) -> None:
    from slum.exports.yamltext import dump

    try:
        found = import_compose({"compose.yaml": dump({"services": services})})
    except SlumError:
        return
    slum_toml(found.fleet)


@pytest.mark.parametrize(
    ("text", "filled", "missing", "alone"),
    [
        ("a$$b", "a$b", (), None),
        ("${A}", "", ("A",), "A"),
        ("$A", "", ("A",), "A"),
        ("x${A:-d}y", "xdy", (), None),
        ("${A:-${B:-c}}", "c", (), "A"),
        ("${A:?no}", "", ("A",), "A"),
        ("${", "${", (), None),
        ("$1 $", "$1 $", (), None),
        ("${A:-x}${B}", "x", ("B",), None),
    ],
)
def test_interpolation(text: str, filled: str, missing: tuple[str, ...], alone: str | None) -> None:
    found = fill(text)
    assert (found.text, found.missing, found.alone) == (filled, missing, alone)


def test_interpolation_of_a_bomb_ends() -> None:
    assert fill("${A:-" * 5000 + "}" * 5000).text
    assert fill("${A" * 300).text


def test_sizes_spans_images_and_dockerfiles() -> None:
    assert [bytes_of(t) for t in ("256m", "1.5GB", "10", "64kib", "x")] == [256 << 20, 1610612736, 10, 65536, 0]
    assert [seconds_of(t) for t in ("1m30s", "500ms", "7", ".5s", "1h")] == [90.0, 0.5, 7.0, 0.5, 3600.0]
    assert [repository(t) for t in ("postgres:17", "docker.io/library/redis", "ghcr.io:443/a/b:1@sha256:x")] == [
        *("postgres", "redis", "ghcr.io:443/a/b")
    ]
    found = read_foreign_dockerfile(
        "FROM a AS base\nRUN pip install \\\n  x\nFROM base\nEXPOSE 80/tcp\nCMD echo $HOME\n"
    )
    assert (found.image, found.build, found.port, found.command) == (
        "a",
        "pip install x",
        80,
        ("/bin/sh", "-c", "echo $HOME"),
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["{id}", "a", "b", "ab", "x", "{{", "-"]), max_size=6).map("".join))
def test_one_template_for_all_ids_is_found(template: str) -> None:
    ids = ("a", "ab", "b")
    made = as_one([(one, template.replace("{id}", one)) for one in ids])
    assert made is not None
    assert [made.replace("{id}", one) for one in ids] == [template.replace("{id}", one) for one in ids]
