"""Ten hosts get a file of 5 MB, a unit file and a process that runs: slum's way over SSH against pyinfra and Ansible.

    python benchmarks/bootstrap.py [--hosts 10] [--rounds 3]        # as root, some 3 minutes; peers in a venv of their own

Hosts are real sshd in namespaces (tests/ssh_hosts.py). Each tool is a process of its own, from its start to its end; they take
turns, each on fresh paths. Claims: 1.5 times as fast as pyinfra, 8 times as fast as Ansible (-f 10), medians; and a second
run of `slum bootstrap`'s own steps that finds nothing to do takes under 1 s. Exits 1 when one does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from slum import model  # noqa: E402
from slum.operators.ssh_hand import Hand, working  # noqa: E402
from slum.operators.ssh_hosts import KeyFile  # noqa: E402
from slum.operators.ssh_link import Dialer  # noqa: E402

if TYPE_CHECKING:
    from ssh_hosts import Site

PEERS = Path("/var/tmp/slum-bench-peers")
VERSIONS = ("pyinfra>=3.5", "ansible-core>=2.18")
FILE_BYTES = 5_000_000
PYINFRA_BOUND, ANSIBLE_BOUND, AGAIN_S = 1 / 1.5, 1 / 8, 1.0
UNIT = "[Service]\nExecStart=/bin/sleep 600\n"
START = "kill -0 $(cat {pid} 2>/dev/null) 2>/dev/null || (setsid sleep 600 >/dev/null 2>&1 & echo $! >{pid})"


async def ours(given: dict[str, str], payload: bytes) -> None:
    """Put file and unit where they are missing, then start what does not run; the same steps that bootstrap uses."""
    hosts = tuple(model.SshHost(host=address) for address in given["hosts"].split())
    operator = model.SshOperator(name="bench", hosts=hosts, key=given["key"])
    wanted = {given["to"]: payload, given["unit"]: UNIT.encode()}
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in wanted.items()}

    async def one(dialer: Dialer, host: model.SshHost) -> None:
        async with dialer.to(host) as connection, working(host.host, connection) as hand:
            await put_missing(hand, wanted, digests)
            done = await hand.ask("run", argv=["sh", "-c", START.format(pid=given["pid"])], stdin="", timeout_s=20)
            assert done["status"] == 0, done

    async with Dialer(operator, KeyFile(Path(given["known"]))) as dialer, asyncio.TaskGroup() as group:
        for host in hosts:
            group.create_task(one(dialer, host))


async def put_missing(hand: Hand, wanted: dict[str, bytes], digests: dict[str, str]) -> None:
    there = (await hand.ask("have", paths=list(wanted)))["digests"]
    for path, data in wanted.items():
        if there[path] != digests[path]:
            await hand.ask(
                "put", (io.BytesIO(data), len(data)), path=path, size=len(data), sha256=digests[path], mode=0o644
            )


def install_peers() -> None:
    if not (PEERS / "bin/ansible-playbook").exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    if not all((PEERS / "bin" / name).exists() for name in ("pyinfra", "ansible-playbook")):
        subprocess.run([str(PEERS / "bin/pip"), "install", "--quiet", *VERSIONS], check=True)


def lay_out(folder: Path, site: Site, number: int) -> dict[str, str]:
    """Write what each tool reads, for files that no earlier round has put there."""
    to, unit, pid = f"/srv/payload{number}", f"/srv/bench{number}.service", f"/run/bench{number}.pid"
    (folder / "unit").write_text(UNIT)
    addresses = [host.address for host in site.hosts]
    (folder / "inventory.py").write_text(
        f"hosts = [(a, {{'ssh_user': 'root', 'ssh_key': {str(site.key)!r}, 'ssh_strict_host_key_checking': 'off'}})"
        f" for a in {addresses!r}]\n"
    )
    (folder / "deploy.py").write_text(
        "from pyinfra.operations import files, server\n"
        f"files.put(src={str(folder / 'payload')!r}, dest={to + 'p'!r})\n"
        f"files.put(src={str(folder / 'unit')!r}, dest={unit + 'p'!r})\n"
        f"server.shell(commands=[{START.format(pid=pid + 'p')!r}])\n"
    )
    (folder / "hosts.ini").write_text(
        "\n".join(f"{a} ansible_user=root ansible_ssh_private_key_file={site.key}" for a in addresses) + "\n"
    )
    play = [
        {
            "hosts": "all",
            "gather_facts": False,
            "tasks": [
                {"copy": {"src": str(folder / "payload"), "dest": to + "a"}},
                {"copy": {"src": str(folder / "unit"), "dest": unit + "a"}},
                {"shell": START.format(pid=pid + "a")},
            ],
        }
    ]
    (folder / "play.yml").write_text(json.dumps(play))
    return {
        "hosts": " ".join(addresses),
        "key": str(site.key),
        "file": str(folder / "payload"),
        "to": to,
        "unit": unit,
        "pid": pid,
        "known": str(folder / "known_hosts"),
    }


def timed(folder: Path, *argv: str) -> float:
    env = {**os.environ, "ANSIBLE_HOST_KEY_CHECKING": "False", "ANSIBLE_PYTHON_INTERPRETER": "/usr/bin/python3"}
    began = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{argv[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return took


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--hosts", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.ours:
        given_us = json.loads(Path(options.ours).read_text())
        asyncio.run(ours(given_us, Path(given_us["file"]).read_bytes()))
        return 0
    from measure import row
    from ssh_hosts import Shape, a_site

    install_peers()
    mine: list[float] = []
    again: list[float] = []
    pyinfra: list[float] = []
    ansible: list[float] = []
    with tempfile.TemporaryDirectory() as name, a_site(*(Shape() for _ in range(options.hosts))) as site:
        folder = Path(name)
        (folder / "payload").write_bytes(os.urandom(FILE_BYTES))
        for number in range(options.rounds):
            given = folder / "given.json"
            given.write_text(json.dumps(lay_out(folder, site, number)))
            me = (sys.executable, __file__, "--ours", str(given))
            mine.append(timed(folder, *me))
            again.append(timed(folder, *me))
            pyinfra.append(timed(folder, str(PEERS / "bin/pyinfra"), "-y", "inventory.py", "deploy.py"))
            ansible.append(
                timed(folder, str(PEERS / "bin/ansible-playbook"), "-f", "10", "-i", "hosts.ini", "play.yml")
            )
    good = row(
        f"{options.hosts} hosts, against pyinfra", mine, pyinfra, bound=round(PYINFRA_BOUND, 3), unit="s", scale=1
    )
    good &= row(f"{options.hosts} hosts, against Ansible", mine, ansible, bound=ANSIBLE_BOUND, unit="s", scale=1)
    second = statistics.median(again)
    print(f"nothing to do: {second:.2f} s [{min(again):.2f}..{max(again):.2f}] (bound {AGAIN_S} s)")
    return 0 if good and second < AGAIN_S else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
