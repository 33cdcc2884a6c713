"""What a bootstrap decides without touching a host: steps, names, placement, wheels; and what its commands refuse."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import zipfile
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import asyncssh
import msgspec
import pytest
from cli_support import Desk, lonely  # noqa: F401 - a fixture
from ssh_support import a_site

from slum.errors import ConfigError, OperatorError
from slum.model import SshHost, SshOperator
from slum.operators import wheelhouse
from slum.operators.base import Held, Join, MachineSpec
from slum.operators.bootstrap import Facts, Install, JoinHome, Packages, Upload, check, files_of, steps
from slum.operators.local import Site
from slum.operators.ssh import Ssh
from slum.operators.ssh_hosts import (
    Address,
    FreeHosts,
    KeyFile,
    KnownKeys,
    choose_host,
    host_in,
    machine_id,
    parse_address,
)
from slum.operators.wheelhouse import Target, Wheel, Wheelhouse

CLUSTER = "c0ffee00-1111-4222-8333-944445555666"
WHEELS = tuple(Wheel(path=f"/w/{name}", sha256=name * 8, size=1_000_000) for name in ("aaaaaaaa", "bbbbbbbb"))
HOUSE = Wheelhouse(name="1.0-abcd", wheels=WHEELS)
SPEC = MachineSpec(
    cluster=CLUSTER,
    key="w-1.1",
    machine="w-1",
    tenement="w",
    join=Join(server="https://a:1 https://b:2", token="s3cret"),
)
BARE = Facts(
    distribution="Debian",
    python="3.11.2",
    arch="x86_64",
    libc="glibc 2.36",
    systemd=True,
    free_mb=5000,
    read_only=(),
    missing=("bubblewrap",),
    apt=True,
    installed=(),
    wheels=(),
    cluster="",
    claim={},
    identity={},
    runs=False,
    unit="",
    agent_python="",
)


def kinds(facts: Facts, spec: MachineSpec | None = SPEC) -> list[type]:
    return [type(step) for step in steps(facts, HOUSE, spec)]


def test_only_what_is_missing_is_left_to_do() -> None:
    assert kinds(BARE) == [Packages, Upload, Install, JoinHome]
    some = msgspec.structs.replace(BARE, missing=(), wheels=(WHEELS[0].sha256,))
    (upload, install, join) = steps(some, HOUSE, SPEC)
    assert isinstance(upload, Upload)
    assert upload.wheels == WHEELS[1:]
    assert isinstance(install, Install)
    assert isinstance(join, JoinHome)
    assert join.argv == (
        "/opt/slum/1.0-abcd/bin/slum", "join", "https://a:1", "https://b:2", "--tenement", "w-1", "--token-file", "-",
    )  # fmt: skip
    installed = msgspec.structs.replace(some, installed=("1.0-abcd",))
    assert kinds(installed) == [JoinHome]
    assert kinds(installed, None) == []
    joined = msgspec.structs.replace(installed, identity={"cluster": CLUSTER, "key": "w-1.1"}, runs=True)
    assert kinds(joined) == []
    assert kinds(msgspec.structs.replace(joined, runs=False)) == [JoinHome]
    assert kinds(msgspec.structs.replace(BARE, apt=False))[0] is Upload


def test_no_step_shows_the_token() -> None:
    shown = [f"{step!r} {step.title} {files_of(step, BARE)}" for step in steps(BARE, HOUSE, SPEC)]
    assert "s3cret" not in "".join(shown)
    assert any("+ /etc/systemd/system/slum.service" in text for text in shown)


def test_a_machine_that_cannot_join_is_refused() -> None:
    with pytest.raises(OperatorError, match="how to join home"):
        steps(BARE, HOUSE, msgspec.structs.replace(SPEC, join=None))


def test_hosts_that_cannot_hold_slum() -> None:
    check("h", BARE, HOUSE)
    for change, why in (({"free_mb": 100}, "h: 100 MB are free"), ({"read_only": ("/opt/slum",)}, "is read-only")):
        with pytest.raises(OperatorError, match=why):
            check("h", msgspec.structs.replace(BARE, **change), HOUSE)
    check("h", msgspec.structs.replace(BARE, free_mb=100, installed=(HOUSE.name,)), HOUSE)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("box", Address(host="box", port=22, user="root")),
        ("me@Box.example:2222", Address(host="box.example", port=2222, user="me")),
        ("me@[2001:db8::7]:23", Address(host="2001:db8::7", port=23, user="me")),
        ("2001:db8::7", Address(host="2001:db8::7", port=22, user="root")),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=x", "@box", "box:", "box:0", "box:99999", "box:x", "[::1", "[::1]x"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


def test_an_id_says_host_and_name() -> None:
    for host in ("10.0.0.1:22", "[2001:db8::7]:22", "box.example:2222"):
        assert host_in(machine_id(host, CLUSTER, "w-1.12")) == (host, "slum-c0ffee001111-w-1-12")
    for other in ("nobody:else", "ssh:box:22", "ssh:box:22/other", "local:m1", "slum-c0ffee001111-w-1-12"):
        assert host_in(other) is None


def test_a_machine_keeps_its_host_and_a_new_one_gets_the_first_that_is_free() -> None:
    assert choose_host(["a", "b", "c"], "x.1", {}) == "a"
    assert choose_host(["a", "b", "c"], "x.1", {"y.1": "a", "z.1": "c"}) == "b"
    assert choose_host(["a"], "x.1", {"x.1": "gone"}) == "gone"
    with pytest.raises(OperatorError, match="no host is free for x"):
        choose_host(["a"], "x.1", {"y.1": "a"})


async def test_the_first_key_stays(tmp_path: Path) -> None:
    book = KeyFile(tmp_path / "ssh" / "known_hosts")
    assert book.find("box:22") is None
    await book.pin("box:22", "ssh-ed25519 AAAA")
    await book.pin("box:22", "ssh-ed25519 AAAA")
    with pytest.raises(OperatorError, match="two keys"):
        await book.pin("box:22", "ssh-ed25519 BBBB")
    await book.pin("[2001:db8::7]:23", "ssh-ed25519 CCCC")
    assert book.find("box:22") == "ssh-ed25519 AAAA"
    assert book.path.read_text() == "box ssh-ed25519 AAAA\n[2001:db8::7]:23 ssh-ed25519 CCCC\n"
    assert book.path.stat().st_mode & 0o777 == 0o600


async def test_what_the_control_plane_knows_comes_before_the_file(tmp_path: Path) -> None:
    own = KeyFile(tmp_path / "known_hosts")
    for host in ("a:22", "b:22", "c:22"):
        await own.pin(host, "ssh-ed25519 OWN")
    book = KnownKeys({"a:22": "ssh-ed25519 THEIRS", "b:22": ""}, own)
    assert [book.find(host) for host in ("a:22", "b:22", "c:22")] == ["ssh-ed25519 THEIRS", None, "ssh-ed25519 OWN"]
    await book.pin("b:22", "ssh-ed25519 NEW")
    assert own.find("b:22") == "ssh-ed25519 OWN", "whoever leads writes it down for all"
    await book.pin("d:22", "ssh-ed25519 NEW")
    assert own.find("d:22") == "ssh-ed25519 NEW"


async def test_only_hosts_that_need_it_are_looked_at(tmp_path: Path) -> None:
    dialled: list[int] = []

    async def count(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialled.append(writer.get_extra_info("sockname")[1])
        writer.close()
        await writer.wait_closed()

    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(await asyncio.start_server(count, "127.0.0.1", 0)) for _ in range(3)]
        connected, silent, unused = (server.sockets[0].getsockname()[1] for server in servers)
        hosts = tuple(SshHost(host="127.0.0.1", port=port) for port in (connected, silent, unused))
        definition = SshOperator(name="vps", hosts=hosts, key=str(tmp_path / "none"))
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "none")
        held = tuple(
            Held(
                id=machine_id(f"127.0.0.1:{port}", CLUSTER, f"w-{n}.1"),
                key=f"w-{n}.1",
                machine=f"w-{n}",
                tenement="w",
                is_made=True,
            )
            for n, port in enumerate((connected, silent), 1)
        )
        site = replace(a_site(tmp_path, (1, 1, 1), held), alive=frozenset({"w-1.1"}), free=FreeHosts())

        async def looked(site: Site) -> list[int]:
            dialled.clear()
            seen = await Ssh(definition, site).observe(CLUSTER)
            assert [one.key for one in seen] == ["w-1.1", "w-2.1"], "what does not answer is believed to be there"
            return sorted(dialled)

        assert await looked(site) == sorted([silent, unused])
        assert site.free is not None
        site.free.found_free(site.fence, CLUSTER, f"127.0.0.1:{unused}", time.monotonic() + 60)
        assert await looked(site) == [silent]
        assert await looked(replace(site, fence=(1, 2, 0))) == sorted([silent, unused]), (
            "another leader has seen nothing"
        )


def test_wheels_fit_the_target() -> None:
    old = wheelhouse.platforms(Target(python="3.11", arch="aarch64", libc="glibc 2.31"))
    assert old[0] == "manylinux_2_31_aarch64"
    assert "manylinux2014_aarch64" in old
    assert not any("2_32" in tag for tag in old)
    assert wheelhouse.platforms(Target(python="3.11", arch="x86_64", libc="musl 1.2"))[0] == "musllinux_1_2_x86_64"


def test_what_is_installed_here_is_what_a_host_gets() -> None:
    pins = wheelhouse.pins(Target(python="3.11", arch="x86_64", libc="glibc 2.36"))
    import msgspec
    import pysyncobj

    assert f"msgspec=={msgspec.__version__}" in pins
    assert any(pin.startswith("pysyncobj==") for pin in pins), pysyncobj
    assert wheelhouse.UV in pins
    assert not any(pin.startswith(("pytest", "slum", "mypy")) for pin in pins)


def test_slums_own_wheel_is_the_code_that_runs(tmp_path: Path) -> None:
    first, second = wheelhouse._own_wheel(tmp_path / "a"), wheelhouse._own_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    root = Path(__file__).resolve().parents[1]
    with zipfile.ZipFile(first) as archive:
        names = set(archive.namelist())
        assert archive.read("slum/node/agent.py") == (root / "node/agent.py").read_bytes()
    assert {"slum/cli/main.py", "slum/operators/bootstrap_hand.py", "slum/exports/modules/ssh/variables.tf"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target"]
    subprocess.run([*pip, str(target), str(first)], check=True, timeout=60)
    assert (target / "bin/slum").exists()


def test_one_process_downloads_for_all(tmp_path: Path) -> None:
    async def two() -> list[str]:
        seen: list[str] = []

        async def one(name: str) -> None:
            async with wheelhouse._alone(tmp_path):
                seen.append(f"{name} in")
                await asyncio.sleep(0)
                seen.append(f"{name} out")

        await asyncio.gather(one("a"), one("b"))
        return seen

    seen = asyncio.run(two())
    assert [text.split()[1] for text in seen] == ["in", "out", "in", "out"]


def test_the_hand_needs_the_standard_library_only() -> None:
    import ast

    for name, more in (("bootstrap_look", set[str]()), ("bootstrap_hand", {"slum.operators.bootstrap_look"})):
        text = (Path(wheelhouse.__file__).parent / f"{name}.py").read_text()
        found = {
            node.names[0].name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert {one.split(".")[0] for one in found - more} <= set(sys.stdlib_module_names)


# --- commands ----------------------------------------------------------------------------------------------------------


def test_bootstrap_refuses_what_makes_no_sense(lonely: Desk) -> None:  # noqa: F811
    desk = lonely
    assert "which hosts?" in desk.slum("bootstrap", code=2).err
    assert "is no host" in desk.slum("bootstrap", "--", "-oProxyCommand=x", code=2).err
    assert "are the operator's own" in desk.slum("bootstrap", "--operator", "x", "--key", "k", code=2).err
    file = desk.write(
        '[operators.vps]\ntype = "ssh"\nhosts = ["10.0.0.1"]\n[operators.here]\ntype = "local"\n', "s.toml"
    )
    assert (
        "is no host of operators.vps"
        in desk.slum("bootstrap", "--operator", "vps", "-f", str(file), "10.0.0.2", code=2).err
    )
    assert "there is no operator 'vsp'" in desk.slum("bootstrap", "--operator", "vsp", "-f", str(file), code=2).err
    assert "of type local, not ssh" in desk.slum("bootstrap", "--operator", "here", "-f", str(file), code=2).err


def test_a_host_that_is_not_there_is_told(lonely: Desk) -> None:  # noqa: F811
    ran = lonely.slum("--json", "-q", "bootstrap", "root@127.0.0.1:1", code=5)
    (result,) = ran.json
    assert result["host"] == "127.0.0.1:1"
    assert result["code"] == "unreachable"
    assert result["hint"]


def test_the_operator_is_known_to_the_model() -> None:
    operator = SshOperator(name="vps", hosts=(SshHost(host="box"),), jump="me@gate")
    assert msgspec.json.decode(msgspec.json.encode(operator), type=SshOperator) == operator
