"""The backup of several members: the leader's works, the others wait, and the next leader takes over by a claim of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
from backup_support import notes, start_backup, wait_for, whys
from ledger_cluster import Cluster, Node
from ledger_support import proposal

from slum.backup import config, manifest, points, status
from slum.backup.config import Keys, Settings
from slum.backup.store import open_store
from slum.ledger.client import connect
from slum.ledger.commands import Done


async def test_the_backup_follows_the_leader(tmp_path: Path) -> None:
    settings = config.made(f"file://{tmp_path}/store", interval_ms=50, verify_hours=0)
    children: dict[str, subprocess.Popen[bytes]] = {}
    with Cluster(3, epoch_entries=40) as cluster:
        try:
            cluster.start()
            for node in cluster.nodes:
                _configure(node, settings)
                children[node.name] = start_backup(node.home, cluster.base / f"{node.name}.backup")
            first = await cluster.leader()
            written = await _write(first, "a")
            old = await wait_for(lambda: _sent(settings, first, written), words=lambda: _words(cluster))
            assert old.member == first.name
            others = [node for node in cluster.nodes if node is not first]
            await wait_for(lambda: all(_state(node) == "waiting" for node in others))

            cluster.kill(first)
            second = await cluster.leader()
            written = await _write(second, "b")
            new = await wait_for(lambda: _sent(settings, second, written), words=lambda: _words(cluster))
            assert manifest.number_of(new.claim) == manifest.number_of(old.claim) + 1
            assert [span.claim for span in new.former] == [old.claim]

            cluster.start(first)
            await cluster.agreed()
            leader = await cluster.leader()
            written = await _write(leader, "c")
            last = await wait_for(lambda: _sent(settings, leader, written), words=lambda: _words(cluster))
            assert last.member == leader.name
            await wait_for(lambda: _state(first) == ("running" if leader is first else "waiting"))
            cluster.terminate()
        finally:
            for child in children.values():
                child.kill()
                child.wait()
        point = points.restored(open_store(settings, Keys("", "")), settings, Keys("", ""), tmp_path)
        assert whys(point.path) == [f"{name}.{n}" for name in "abc" for n in range(30)]


def _configure(node: Node, settings: Settings) -> None:
    fields = {name: value for name, value in msgspec.structs.asdict(settings).items() if value != ""}
    lines = [f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}" for name, value in fields.items()]
    node.home.server_config.write_text("\n".join(["[backup]", *lines, ""]))


async def _write(node: Node, name: str) -> int:
    """Write 30 notes and return the sequence of the last."""
    async with connect(node.home.ledger_socket) as ledger:
        for command in notes(30, name):
            done = await ledger.propose(proposal(command), deadline_s=10)
            assert isinstance(done, Done), done
    return done.seq


def _sent(settings: Settings, node: Node, written: int) -> manifest.Head | None:
    """Return HEAD once *node*'s backup has sent all that its ledger holds, the entry *written* at least."""
    found = open_store(settings, Keys("", "")).get(manifest.HEAD)
    said = status.read(node.home)
    if found is None or said is None or said.head is None or said.state != "running":
        return None
    head = manifest.decode_head(found.data)
    is_all = said.seq == said.ledger_seq == head.seq >= written and head.claim == said.head.claim
    return head if is_all else None


def _state(node: Node) -> str:
    said = status.read(node.home)
    return said.state if said is not None else ""


def _words(cluster: Cluster) -> str:
    return "\n".join(path.read_text()[-1500:] for path in cluster.base.glob("*.backup"))
