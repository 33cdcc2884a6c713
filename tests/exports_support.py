"""For the tests of exports: generated fleets, what two fleets differ in, and the real tools that judge the files."""

from __future__ import annotations

import json
import os
import posixpath
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import exports_schemas
import msgspec
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from slum.exports.base import File, Loss
from slum.exports.container import run_of
from slum.model import (
    Deploy,
    EnvVar,
    Fleet,
    FlyOperator,
    HetznerOperator,
    HostKeyPolicy,
    Label,
    Level,
    Listen,
    LocalOperator,
    Operator,
    Restart,
    Secret,
    Service,
    Settings,
    SshHost,
    SshOperator,
    Tenement,
)
from slum.problem import file_key
from slum.validate import check_fleet

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = (
    *(
        '"',
        "'",
        "\\",
        "`",
        "$",
        "$$",
        "$$$",
        "%",
        "%%",
        "#",
        ":",
        "- ",
        " ",
        "!",
        "&",
        "*",
        "|",
        ">",
        "<",
        "@",
        "=",
        ",",
        ";",
    ),
    *("${HOME}", "$${HOME}", "$$${x}", "%{if true}", "%%{x}", "${", "%{", "$(id)", "$HOME", "${a:-b}", "${{x}}", "$&{"),
    *(
        "\n",
        "\r\n",
        "\t",
        "\n\n",
        "\n---\n",
        "\n# x\n",
        "\nEOF\n",
        "\nSLUM_ENTRY\n",
        "<<EOT",
        "\x1b[31m",
        "\x7f",
        "\x85",
    ),
    *("\u00e9", "e\u0301", "\u2028", "\u2029", "\u200b", "\ufeff", "\U0001f600", "\u202e", "\u00a0"),
    *(
        "yes",
        "no",
        "on",
        "null",
        "~",
        "true",
        "1e3",
        "0o17",
        "0x1f",
        "12:30",
        "2026-01-01",
        ".5",
        "-",
        "--",
        "NaN",
        "<<",
    ),
    *(
        "'''",
        '"""',
        "]]",
        "[[x]]",
        "{{",
        "}}",
        "/data",
        "/app",
        "/run/slum/app.sock",
        "/data/x",
        "SLUM",
        "main",
        "a",
        "b",
    ),
)


def text(*, empty: bool = True, lines: bool = True) -> st.SearchStrategy[str]:
    """Literal text with braces doubled, as slum.toml writes it; hostile pieces first."""
    letters = st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",))
    pieces = st.one_of(st.sampled_from(HOSTILE), st.text(letters, max_size=4))
    made = st.lists(pieces, min_size=0 if empty else 1, max_size=5).map("".join)
    if not lines:
        made = made.map(lambda t: "".join(c for c in t if c == "\t" or (c >= " " and c not in "\x7f\x85")))
    if not empty:
        made = made.map(lambda t: t if t.strip() else "x" + t)
    return made.map(lambda t: t.replace("{", "{{").replace("}", "}}"))


def filled(listen: Listen, *, empty: bool = True) -> st.SearchStrategy[str]:
    """Text with placeholders that have a value."""
    known = ["{name}", "{id}", "{data_dir}", "{data_dir}/db", "x-{id}-y", "{id}{id}"]
    known += ["{socket}"] if listen in (Listen.SOCKET, Listen.FD) else []
    known += ["{port}"] if listen is Listen.PORT else []
    return st.one_of(text(empty=empty), st.tuples(text(), st.sampled_from(known), text()).map("".join))


NAMES = ("web", "api", "caddy", "a-b", "a", "b-c", "1x", "router", "pre-deploy", "x9", "n" * 32)
IDS = ("main", "acme", "a", "ab", "b", "main-2", "0", "z" * 40)
SECONDS = st.one_of(st.integers(1, 600).map(float), st.sampled_from([0.1, 0.25, 1.5, 59.9, 300.0, 3600.0]))


@st.composite
def services(draw: st.DrawFn, name: str, port: int, known: Sequence[str]) -> Service:
    listen = draw(st.sampled_from(Listen))
    level = draw(st.sampled_from(Level))
    ids = (
        draw(st.lists(st.sampled_from(IDS), min_size=1, max_size=3, unique=True))
        if listen is not Listen.PORT
        else ["main"]
    )
    routed, vm = listen is not Listen.NONE, level is Level.VM
    own = listen in (Listen.SOCKET, Listen.FD) and draw(st.booleans())
    sockets = st.sampled_from(["{data_dir}/app.sock", "{data_dir}/s/{id}.sock", "{data_dir}/a b.sock"])
    replace = listen in (Listen.PORT, Listen.NONE) or (listen is Listen.SOCKET and own)
    env_names = draw(st.lists(st.sampled_from(["A", "B_2", "_x", "HOME2", "on"]), max_size=3, unique=True))
    secret_names = draw(st.lists(st.sampled_from(["KEY", "TOKEN_1", "Z"]), max_size=2, unique=True))
    maybe = lambda strategy: st.none() | strategy  # noqa: E731 - short and used below only
    source = draw(maybe(st.sampled_from(["app", "./a/../b", "../up", "/abs/x", "a b$c"])))
    return Service(
        name=name,
        command=tuple(draw(st.lists(filled(listen), max_size=3).map(lambda w: ["python3", *w]))),
        instances=tuple(ids),
        isolation=level,
        workdir=draw(maybe(st.sampled_from(["sub", "/srv", "{data_dir}", "a b/{id}", "$x"]))),
        source=source,
        build=draw(maybe(text(empty=False, lines=False))) if source is not None else None,
        pre_deploy=draw(maybe(text(empty=False, lines=False))),
        env=tuple(EnvVar(name=n, value=draw(filled(listen))) for n in sorted(env_names)),
        secrets=tuple(
            Secret(name=n, source=draw(st.sampled_from(["file:/etc/slum/k", "env:FROM", "file:/a b/$x"])))
            for n in sorted(secret_names)
        ),
        listen=listen,
        socket=draw(sockets) if own else None,
        port=port if listen is Listen.PORT else None,
        health=draw(maybe(st.sampled_from(["/", "/healthz", "/a?b=$c&d=%7Bx%7D", '/"${x}']))) if routed else None,
        depends_on=tuple(sorted(draw(st.lists(st.sampled_from(known), max_size=2, unique=True)))) if known else (),
        deploy=Deploy.REPLACE if replace else draw(st.sampled_from(Deploy)),
        drain_timeout_s=draw(st.just(30.0) | SECONDS),
        restart=draw(st.sampled_from(Restart)),
        startup_timeout_s=draw(st.just(30.0) | SECONDS),
        stop_timeout_s=draw(st.just(10.0) | SECONDS),
        request_timeout_s=draw(maybe(SECONDS)) if routed else None,
        idle_timeout_s=draw(maybe(st.integers(1, 3600).map(float))) if listen is Listen.FD else None,
        memory_limit_mb=draw(maybe(st.sampled_from([6, 128, 256, 1000]))),
        cpu_shares=draw(maybe(st.integers(1, 10_000))),
        pids_limit=draw(maybe(st.integers(1, 5000))),
        storage_quota_mb=draw(maybe(st.just(512))),
        image=draw(
            maybe(st.sampled_from(["redis:7", "ghcr.io/x/y@sha256:ab", "not an image", "python:3.13-slim-bookworm"]))
        )
        if level in (Level.SANDBOX, Level.VM)
        else None,
        kernel=draw(maybe(st.just("/boot/k"))) if vm else None,
        memory_mb=draw(maybe(st.just(512))) if vm else None,
        vcpus=draw(maybe(st.integers(1, 8))) if vm else None,
    )


LABELS = st.dictionaries(
    st.sampled_from(["tier", "a.b/c", "x/y/z", "hetzner.cloud/x"]),
    st.sampled_from(["", "production", "a/b"]),
    max_size=2,
).map(lambda found: tuple(Label(name=k, value=v) for k, v in sorted(found.items())))


@st.composite
def tenements(draw: st.DrawFn, name: str, operator: Operator) -> Tenement:
    names = sorted(draw(st.lists(st.sampled_from(NAMES), max_size=3, unique=True)))
    made: list[Service] = []
    for number, service in enumerate(names):
        made.append(draw(services(service, 5000 + number if number else 8080, [s.name for s in made])))
    base = draw(st.sampled_from([500, 100]))
    listen = st.sampled_from([("127.0.0.1:8000", "[::1]:8000"), ("0.0.0.0:80", "[::]:443"), ("127.0.0.1:9090",)])
    return Tenement(
        name=name,
        operator=operator.name,
        count=draw(st.sampled_from([1, 1, 2])) if isinstance(operator, FlyOperator | HetznerOperator) else 1,
        labels=draw(LABELS),
        settings=Settings(
            data_dir=draw(st.none() | st.just("/srv/slum")),
            health_check_interval_s=draw(st.just(10.0) | SECONDS),
            max_restarts=draw(st.just(5) | st.integers(0, 20)),
            restart_window_s=draw(st.sampled_from([60.0, 30.0])),
            backoff_base_ms=base,
        ),
        services=tuple(made),
        routing_listen=draw(listen),
    )


OPERATORS: st.SearchStrategy[Operator] = st.one_of(
    st.just(LocalOperator(name="local")),
    st.just(LocalOperator(name="box", member="m1")),
    st.builds(
        FlyOperator,
        name=st.sampled_from(["fly", "fly-prod"]),
        org=st.sampled_from(["personal", "my-org"]),
        region=st.sampled_from(["iad", "fra"]),
        cpus=st.integers(1, 4),
        memory_mb=st.sampled_from([512, 1024]),
        volume_gb=st.integers(1, 9),
        image=st.none() | st.just("registry.fly.io/x:1"),
        token_env=st.sampled_from(["FLY_API_TOKEN", "MY_FLY"]),
    ),
    st.builds(
        HetznerOperator,
        name=st.sampled_from(["hetzner", "_".join(["h"]), "1h"]),
        location=st.sampled_from(["fsn1", "ash"]),
        server_type=st.just("cx23"),
        ssh_keys=st.lists(text(empty=False, lines=False).filter(str.isprintable), max_size=2, unique=True).map(tuple),
        token_env=st.sampled_from(["HCLOUD_TOKEN", "OTHER"]),
    ),
    st.builds(
        SshOperator,
        name=st.sampled_from(["vps", "metal"]),
        hosts=st.just((SshHost(host="203.0.113.7"), SshHost(host="2001:db8::7", user="deploy", port=2222))),
        key=st.none() | text(empty=False, lines=False).map(lambda t: "/" + t.replace("..", "").lstrip("/")),
        host_key=st.sampled_from([HostKeyPolicy.ACCEPT_NEW, HostKeyPolicy.KNOWN_HOSTS]),
    ),
)


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Sound fleets, small and nasty."""
    operators = draw(st.lists(OPERATORS, min_size=1, max_size=2, unique_by=(lambda o: o.name, lambda o: type(o))))
    names = draw(st.lists(st.sampled_from(["here", "api-prod", "a", "a-b", "t" * 30]), max_size=2, unique=True))
    made = [draw(tenements(name, operators[n % len(operators)])) for n, name in enumerate(sorted(names))]
    fleet = Fleet(
        name=draw(st.sampled_from(["default", "shop", "a-b", "f" * 32])),
        domain=draw(st.sampled_from(["localhost", "example.com", "slum.test"])),
        operators=tuple(sorted(operators, key=lambda o: o.name)),
        tenements=tuple(made),
    )
    assume(not check_fleet(fleet))
    return fleet


# --- what two fleets differ in ----------------------------------------------------------------------------------------
def meaning(fleet: Fleet) -> dict[str, object]:
    """Return every place of *fleet* with what it means: texts filled in as a container sees them."""
    found: dict[str, object] = {"fleet.name": fleet.name, "fleet.domain": fleet.domain}
    for operator in fleet.operators:
        at = f"operators.{operator.name}"
        found[at] = operator.__struct_config__.tag
        found |= {f"{at}.{key}": getattr(operator, key) for key in operator.__struct_fields__ if key != "name"}
    for tenement in fleet.tenements:
        at = f"tenement.{tenement.name}"
        found |= {
            at: "",
            f"{at}.operator": tenement.operator,
            f"{at}.count": tenement.count,
            f"{at}.labels": tenement.labels,
        }
        found[f"{at}.routing.listen"] = tenement.routing_listen
        for key in Settings.__struct_fields__:
            found[f"{at}.settings.{file_key(key)}"] = getattr(tenement.settings, key)
        for service in tenement.services:
            found |= _service(tenement, service, f"{at}.service.{service.name}")
    return found


def _service(tenement: Tenement, service: Service, at: str) -> dict[str, object]:
    runs = {one: run_of(tenement.name, service, one) for one in service.instances}
    found: dict[str, object] = {at: ""}
    for key in Service.__struct_fields__:
        if key not in ("name", "command", "env", "secrets", "workdir", "source", "socket"):
            found[f"{at}.{file_key(key)}"] = getattr(service, key)
    found[f"{at}.command"] = {one: run.command for one, run in runs.items()}
    found[f"{at}.workdir"] = {one: run.workdir for one, run in runs.items()}
    found[f"{at}.socket"] = {one: run.socket for one, run in runs.items()}
    found[f"{at}.source"] = None if service.source is None else posixpath.normpath(service.source)
    for variable in service.env:
        found[f"{at}.env.{variable.name}"] = {
            one: next(v.value for v in run.env if v.name == variable.name) for one, run in runs.items()
        }
    found |= {f"{at}.secrets.{secret.name}": secret.source for secret in service.secrets}
    return found


def uncovered(before: Fleet, after: Fleet, losses: Iterable[Loss]) -> dict[str, tuple[object, object]]:
    """Return the places where the fleets differ and no loss says so: place -> (before, after)."""
    one, other = meaning(before), meaning(after)
    told = {loss.path for loss in losses}
    different = {
        path: (one.get(path), other.get(path)) for path in one.keys() | other.keys() if one.get(path) != other.get(path)
    }
    stand_ins = {t.operator for t in after.tenements if f"tenement.{t.name}.operator" in told}
    stand_ins |= {o.name for o in after.operators} if not after.tenements else set()
    return {
        path: values
        for path, values in different.items()
        if not any(path == place or path.startswith(place + ".") for place in told)
        and not (path.split(".")[0] == "operators" and path.split(".")[1] in stand_ins)
    }


def too_wide(fleet: Fleet, losses: Iterable[Loss]) -> list[str]:
    """Return losses that name more than one key at once, where only that key is lost."""
    places = meaning(fleet)
    empty = {f"tenement.{t.name}" for t in fleet.tenements if not t.services}
    tables = {f"operators.{o.name}" for o in fleet.operators}
    paths = [loss.path for loss in losses if loss.path not in empty | tables]
    return [path for path in paths if path not in places or places[path] == ""]


# --- the judges -------------------------------------------------------------------------------------------------------
def lay(folder: Path, files: Iterable[File]) -> Path:
    for file in files:
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.text, encoding="utf-8", newline="")
    return folder


def tool(name: str) -> str:
    """Return where *name* is; skips by its name. In CI every skip is a failure."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not installed" + (": put a release of it on the PATH" if name == "terraform" else ""))
    return found


def run(*words: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, stdin: str | None = None) -> str:
    """Return the stdout of a tool; fails with all it said."""
    whole = {**os.environ, **(env or {})}
    done = subprocess.run(
        words, cwd=cwd, env=whole, input=stdin, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Terraform:
    """The real terraform, offline, with providers that know schemas only."""

    def __init__(self, folder: Path) -> None:
        self.binary = tool("terraform")
        self.config = folder / "terraform.rc"
        overrides = []
        for table in (_hcloud(), exports_schemas.FLY):
            place = folder / table["name"]
            place.mkdir()
            (place / "schema.json").write_text(json.dumps(table))
            program = place / f"terraform-provider-{table['name']}"
            provider = ROOT / "tests" / "exports_provider.py"
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {provider} {place}/schema.json "$@"\n')
            program.chmod(0o755)
            overrides.append(f'    "{table["source"].removeprefix("registry.terraform.io/")}" = "{place}"')
        lines = ["provider_installation {", "  dev_overrides {", *overrides, "  }", "  direct {}", "}"]
        self.config.write_text("\n".join(lines) + "\n")

    def __call__(self, folder: Path, *words: str, variables: Mapping[str, object] | None = None) -> str:
        env = {"CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": str(self.config), "TF_IN_AUTOMATION": "1"}
        env |= {f"TF_VAR_{k}": v if isinstance(v, str) else json.dumps(v) for k, v in (variables or {}).items()}
        return run(self.binary, f"-chdir={folder}", *words, env=env)


@cache
def _hcloud() -> dict[str, Any]:
    pytest.importorskip("tf", reason="tf (PyPI) is not installed")
    return exports_schemas.hcloud()


@pytest.fixture(scope="module")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    return Terraform(tmp_path_factory.mktemp("terraform"))


def hcl2json(folder: Path) -> dict[str, Any]:
    """Return what HashiCorp's own parser reads from the .tf files in *folder*."""
    node = tool("node")
    package = Path(sys.prefix) / "npm" / "node_modules" / "@cdktf" / "hcl2json"
    if not package.exists():
        pytest.skip("@cdktf/hcl2json (npm) is not installed: scripts/install.sh dev")
    script = (
        f"const {{parse}} = require({json.dumps(str(package))}); const fs = require('fs'); (async () => {{ const out = {{}};"
        "for (const f of process.argv.slice(1)) out[f] = await parse(f, fs.readFileSync(f, 'utf8'));"
        "console.log(JSON.stringify(out)); })()"
    )
    files = sorted(str(path) for path in folder.rglob("*.tf"))
    found: dict[str, Any] = json.loads(run(node, "-e", script, *files))
    return found


def replaced(service: Service, **fields: Any) -> Service:
    return msgspec.structs.replace(service, **fields)
