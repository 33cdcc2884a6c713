"""`slum apply` on real hosts with SSH: bootstrapped, upgraded under their services, given back.

One without systemd and one with it; SLUM_SSH_HOSTS=10+2 makes ten and two, which takes some minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ssh_hosts
from e2e_site import REPOSITORY, Site, free_port

PLAIN, SYSTEMD = map(int, os.environ.get("SLUM_SSH_HOSTS", "1+1").split("+"))
COUNT = PLAIN + SYSTEMD
A_HOST_S = 25
pytestmark = [pytest.mark.root, pytest.mark.long, pytest.mark.timeout(400 + 3 * A_HOST_S * COUNT)]
FLEET = """
[operators.vps]
type = "ssh"
key = "{key}"
hosts = {hosts}

[tenement.w]
operator = "vps"
count = {count}

[tenement.w.service.ticker]
command = "sleep 4321"
isolation = "process"
listen = "none"
"""


@pytest.fixture
def hosts() -> Iterator[ssh_hosts.Site]:
    ssh_hosts.require("systemd-nspawn")
    with ssh_hosts.a_site(*(ssh_hosts.Shape(systemd=number >= PLAIN) for number in range(COUNT))) as made:
        yield made


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.slum("down", "--services", check=False)
        made.close()


def write(site: Site, hosts: ssh_hosts.Site, count: int) -> None:
    addresses = json.dumps([f"root@{host.address}" for host in hosts.hosts])
    (site.folder / "slum.toml").write_text(FLEET.format(key=hosts.key, hosts=addresses, count=count))


def running(host: ssh_hosts.Host) -> dict[str, list[int]]:
    """Return the pids of the service, and of keeper and agent with the slum that they are of."""
    found: dict[str, list[int]] = {}
    for pid in host.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if words[:2] == ["sleep", "4321"] or words[1:2] == ["4321"]:
            found.setdefault("ticker", []).append(pid)
        elif words[0].startswith("/opt/slum/") and any(w in ("slum.node.agent", "slum.node.keeper") for w in words):
            found.setdefault(words[0].split("/")[3], []).append(pid)
    return found


def newer_slum(folder: Path) -> Path:
    """Return a folder with a slum that is not quite this one."""
    shutil.copytree(REPOSITORY / "slum", folder / "slum", ignore=shutil.ignore_patterns("__pycache__"))
    with open(folder / "slum/node/agent.py", "a") as file:
        file.write("\n# newer\n")
    return folder


def test_hosts_become_tenements_are_upgraded_and_given_back(site: Site, hosts: ssh_hosts.Site, tmp_path: Path) -> None:
    gateway = hosts.gateway
    ports = ("--api-port", str(free_port()), "--ledger-port", str(free_port()))
    where = ("--address", gateway, "--listen", gateway, *ports)
    site.slum("server", "init", *where, "--recovery-key-file", str(tmp_path / "key"))
    write(site, hosts, COUNT)
    patience_s = 200 + A_HOST_S * COUNT
    site.slum("apply", "--yes", "--timeout", f"{patience_s}s", timeout=patience_s + 30)
    before = [running(host) for host in hosts.hosts]
    assert [len(one["ticker"]) for one in before] == [1] * COUNT
    inits = [site.slum("ssh", f"w-{number + 1}", "--", "cat /proc/1/comm").out for number in range(COUNT)]
    assert inits.count("systemd\n") == SYSTEMD
    assert site.slum("ssh", "w-1", "--", "exit 3", check=False).code == 3
    assert "nothing to do" in site.slum("apply", "--yes").out

    newer = newer_slum(tmp_path / "newer")
    upgrade = [sys.executable, "-P", "-m", "slum.cli.main", "bootstrap", "--operator", "vps", "--upgrade"]
    env = {**site.env, "PYTHONPATH": str(newer)}
    done = subprocess.run(
        upgrade, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=patience_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = [running(host) for host in hosts.hosts]
    for old, new in zip(before, after, strict=True):
        assert new["ticker"] == old["ticker"]
        assert len(new) == 2, "keeper or agent are still of the older slum"
        assert not new.keys() & old.keys() - {"ticker"}

    write(site, hosts, 1)
    site.slum("apply", "--yes", "--timeout", f"{patience_s}s", timeout=patience_s + 30)
    claims = {
        host.name: json.loads((host.root / "var/lib/slum/host.json").read_text())["claim"] for host in hosts.hosts
    }
    left = [host for host in hosts.hosts if claims[host.name] is None]
    assert len(left) == COUNT - 1
    for host in left:
        assert running(host) == {}
        assert not (host.root / "var/lib/slum/agent").exists()
