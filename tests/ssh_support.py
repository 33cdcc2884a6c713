"""What the tests of the ssh operator share: a small stand-in for slum's own wheel, sites, and a bootstrap to be killed.

The stand-in joins as `slum join` does, as far as a host shows it: it takes the token from stdin, writes the agent's files and
leaves something that answers where the keeper does. uv and all that puts things on the host are the real ones.

    python tests/ssh_support.py create|destroy SITE.json [KILL_AT]     # dies by SIGKILL at the n-th step it tells of
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from slum import model
from slum.node.types import Spawn
from slum.operators import wheelhouse
from slum.operators.base import Held, Join, MachineSpec
from slum.operators.local import Site
from slum.operators.ssh import Ssh
from slum.operators.wheelhouse import Target, Wheel, Wheelhouse
from slum.paths import Home

CLUSTER = "c0ffee00-1111-4222-8333-944445555666"
NEIGHBOUR = "deadbeef-1111-4222-8333-944445555666"
CANARY = "join-canary-7f3a9c"
MAIN = r'''
import hashlib, json, os, socket, subprocess, sys, time
DATA, RUN = "/var/lib/slum", "/run/slum/p"
KEEPER = """
import os, socket
os.makedirs("/run/slum/p", exist_ok=True)
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
path = "/run/slum/p/keeper.sock"
os.path.exists(path) and os.unlink(path)
link.bind(path)
link.listen()
open("/run/slum/pid", "w").write(str(os.getpid()))
os.write(1, b"x")
os.close(1)
while True:
    link.accept()[0].close()
"""
def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".new", "w") as file:
        file.write(text)
    os.rename(path + ".new", path)
def pid():
    try:
        found = int(open("/run/slum/pid").read())
        os.kill(found, 0)
        return found
    except (OSError, ValueError):
        return 0
def main():
    args = sys.argv[1:]
    if args[0] == "join":
        assert args[-2:] == ["--token-file", "-"], args
        token = sys.stdin.read().strip()
        claim = json.load(open(DATA + "/host.json"))
        machine = args[args.index("--tenement") + 1]
        write(DATA + "/agent/token.sha256", hashlib.sha256(token.encode()).hexdigest())
        write(DATA + "/agent/identity.json", json.dumps({"tenement": machine, "machine": "node:" + claim["claim"]["key"],
              "cluster": claim["cluster"], "key": claim["claim"]["key"], "of": claim["claim"]["tenement"]}))
        write(DATA + "/services/web/main/data", "precious")
        write(DATA + "/boot.json", json.dumps({"children": [{"name": "agent", "argv": [sys.executable]}]}))
        if not pid():
            keeper = subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, start_new_session=True)
            keeper.stdout.read(1)
        write(DATA + "/agent/home.json", "{}")
        print("joined with " + token)
    elif args[0] == "down":
        found = pid()
        if found:
            os.kill(found, 9)
            while pid():
                time.sleep(0.01)
if __name__ == "__main__":
    main()
'''


class StandIns:
    """Houses with uv and a small slum."""

    def __init__(self, folder: Path, version: str = "0.1.0") -> None:
        self._folder = folder
        self._version = version

    async def of(self, _target: Target) -> Wheelhouse:
        wheels = (_slum_wheel(self._folder, self._version), _measured(_uv(self._folder)))
        return Wheelhouse(name=f"{self._version}-standin", wheels=wheels)


@functools.cache
def shared_wheels() -> Path:
    """Return a folder of this process for wheels, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="slum-wheels-"))
    atexit.register(shutil.rmtree, folder)
    return folder


def _uv(folder: Path) -> Path:
    """Return uv's wheel, downloaded once into *folder*."""
    if not list(folder.glob("uv-*.whl")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, "--dest", str(folder), wheelhouse.UV], check=True, timeout=100)
    return next(folder.glob("uv-*.whl"))


def _slum_wheel(folder: Path, version: str) -> Wheel:
    path = folder / f"slum-{version}-py3-none-any.whl"
    if not path.exists():
        info = f"slum-{version}.dist-info"
        temporary = folder / f".{os.getpid()}.whl"
        with zipfile.ZipFile(temporary, "w") as archive:
            for name in ("__init__", "node/__init__", "node/agent", "cli/__init__"):
                archive.writestr(zipfile.ZipInfo(f"slum/{name}.py"), "")
            archive.writestr(zipfile.ZipInfo("slum/cli/main.py"), MAIN)
            archive.writestr(
                zipfile.ZipInfo(f"{info}/METADATA"), f"Metadata-Version: 2.1\nName: slum\nVersion: {version}\n"
            )
            archive.writestr(
                zipfile.ZipInfo(f"{info}/entry_points.txt"), "[console_scripts]\nslum = slum.cli.main:main\n"
            )
            archive.writestr(
                zipfile.ZipInfo(f"{info}/WHEEL"), "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(zipfile.ZipInfo(f"{info}/RECORD"), "")
        temporary.rename(path)
    return _measured(path)


def _measured(path: Path) -> Wheel:
    data = path.read_bytes()
    return Wheel(path=str(path), sha256=hashlib.sha256(data).hexdigest(), size=len(data))


def a_site(folder: Path, fence: tuple[int, ...] = (1, 1, 1), held: tuple[Held, ...] = ()) -> Site:
    home = Home(data=folder / "data", run=Path("/tmp/none"))
    return Site(home=home, member="m1", agent=Spawn(name="agent", argv=("true",), env={}), fence=fence, held=held)


def a_definition(key: Path, addresses: list[str], **fields: object) -> model.SshOperator:
    hosts = tuple(model.SshHost(host=address) for address in addresses)
    return model.SshOperator(name="vps", hosts=hosts, key=str(key), **fields)  # type: ignore[arg-type]


def a_spec(name: str = "w-1", incarnation: int = 1, cluster: str = CLUSTER) -> MachineSpec:
    join = Join(server="https://home.example:7443", token=CANARY)
    return MachineSpec(cluster=cluster, key=f"{name}.{incarnation}", machine=name, tenement="w", join=join)


def main(argv: list[str]) -> int:
    what, site_file, *rest = argv
    given = json.loads(Path(site_file).read_text())
    kill_at, told = int(rest[0]) if rest else 0, 0

    def tell(_host: str, step: str, said: str) -> None:
        nonlocal told
        told += 1
        print(step, "/", said.replace(CANARY, "LEAKED"), flush=True)
        if told == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    folder = Path(given["folder"])
    operator = Ssh(
        a_definition(Path(given["key"]), given["hosts"]),
        a_site(folder, tuple(given.get("fence", (1, 1, 1)))),
        houses=StandIns(Path(given["wheels"])),  # type: ignore[arg-type]
        tell=tell,
    )
    if what == "create":
        print(asyncio.run(operator.create(a_spec())).id)
    else:
        asyncio.run(operator.destroy(operator.machine_id(a_spec())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
