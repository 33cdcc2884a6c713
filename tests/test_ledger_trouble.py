"""Members in processes of their own under what machines do to them: full disks, long stops, old dates, two versions, strangers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_cluster import Cluster, Node, until
from ledger_support import note, proposal
from test_ledger_cluster import more, under_load

from slum.errors import Conflict, QuorumLost, Unreachable
from slum.ledger import identity
from slum.ledger.beginning import Beginning, begin
from slum.ledger.client import connect, status
from slum.ledger.commands import PROTOCOL, Done, SetProtocol
from slum.ledger.peerwire import Ping, pack

pytestmark = pytest.mark.xdist_group("ledger_cluster")


# --- full disks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_disks() -> Iterator[Path]:
    """A folder for a cluster of three, each of whose members has a disk of its own of 32 MiB."""
    base = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    mounted = []
    try:
        for n in (1, 2, 3):
            (base / str(n)).mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(base / str(n))], check=True)
            mounted.append(base / str(n))
        yield base
    finally:
        for place in mounted:
            subprocess.run(["umount", str(place)], check=True)
        subprocess.run(["rm", "-rf", str(base)], check=True)


def fill(node: Node) -> Path:
    """Leave nothing of the disk of *node*; return the file that takes it."""
    filler = node.home.data.parent / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    return filler


@pytest.mark.root
@pytest.mark.parametrize("what", ["one", "all"])
async def test_full_disks_are_survived_and_with_room_again_all_go_on(seed: int, what: str, little_disks: Path) -> None:
    with Cluster(base=little_disks, epoch_entries=200, removes=False) as cluster:
        cluster.start()
        await cluster.agreed()
        keeper = asyncio.create_task(cluster.keep())
        try:
            async with under_load(cluster, seed) as writers:
                await more(writers, 100)
                if what == "one":
                    leader = await cluster.leader()
                    filler = fill(next(node for node in cluster.nodes if node is not leader))
                    await more(writers, 200)
                    filler.unlink()
                else:
                    fillers = [fill(node) for node in cluster.nodes]
                    await until(lambda: any(says_that_it_is_full(node) for node in cluster.nodes))
                    for filler in fillers:
                        filler.unlink()
                await more(writers, 100)
                # Who has just ended for want of space is started again first.
                await until(lambda: all(node.runs for node in cluster.nodes))
            await cluster.agreed(60)
        finally:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        await cluster.finish(writers)


def says_that_it_is_full(node: Node) -> bool:
    text = node.log.read_text()
    return "No space left" in text or "disk is full" in text or "disk_became_low" in text


# --- stops and dates --------------------------------------------------------------------------------------------------


async def test_a_leader_that_was_stopped_for_long_does_no_harm(seed: int) -> None:
    """Stopped until the others have written and sealed a lot, under its feet."""
    with Cluster(epoch_entries=20) as cluster:
        cluster.start()
        await cluster.leader()
        async with under_load(cluster, seed) as writers:
            await more(writers, 50)
            leader = await cluster.leader()
            cluster.signal(leader, signal.SIGSTOP)
            await more(writers, 60)
            cluster.signal(leader, signal.SIGCONT)
            await more(writers, 50)
        await cluster.agreed()
        for node in cluster.nodes:
            assert not [alarm for alarm in (await status(node.home.ledger_socket)).alarms if "clock" in alarm.kind]
        await cluster.finish(writers)


async def test_members_with_certificates_of_long_ago_elect_a_leader(seed: int) -> None:
    """Like a control plane that was switched off for a month: nobody looks at the dates."""
    with Cluster(count=0) as cluster:
        cluster.nodes = [cluster.make_node(n) for n in range(3)]
        rows = []
        for node in cluster.nodes:
            cluster.make_identity(node)
            key, certificate = identity.make_certificate(node.name, days=1)
            (node.home.state / identity.KEY).write_bytes(key)
            (node.home.state / identity.CERTIFICATE).write_bytes(certificate)
            me = identity.load(node.home.state)
            assert me is not None
            rows.append(identity.row(node.home.state, me))
        beginning = Beginning(cluster="c0ffee", lineage="l", generation=7, members=tuple(rows), at=1.0)
        for node in cluster.nodes:
            begin(node.home.state, beginning, 1 << 20)
        cluster.start()
        await cluster.agreed()
        async with connect(cluster.nodes[0].home.ledger_socket) as ledger:
            assert isinstance(await ledger.propose(proposal(note()), deadline_s=20), Done)


# --- two versions -----------------------------------------------------------------------------------------------------

NEWER = PROTOCOL + 1


async def set_protocol(cluster: Cluster, version: int) -> Done:
    while True:
        leader = await cluster.leader()
        with contextlib.suppress(QuorumLost, Unreachable):
            async with connect(leader.home.ledger_socket) as ledger:
                result = await ledger.propose(proposal(SetProtocol(version=version)), deadline_s=10)
                assert isinstance(result, Done), result
                return result


async def test_two_versions_side_by_side_and_back(seed: int) -> None:
    """The protocol is raised by itself, but not while one member lacks it: until then each can go back."""
    with Cluster(upgrade_s=0.5) as cluster:
        cluster.start()
        await cluster.leader()
        one, two, three = cluster.nodes

        async def restart(node: Node, protocol: int) -> None:
            cluster.kill(node)
            node.protocol = protocol
            cluster.start(node)
            await cluster.agreed()

        async with under_load(cluster, seed, count=2) as writers:
            for node in (one, two):
                await restart(node, NEWER)
                await more(writers, 20)
            with pytest.raises(Conflict, match="not known to be spoken by m3"):
                await set_protocol(cluster, NEWER)
            await restart(one, PROTOCOL)
            await more(writers, 20)
            for node in (one, three):
                assert cluster.position(two).protocol == PROTOCOL
                await restart(node, NEWER)
            await until(lambda: cluster.position(two).protocol == NEWER)
            await more(writers, 20)
            # An old one does not start any more, and says what to install.
            cluster.kill(one)
            one.protocol = PROTOCOL
            cluster.start(one)
            await until(lambda: not one.runs)
            assert "install the version" in one.log.read_text().splitlines()[-1]
            await restart(one, NEWER)
            await more(writers, 20)
        await cluster.agreed()
        assert (await status(one.home.ledger_socket)).protocol == NEWER
        await cluster.finish(writers)


# --- strangers --------------------------------------------------------------------------------------------------------

JUNK = (
    b"\x80\x04cposix\nsystem\n(S'touch /tmp/owned'\ntR.",
    b"GET / HTTP/1.1\r\n\r\n",
    struct.pack(">I", 0x7FFFFFFF) + bytes(4096),
    b"\x16\x03\x01\xff\xff" + bytes(70_000),
    os.urandom(5000),
)


def dial(node: Node) -> socket.socket:
    me = identity.load(node.home.state)
    assert me is not None
    host, _, port = me.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def attack(node: Node, stranger: Path) -> None:
    """Send all that a stranger can think of to the ledger's port of *node*, and hold places that are for members."""
    held = [dial(node) for _ in range(100)]
    for junk in JUNK:
        with dial(node) as sock, contextlib.suppress(OSError):
            sock.sendall(junk)
    for shown in (None, stranger):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if shown is not None:
            context.load_cert_chain(shown / identity.CERTIFICATE, shown / identity.KEY)
        with contextlib.suppress(OSError), context.wrap_socket(dial(node)) as tls:
            tls.sendall(pack(Ping(place=(99, 1), seq=10**9, at=0.0)))
            tls.sendall(struct.pack(">I", 0x7FFFFFFF))
            assert tls.recv(100) == b"", "a stranger is told nothing"
    for sock in held:
        with contextlib.suppress(OSError):
            # A byte at a time.
            sock.send(b"\x16")
        sock.close()


def memory_kb(node: Node) -> int:
    assert node.child is not None
    text = Path(f"/proc/{node.child.pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("VmRSS")).split()[1])


async def test_hostile_bytes_change_nothing(seed: int, tmp_path: Path) -> None:
    identity.make(tmp_path / "s", id="m2", listen="127.0.0.1:1", address="127.0.0.1:1")
    with Cluster(epoch_entries=100_000, epoch_bytes=32 << 20) as cluster:
        cluster.start()
        await cluster.agreed()
        leader = await cluster.leader()
        before = await status(leader.home.ledger_socket)
        was_kb = [memory_kb(node) for node in cluster.nodes]
        async with under_load(cluster, seed, count=2) as writers:
            for _ in range(3):
                for node in cluster.nodes:
                    await asyncio.to_thread(attack, node, tmp_path / "s")
                await more(writers, 20)
            # A member that comes back finds a place among those that hold them all.
            other = next(node for node in cluster.nodes if node is not leader)
            cluster.kill(other)
            held = [dial(leader) for _ in range(60)]
            cluster.start(other)
            await cluster.agreed()
            for sock in held:
                sock.close()
        after = await status(leader.home.ledger_socket)
        assert (after.leader, after.epoch, after.term) == (before.leader, before.epoch, before.term)
        grown = [memory_kb(node) - kb for node, kb in zip(cluster.nodes, was_kb, strict=True)]
        assert max(grown) < 20_000, grown
        await cluster.finish(writers)
