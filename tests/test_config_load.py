"""fleetfile: what a sound slum.toml becomes: defaults, aliases, inline and separate tenements, sources, warnings."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest
from config_support import HEAD, loaded, write
from hypothesis import given, settings
from hypothesis import strategies as st

from slum import filekeys, fleetfile, tomlfile
from slum.errors import ConfigError
from slum.fleetfile import load
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
    Restart,
    Secret,
    Service,
    Settings,
    SshHost,
    SshOperator,
    Tenement,
)
from slum.validate import check_fleet

ROOT = Path(__file__).resolve().parents[1]


def only_service(folder: Path, text: str) -> Service:
    (service,) = loaded(folder, HEAD + text).fleet.tenements[0].services
    return service


def test_the_smallest_fleet(tmp_path: Path) -> None:
    found = loaded(tmp_path, HEAD + '[tenement.here.service.web]\ncommand = "python3 app.py"\n')
    assert found.fleet == Fleet(
        operators=(LocalOperator(name="local"),),
        tenements=(
            Tenement(name="here", operator="local", services=(Service(name="web", command=("python3", "app.py")),)),
        ),
    )
    assert found.warnings == ()
    assert found.sources == {}
    assert found.files == (tmp_path / "slum.toml",)


def test_every_key_of_a_service(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    found = loaded(
        tmp_path,
        HEAD
        + """
[tenement.here.service.db]
command = ["db"]
listen = "none"
[tenement.here.instances]
web = ["b", "a"]
[tenement.here.service.web]
command = "sh -c 'echo {{x}}'"
args = ["--id", "{id}"]
workdir = "sub"
source = "./src"
build = "make"
pre_deploy = "make migrate"
env = { B = "2", A = "{data_dir}" }
secrets = { KEY = "file:/etc/key", OTHER = "env:OTHER" }
listen = "fd"
socket = "{data_dir}/web.sock"
health = "/healthz"
depends_on = ["db"]
deploy = "replace"
drain_timeout = 1
restart = "on-failure"
startup_timeout = 2
stop_timeout = 3.5
request_timeout = 4
idle_timeout = 60
isolation = "vm"
memory_limit_mb = 6
cpu_shares = 7
pids_limit = 8
storage_quota_mb = 9
image = "debian"
kernel = "/boot/vmlinuz"
memory_mb = 128
vcpus = 2
""",
    )
    web = found.fleet.tenements[0].services[1]
    assert web == Service(
        name="web",
        command=("sh", "-c", "echo {{x}}", "--id", "{id}"),
        instances=("b", "a"),
        isolation=Level.VM,
        workdir="sub",
        source="./src",
        build="make",
        pre_deploy="make migrate",
        env=(EnvVar(name="A", value="{data_dir}"), EnvVar(name="B", value="2")),
        secrets=(Secret(name="KEY", source="file:/etc/key"), Secret(name="OTHER", source="env:OTHER")),
        listen=Listen.FD,
        socket="{data_dir}/web.sock",
        health="/healthz",
        depends_on=("db",),
        deploy=Deploy.REPLACE,
        drain_timeout_s=1.0,
        restart=Restart.ON_FAILURE,
        startup_timeout_s=2.0,
        stop_timeout_s=3.5,
        request_timeout_s=4.0,
        idle_timeout_s=60.0,
        memory_limit_mb=6,
        cpu_shares=7,
        pids_limit=8,
        storage_quota_mb=9,
        image="debian",
        kernel="/boot/vmlinuz",
        memory_mb=128,
        vcpus=2,
    )
    assert found.sources == {("here", "web"): tmp_path / "src"}


@pytest.mark.parametrize(
    ("keys", "deploy"),
    [
        ("", Deploy.OVERLAP),
        ('listen = "socket"', Deploy.OVERLAP),
        ('listen = "fd"', Deploy.OVERLAP),
        ('listen = "port"\nport = 9000', Deploy.REPLACE),
        ('listen = "none"', Deploy.REPLACE),
        ('listen = "fd"\ndeploy = "replace"', Deploy.REPLACE),
        ('socket = "{data_dir}/a.sock"', Deploy.REPLACE),
        ('listen = "fd"\nsocket = "{data_dir}/a.sock"', Deploy.OVERLAP),
    ],
)
def test_the_default_of_deploy(tmp_path: Path, keys: str, deploy: Deploy) -> None:
    assert only_service(tmp_path, f'[tenement.here.service.web]\ncommand = "x"\n{keys}\n').deploy is deploy


def test_zero_means_no_timeout(tmp_path: Path) -> None:
    keys = 'listen = "fd"\nidle_timeout = 0\nrequest_timeout = 0.0\n'
    service = only_service(tmp_path, f'[tenement.here.service.web]\ncommand = "x"\n{keys}')
    assert (service.idle_timeout_s, service.request_timeout_s) == (None, None)


def test_old_words_work_and_warn(tmp_path: Path) -> None:
    found = loaded(tmp_path, HEAD + '[tenement.here.process.web]\ncommand = "x"\nruntime = "process"\n')
    assert found.fleet.tenements[0].services == (Service(name="web", command=("x",), isolation=Level.PROCESS),)
    assert [str(warning).removeprefix(f"{tmp_path}/") for warning in found.warnings] == [
        "slum.toml:5: tenement.here.process.web: `process` is deprecated; write `service`: [service.web]",
        "slum.toml:7: tenement.here.process.web.runtime: `runtime` is deprecated; write `isolation`",
    ]


def test_a_tenement_in_its_own_file(tmp_path: Path) -> None:
    (tmp_path / "sub" / "app").mkdir(parents=True)
    config = write(
        tmp_path / "sub",
        """
[settings]
data_dir = "/srv/data"
health_check_interval = 2
max_restarts = 3
restart_window = 4
backoff_base_ms = 5
backoff_max_ms = 6
[service.api]
command = "x"
source = "app"
[instances]
api = ["one"]
[routing]
listen = "0.0.0.0:80"
""",
        "tenement-api.toml",
    )
    found = loaded(
        tmp_path,
        """
[operators.eu]
type = "hetzner"
location = "fsn1"
server_type = "cx23"
[tenement.b]
operator = "eu"
config = "sub/tenement-api.toml"
labels = { z = "1", a = "2" }
count = 3
[tenement.a]
operator = "eu"
config = "sub/../sub/tenement-api.toml"
""",
    )
    a, b = found.fleet.tenements
    assert (a.name, b.name) == ("a", "b")
    assert a.services == b.services == (Service(name="api", command=("x",), source="app", instances=("one",)),)
    assert b.settings == Settings(
        data_dir="/srv/data",
        health_check_interval_s=2.0,
        max_restarts=3,
        restart_window_s=4.0,
        backoff_base_ms=5,
        backoff_max_ms=6,
    )
    assert b.routing_listen == ("0.0.0.0:80",)
    assert b.labels == (Label(name="a", value="2"), Label(name="z", value="1"))
    assert b.machine_names == ("b-1", "b-2", "b-3")
    assert found.sources == {(name, "api"): tmp_path / "sub" / "app" for name in ("a", "b")}
    assert found.files == (tmp_path / "slum.toml", config)


def test_all_four_operators(tmp_path: Path) -> None:
    fingerprint = "SHA256:" + "A" * 43
    found = loaded(
        tmp_path,
        f"""
[operators.l]
type = "local"
member = "m1"
[operators.s]
type = "ssh"
hosts = ["h1", "me@h2", "me@h3:2222", "[2001:db8::1]", "u@[::1]:23", "2001:db8::2",
  {{ host = "h4", user = "u", port = 24, labels = {{ a = "b" }}, fingerprint = "{fingerprint}" }}]
user = "admin"
key = "/k"
jump = "me@jump:22"
host_key = "known_hosts"
known_hosts = "/etc/ssh/known"
[operators.f]
type = "fly"
org = "my-org"
region = "iad"
image = "registry.fly.io/slum:1"
cpu_kind = "performance"
cpus = 2
memory_mb = 2048
volume_gb = 10
token_env = "T"
secrets_ref = "env:T"
[operators.h]
type = "hetzner"
location = "fsn1"
server_type = "cx23"
image = "debian-12"
ssh_keys = ["ops"]
[[operators.t.hosts]]
host = "h9"
[operators.t]
type = "ssh"
""",
    )
    host = SshHost
    assert found.fleet.operators == (
        FlyOperator(
            name="f",
            org="my-org",
            region="iad",
            image="registry.fly.io/slum:1",
            cpu_kind="performance",
            cpus=2,
            memory_mb=2048,
            volume_gb=10,
            token_env="T",
            secrets_ref="env:T",
        ),
        HetznerOperator(name="h", location="fsn1", server_type="cx23", ssh_keys=("ops",)),
        LocalOperator(name="l", member="m1"),
        SshOperator(
            name="s",
            hosts=(
                host(host="h1"),
                host(host="h2", user="me"),
                host(host="h3", user="me", port=2222),
                host(host="2001:db8::1"),
                host(host="::1", user="u", port=23),
                host(host="2001:db8::2"),
                host(host="h4", user="u", port=24, labels=(Label(name="a", value="b"),), fingerprint=fingerprint),
            ),
            user="admin",
            key="/k",
            jump="me@jump:22",
            host_key=HostKeyPolicy.KNOWN_HOSTS,
            known_hosts="/etc/ssh/known",
        ),
        SshOperator(name="t", hosts=(host(host="h9"),)),
    )
    assert "declares no [tenement.NAME]" in str(found.warnings[0])


def test_order_in_the_file_does_not_matter(tmp_path: Path) -> None:
    services = ['[tenement.here.service.a]\ncommand = "x"\n', '[tenement.here.service.b]\ncommand = "y"\n']
    one = loaded(tmp_path, HEAD + "".join(services)).fleet
    other = loaded(tmp_path, HEAD + "".join(reversed(services))).fleet
    assert msgspec.json.encode(one) == msgspec.json.encode(other)


@pytest.mark.parametrize(
    ("env", "warned"),
    [
        ('DB_PASSWORD = "x"', True),
        ('apiKey = "x"', True),
        ('URL = "postgres://me:hunter2@db/x"', True),
        ('X = "AKIAABCDEFGHIJKLMNOP"', True),
        ('X = "ghp_0123456789012345678901234567890123456"', True),
        ('PASSWORD_FILE = "/etc/x"', False),
        ('TOKEN_URL = "https://example.com/token"', False),
        ('URL = "postgres://db/x"', False),
        ('EMPTY_PASSWORD = ""', False),
        ('TIMEZONE = "UTC"', False),
    ],
)
def test_credentials_in_env_are_warned_of(tmp_path: Path, env: str, warned: bool) -> None:
    found = loaded(tmp_path, HEAD + f'[tenement.here.service.web]\ncommand = "x"\nenv = {{ {env} }}\n')
    lines = [str(warning) for warning in found.warnings]
    assert bool(lines) is warned
    if warned:
        assert "slum.toml:7: tenement.here.service.web.env." in lines[0]
        assert "looks like a credential" in lines[0]


def test_a_tenement_without_services_is_warned_of(tmp_path: Path) -> None:
    (warning,) = loaded(tmp_path, HEAD).warnings
    assert str(warning).endswith(
        "slum.toml:3: tenement.here: has no services; name a `config`, or add [tenement.NAME.service.NAME]"
    )


@pytest.mark.parametrize("name", ["slum.toml.example", "slum/cli/init.toml", "examples/quickstart/slum.toml"])
def test_the_files_that_we_ship_are_sound(name: str) -> None:
    assert load(ROOT / name).warnings == ()


def test_the_example_shows_all_operators() -> None:
    kinds = {type(operator) for operator in load(ROOT / "slum.toml.example").fleet.operators}
    assert kinds == {struct for struct, _ in filekeys.OPERATORS.values()}


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode(errors="replace"))))
def test_no_bytes_raise_anything_but_config_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.toml"
    path.write_bytes(raw)
    with contextlib.suppress(ConfigError):
        load(path)


WORDS = sorted(
    {
        *filekeys.SLUM_TABLES,
        *filekeys.TENEMENT_TABLES,
        *(key for keys in (filekeys.FLEET, filekeys.TENEMENT, filekeys.SETTINGS, filekeys.SERVICE) for key in keys),
        *(key for _, keys in filekeys.OPERATORS.values() for key in keys),
        "type",
        "runtime",
        "web",
        "Web",
        "x y",
        "",
        "é",
    }
)
SCALAR = st.one_of(
    st.sampled_from(
        [
            "local",
            "ssh",
            "fly",
            "hetzner",
            "none",
            "fd",
            "port",
            "vm",
            "web",
            "x",
            "../x",
            "~",
            "{id}",
            "{",
            "file:/a",
            "",
        ]
    ),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.text(max_size=5),
)
NODE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)),
    max_leaves=12,
)
SERVICE_TABLE = st.dictionaries(st.sampled_from([*filekeys.SERVICE, "runtime"]), NODE, max_size=6)
TENEMENT_TABLE = st.fixed_dictionaries(
    {},
    optional={
        "operator": st.just("web"),
        "config": SCALAR,
        "count": SCALAR,
        "service": st.dictionaries(st.sampled_from(["web", "x", "Web"]), SERVICE_TABLE, max_size=2),
        "process": st.dictionaries(st.sampled_from(["web", "x"]), SERVICE_TABLE, max_size=2),
        "instances": NODE,
        "settings": NODE,
        "routing": NODE,
    },
)
OPERATOR_TABLE = st.one_of(
    NODE,
    st.fixed_dictionaries({"type": st.sampled_from(sorted(filekeys.OPERATORS))}, optional={"hosts": NODE, "org": NODE}),
)
TREE = st.fixed_dictionaries(
    {},
    optional={
        "fleet": NODE,
        "operators": st.one_of(NODE, st.dictionaries(st.sampled_from(["web", "x"]), OPERATOR_TABLE, max_size=2)),
        "tenement": st.one_of(NODE, st.dictionaries(st.sampled_from(["web", "x"]), TENEMENT_TABLE, max_size=2)),
        "other": NODE,
    },
)


@settings(max_examples=300, deadline=None)
@given(TREE)
def test_no_tree_raises_anything_but_config_error(tree: dict[str, object]) -> None:
    """Whatever values stand at whatever keys: a sound fleet or a ConfigError, and every message is one clean line."""
    document = tomlfile.Document(name="slum.toml", folder=Path("/nowhere"), data=tree, lines={})
    problems: tuple[str, ...] = ()
    try:
        fleet = fleetfile.load_document(document).fleet
    except ConfigError as error:
        problems = error.problems
    if problems:
        assert all(line.isprintable() for line in problems)
        return
    assert check_fleet(fleet) == ()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(fleet), type=Fleet) == fleet


def test_a_key_without_effect_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "slum.toml"
    file.write_text(
        '[operators.local]\ntype = "local"\n[tenement.here]\noperator = "local"\n[tenement.here.service.web]\n'
        'command = "x"\nlisten = "fd"\nidle_timeout = 60\n'
    )
    assert [str(warning).split(": ", 1)[1] for warning in load(file).warnings] == [
        "tenement.here.service.web.idle_timeout: has no effect in this version: services are not put to sleep yet"
    ]
