"""A machine elsewhere, end to end: real members with their fronts, a network namespace a machine, everything by commands."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_provider import Provider, cloud_toml
from cluster_site import Cluster, Failed, Host, fleet_toml, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240), pytest.mark.xdist_group("cluster")]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    for tool in ("ip", "nft", "nsenter"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not there")
    with Cluster() as made:
        yield made


def ask(host: Host, service: str = "hello") -> str:
    """Ask a service on *host* by its route, as the router does."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(host.run / "r" / f"{service}.sock"))
        connection.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
        answer = b""
        while data := connection.recv(65536):
            answer += data
    return answer.partition(b"\r\n\r\n")[2].decode()


def status(cluster: Cluster, host: Host) -> dict[str, object]:
    found: dict[str, object] = cluster.slum(host, "status", "--json").json
    return found


def test_a_machine_elsewhere_serves_and_outlives_members(cluster: Cluster, tmp_path: Path) -> None:
    cluster.make(members=2)
    m1, m2 = cluster.hosts["m1"], cluster.hosts["m2"]
    with Provider(cluster, (m1, m2)):
        app = tmp_path / "app"
        app.mkdir()
        (app / "word.txt").write_text("packed at home")
        extra = (
            '[tenement.w1.service.say]\ncommand = ["sh", "-c", "cat word.txt; echo; exec sleep 900"]\n'
            f'isolation = "process"\nlisten = "none"\nsource = "{app}"\n'
        )
        file = tmp_path / "slum.toml"
        file.write_text(fleet_toml() + cloud_toml(["w1"]) + extra)
        applied = cluster.slum(m1, "apply", str(file), "--yes", timeout=120)
        assert "w1" in applied.out
        w1 = cluster.hosts["w1"]
        name, pid = ask(w1).split()
        assert name == "w1"
        assert "packed at home" in cluster.slum(m2, "logs", "say").out, "whichever member is asked"
        assert "behind a wall" in cluster.slum(m2, "run", "say", "--", "echo", "behind a wall").out
        here = status(cluster, w1)
        assert (here["node"], here["fleet"]) == ("w1", "demo")
        assert set(here["servers"]) == {m1.api, m2.api}
        with pytest.raises(Failed, match="is a node of fleet demo"):
            cluster.slum(w1, "apply", str(file), "--yes")

        lost = next(host for host in (m1, m2) if host.api == here["connected"])
        other = m2 if lost is m1 else m1
        cluster.power_off(lost)
        began = time.monotonic()
        until(lambda: status(cluster, w1)["connected"] == other.api, 30, "the agent at the other member")
        print(f"back at another member after {time.monotonic() - began:.1f} s")
        cluster.power_off(other)
        until(lambda: status(cluster, w1)["connected"] == "", 30, "an agent without members")
        assert ask(w1).split() == ["w1", pid], "the service notices nothing"

        cluster.power_off(w1)
        cluster.slum(w1, "up")
        until(
            lambda: (w1.run / "r" / "hello.sock").exists() and ask(w1).startswith("w1 "), 30, "services after a reboot"
        )
        assert not [words for _, words in cluster.processes(w1) if "slum.server" in words or "slum.ledger" in words]

        cluster.boot(m1, m2)
        until(lambda: status(cluster, w1)["connected"], 60, "the agent's line")
        cluster.leader(60)
        assert "packed at home" in until(lambda: cluster.slum(m1, "logs", "say", check=False).out, 30, "logs")
