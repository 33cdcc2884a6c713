"""Every member and every disk of the control plane is gone; machines elsewhere live on and are taken up again by the same processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from members_support import MARKS, Cluster, Host, until

from cluster_provider import Provider, cloud_toml  # isort: skip
from cluster_site import fleet_toml  # isort: skip

pytestmark = [*(mark for mark in MARKS if mark.name != "xdist_group"), pytest.mark.timeout(240)]
ADOPTED_S = 300.0


@pytest.fixture
def lost() -> Iterator[Cluster]:
    with Cluster() as made:
        yield made


def processes(cluster: Cluster, host: Host) -> dict[int, str]:
    """All processes of *host*, by pid and start time."""
    return {pid: Path(f"/proc/{pid}/stat").read_text().split()[21] for pid, _ in cluster.processes(host)}


def test_what_runs_elsewhere_is_taken_up_again_untouched(lost: Cluster) -> None:
    store = f"file://{lost.base}/store"
    m1 = lost.host("m1")
    configure(m1, store)
    lost.init(m1)
    with Provider(lost, (m1,)) as provider:
        toml = lost.base / "slum.toml"
        toml.write_text(fleet_toml() + cloud_toml(["w1"]))
        lost.slum(m1, "apply", str(toml), "--yes", timeout=120)
        w1 = lost.hosts["w1"]
        until(lambda: sent(lost, m1), 30, "the backup has all")
        before = processes(lost, w1)
        machines = set(provider.fake.alive())

        lost.power_off(m1)
        shutil.rmtree(m1.data)
        key = str(lost.base / "recovery.key")
        wrong = lost.slum(m1, "restore", "--from", store, "--recovery-key-file", str(toml), check=False)
        assert wrong.code == 2, wrong
        restored = lost.slum(m1, "restore", "--from", store, "--recovery-key-file", key, "--json").json
        assert restored["authority"] == "opened"
        lost.slum(m1, "server", "init", "--address", m1.address, "--member", "m1")
        lost.slum(m1, "secret", "set", "HCLOUD_TOKEN", "--operator", input=provider.fake.token)
        lost.slum(m1, "secret", "set", "HCLOUD_ENDPOINT", "--operator", input=f"{provider.fake.url}/v1")

        def seen() -> dict[str, Any]:
            found: dict[str, Any] = lost.slum(m1, "resume", "--json").json
            return {} if found["waiting"] else found

        shown = until(seen, ADOPTED_S, "the agent elsewhere has reported")
        assert (shown["paused"], shown["steps"]) == (True, [])
        assert processes(lost, w1) == before
        lost.slum(m1, "resume", "--yes")
        phase = "healthy"
        until(lambda: [row["report"]["phase"] for row in lost.slum(m1, "ps", "--json").json] == [phase], 30, phase)
        lost.slum(m1, "apply", str(toml), "--yes")
        assert processes(lost, w1) == before, "not one process was touched"
        assert set(provider.fake.alive()) == machines


def configure(host: Host, store: str) -> None:
    host.data.mkdir(mode=0o711, parents=True)
    (host.data / "server.toml").write_text(f'[backup]\nurl = "{store}"\ninterval_ms = 100\nverify_hours = 0\n')


def sent(cluster: Cluster, host: Host) -> bool:
    said = cluster.slum(host, "backup", "status", "--json", check=False).json
    return bool(said["ok"]) and said["waiting"] == 0
