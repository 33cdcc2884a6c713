"""Compose files judged by docker-compose's own binary, the compose-spec schema and Caddy; the images' scripts really run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exports_support import HOSTILE, ROOT, fleets, lay, replaced, run, tool
from hypothesis import HealthCheck, given, settings

from slum.exports.base import Site
from slum.exports.compose import duration, export_compose
from slum.exports.dockerfile import ENTRY, HEALTH, dockerfile, read_dockerfile
from slum.exports.yamltext import dump, load
from slum.fleetfile import load as load_fleet
from slum.model import EnvVar, Fleet, Level, Listen, LocalOperator, Secret, Service, Tenement

FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
ENV = {"FROM": "canary-of-the-environment", "DOMAIN": "example.com"}


def one(service: Service, **fields: Any) -> Fleet:
    tenement = Tenement(name="here", operator="local", services=(service,), **fields)
    return Fleet(operators=(LocalOperator(name="local"),), tenements=(tenement,))


def config(folder: Path) -> dict[str, Any]:
    """Return the project as docker-compose understands it."""
    shown = run(tool("docker-compose"), "-f", str(folder / "compose.yaml"), "config", "--format", "json", env=ENV)
    found: dict[str, Any] = json.loads(shown)
    return found


def judged(folder: Path) -> None:
    for file in sorted(folder.glob("*/compose.yaml")):
        run(tool("docker-compose"), "-f", str(file), "config", "-q", env=ENV)
        run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file))
        if file.with_name("Caddyfile").exists():
            where = str(file.with_name("Caddyfile"))
            run(tool("caddy"), "validate", "--config", where, "--adapter", "caddyfile", env=ENV)


def test_the_example_is_what_docker_compose_and_caddy_take(tmp_path: Path) -> None:
    fleet = load_fleet(ROOT / "slum.toml.example").fleet
    folder = lay(tmp_path, export_compose(fleet, Site(root="../..")).files)
    judged(folder)
    project = config(folder / "api-prod")
    api = project["services"]["api.globex"]
    assert api["command"] == [".venv/bin/python", "-m", "uvicorn", "app:app", "--fd", "3"]
    assert api["environment"]["CUSTOMER"] == "globex"
    assert (api["mem_limit"], api["pids_limit"], api["cpu_shares"]) == (str(128 << 20), 64, 2048)
    assert api["read_only"] is True
    assert api["depends_on"]["cache"]["condition"] == "service_healthy"
    assert api["build"]["additional_contexts"]["source"] == str(
        (tmp_path / "../../examples/quickstart/hello").resolve()
    )


@FEW
@given(fleet=fleets())
def test_generated_fleets_are_taken_whole(tmp_path_factory: pytest.TempPathFactory, fleet: Fleet) -> None:
    judged(lay(tmp_path_factory.mktemp("compose"), export_compose(fleet, Site()).files))


def test_hostile_texts_arrive_unchanged_and_inject_nothing(tmp_path: Path) -> None:
    texts = [a + b for a in HOSTILE for b in ("", "x", "${FROM}")]
    env = tuple(EnvVar(name=f"E{n}", value=t.replace("{", "{{").replace("}", "}}")) for n, t in enumerate(texts))
    command = ("python3", *(variable.value for variable in env))
    service = Service(
        name="web", command=command, env=env, pre_deploy="echo '${FROM}'", build="a\n'${FROM}'", source="a b$c"
    )
    folder = lay(tmp_path, export_compose(one(service), Site()).files)
    project = config(folder / "here")
    assert set(project["services"]) == {"caddy", "web", "web.pre-deploy"}
    web = project["services"]["web"]
    plain = {key: value.replace("$$", "$") for key, value in web["environment"].items()}
    assert [plain[f"E{n}"] for n in range(len(texts))] == texts
    assert [word.replace("$$", "$") for word in web["command"][1:]] == texts
    assert ENV["FROM"] not in json.dumps(project)
    text = (folder / "here" / "web.Dockerfile").read_text()
    recipe = read_dockerfile(text)
    assert recipe is not None
    assert recipe.build == "a\n'${FROM}'"


def test_secrets_are_named_and_never_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM", "canary-of-the-environment")
    file = tmp_path / "key"
    file.write_text("canary-of-the-file")
    secrets = (Secret(name="A", source=f"file:{file}"), Secret(name="B", source="env:FROM"))
    service = Service(name="web", command=("x",), secrets=secrets)
    rendered = export_compose(one(service), Site())
    assert "canary" not in json.dumps([file.text for file in rendered.files])
    project = config(lay(tmp_path / "out", rendered.files) / "here")
    assert project["secrets"]["web.A"]["file"] == str(file)
    assert project["secrets"]["web.B"]["environment"] == "FROM"
    assert [secret["target"] for secret in project["services"]["web"]["secrets"]] == ["A", "B"]


@pytest.mark.parametrize(
    ("level", "runtime", "closed"),
    [
        (Level.PROCESS, None, False),
        (Level.NAMESPACE, None, True),
        (Level.SANDBOX, "runsc", True),
        (Level.VM, "io.containerd.kata.v2", True),
        (Level.WASM, None, True),
    ],
)
def test_every_level_is_mapped_or_told(level: Level, runtime: str | None, closed: bool) -> None:
    rendered = export_compose(one(Service(name="web", command=("x",), isolation=level)), Site())
    web = load(rendered.files[1].text, "x")["services"]["web"]
    assert web.get("runtime") == runtime
    assert (web.get("read_only", False), "cap_drop" in web) == (closed, closed)
    assert any(loss.path.endswith(".isolation") for loss in rendered.losses) is (level is Level.WASM)


def test_caddy_serves_the_names_that_slum_serves(tmp_path: Path) -> None:
    services = (
        Service(name="api", command=("x",), instances=("acme", "b"), request_timeout_s=1.5),
        Service(name="own", command=("x",), socket="{data_dir}/s.sock"),
        Service(name="port", command=("x",), listen=Listen.PORT, port=9000),
        Service(name="safe", command=("x",), isolation=Level.SANDBOX),
    )
    tenement = Tenement(name="here", operator="local", services=services)
    fleet = Fleet(domain="slum.test", operators=(LocalOperator(name="local"),), tenements=(tenement,))
    folder = lay(tmp_path, export_compose(fleet, Site()).files)
    adapted = json.loads(
        run(tool("caddy"), "adapt", "--config", str(folder / "here/Caddyfile"), env={"DOMAIN": "slum.test"})
    )
    routes = adapted["apps"]["http"]["servers"]["srv0"]["routes"]
    found: dict[str, str] = {}
    for route in routes:
        dial = json.dumps(route["handle"])
        for host in route["match"][0]["host"]:
            found[host] = dial
    assert set(found) == {
        *("api.slum.test", "acme.api.slum.test", "b.api.slum.test", "own.slum.test", "main.own.slum.test"),
        *("port.slum.test", "main.port.slum.test", "safe.slum.test", "main.safe.slum.test"),
    }
    assert "unix//run/slum/api.acme/app.sock" in found["api.slum.test"]
    assert '"response_header_timeout": 1500000000' in found["b.api.slum.test"]
    assert "unix//run/slum/own/s.sock" in found["own.slum.test"]
    assert "127.0.0.1:9000" in found["port.slum.test"]
    assert "safe:8080" in found["safe.slum.test"]


SERVER = """
import os, socket, sys
s = socket.socket(fileno=3) if os.environ.get("LISTEN_FDS") else socket.socket(socket.AF_UNIX)
if not os.environ.get("LISTEN_FDS"):
    s.bind(os.environ["SOCKET_PATH"]); s.listen()
assert os.environ.get("LISTEN_PID", str(os.getpid())) == str(os.getpid())
print("ready", flush=True)
for _ in range(3):
    c, _a = s.accept()
    line = c.recv(65536).split(b" ")
    path = line[1].decode() if len(line) > 1 else ""
    c.sendall(b"HTTP/1.1 %s X\\r\\n\\r\\n" % (b"200" if path == "/ok" else b"500") + os.environ.get("KEY", "").encode())
    c.close()
"""


def scripts(folder: Path) -> tuple[Path, Path]:
    entry, health = folder / "slum-entry", folder / "slum-health"
    entry.write_text(ENTRY.replace("/run/secrets", str(folder / "secrets")))
    health.write_text(HEALTH)
    entry.chmod(0o755)
    health.chmod(0o755)
    return entry, health


@pytest.mark.parametrize("listen", ["socket", "fd"])
def test_the_entry_gives_a_program_what_slum_gives_it(tmp_path: Path, listen: str) -> None:
    tool("perl")
    entry, health = scripts(tmp_path)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "KEY").write_text("it's $(secret)\n")
    path = tmp_path / "s.sock"
    path.touch()  # what an earlier life left behind
    env = {**os.environ, "SOCKET_PATH": str(path)} | ({"LISTEN_FDS": "1"} if listen == "fd" else {})
    words = [str(entry), "-", sys.executable, "-c", SERVER]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        assert subprocess.run([health, "/ok"], env=env, check=False).returncode == 0
        assert subprocess.run([health, "/bad"], env=env, capture_output=True, check=False).returncode != 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /ok HTTP/1.1\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert answer.endswith(b"it's $(secret)")
        assert server.wait(10) == 0
    assert subprocess.run([health], env=env, capture_output=True, check=False).returncode != 0


def test_the_entry_listens_on_tcp_where_no_socket_can_be_shared(tmp_path: Path) -> None:
    tool("perl")
    entry, _ = scripts(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "SOCKET_PATH": str(tmp_path / "s"), "LISTEN_FDS": "1", "FLY_PROCESS_GROUP": "web"}
    words = [str(entry), f"{port}:web", sys.executable, "-c", SERVER]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
                client.sendall(b"GET /ok HTTP/1.1\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 200"
        assert server.wait(10) == 0


def test_a_worker_of_the_same_app_gets_no_socket(tmp_path: Path) -> None:
    entry, _ = scripts(tmp_path)
    env = {**os.environ, "SOCKET_PATH": str(tmp_path / "s"), "LISTEN_FDS": "1", "FLY_PROCESS_GROUP": "worker"}
    said = run(str(entry), "8080:web", "sh", "-c", "env", env=env)
    assert "SLUM_SERVICE=worker" in said
    assert "LISTEN_FDS" not in said
    assert "SOCKET_PATH" not in said


def test_a_dockerfile_says_what_it_said() -> None:
    for text in ("a && b", "x\ny", 'say "${X}" \\', "cat <<EOF\nx\nEOF", "RUN x\nFROM y"):
        service = Service(name="web", command=("python3.12", "x"), source="x", build=text)
        written = dockerfile(service, copy="", context="../a b\n${x}", tcp="8080:web")
        recipe = read_dockerfile(written)
        assert recipe is not None
        assert (recipe.build, recipe.context, recipe.image, recipe.has_source) == (text, "../a b\n${x}", None, True)
        assert "<<EOF" not in written
    assert "FROM python:3.13" in dockerfile(
        Service(name="web", command=("/usr/bin/python3.12",)), copy=None, context=None
    )
    assert "FROM redis:7\n" in dockerfile(
        replaced(service, image="redis:7", isolation=Level.SANDBOX), copy=None, context=None
    )


def test_yaml_is_read_as_compose_reads_it() -> None:
    text = "a: yes\nb: 22:22\nc: 0o17\nd: 2026-01-01\ne: 10m\nf: 1e3\ng: true\nh: 12\ni: ~\nj: 1_000\nk: .5\n"
    assert load(text, "x") == {
        "a": "yes",
        "b": "22:22",
        "c": "0o17",
        "d": "2026-01-01",
        "e": "10m",
        "f": 1000.0,
        "g": True,
        "h": 12,
        "i": None,
        "j": "1_000",
        "k": 0.5,
    }
    for word in HOSTILE:
        assert load(dump({word or "k": [word]}), "x") == {word or "k": [word]}


def test_durations_are_gos() -> None:
    assert [duration(value) for value in (0.1, 10.0, 1e-3, 3600.0, 0.00001)] == [
        "0.1s",
        "10s",
        "0.001s",
        "3600s",
        "0.00001s",
    ]
