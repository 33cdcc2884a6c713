"""The ledger process and its client: what a kill -9 under load leaves, what callers see, who is let in, what it weighs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from ledger_support import Process, desired, fleet, flip, note, proposal, service

from slum.errors import QuorumLost, Unreachable
from slum.ledger import frames, rpc
from slum.ledger.client import connect
from slum.ledger.commands import (
    PROPOSAL_BYTES_MAX,
    Done,
    Ledger,
    Proposal,
    Rejected,
    Result,
    SetDesired,
    pack_fleet,
)
from slum.ledger.reader import Reader
from slum.model import EnvVar, Fleet, LocalOperator, Service, Tenement


@pytest.fixture
def process() -> Iterator[Process]:
    with Process() as made:
        yield made


async def write(ledger: Ledger, text: str, request_id: str | None = None) -> Result:
    return await ledger.propose(proposal(note(why=text), request_id), deadline_s=10)


def written(process: Process) -> list[str]:
    reader = Reader(process.home.state)
    found = [event.why for event in reader.events(kind="instance_noted", limit=10_000)]
    verified = reader.verify()
    reader.close()
    assert verified.ok, verified
    return found


# --- kill -9 under load -----------------------------------------------------------------------------------------------


class Writer:
    """Writes numbered notes one after the other, repeating each until it is answered, over any number of restarts."""

    def __init__(self, process: Process, name: int) -> None:
        self._process = process
        self._name = name
        self.acknowledged: list[str] = []
        self.seqs: list[int] = []

    async def run(self, stop: asyncio.Event) -> None:
        numbers = itertools.count()
        while not stop.is_set():
            text = f"{self._name}.{next(numbers)}"
            result = await self._insist(proposal(note(why=text)))
            assert isinstance(result, Done), result
            self.acknowledged.append(text)
            self.seqs.append(result.seq)

    async def _insist(self, made: Proposal) -> Result:
        while True:
            try:
                async with connect(self._process.home.ledger_socket) as ledger:
                    return await ledger.propose(made, deadline_s=10)
            except (Unreachable, QuorumLost):
                await asyncio.sleep(0.005)


async def until(happened: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not happened():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.002)


async def test_kill_9_under_load_loses_doubles_and_reorders_nothing(seed: int) -> None:
    chance = random.Random(seed)
    with Process("--epoch-entries", "12") as process:
        process.start()
        await process.up()
        stop = asyncio.Event()
        writers = [Writer(process, name) for name in range(6)]

        def count() -> int:
            return sum(len(writer.acknowledged) for writer in writers)

        async with asyncio.TaskGroup() as group:
            for writer in writers:
                group.create_task(writer.run(stop))
            for _ in range(10):
                # A kill comes after some more writes, and then at any moment.
                enough = count() + chance.randrange(10, 120)
                await until(lambda enough=enough: count() >= enough)
                await asyncio.sleep(chance.random() * 0.02)
                process.kill()
                process.start()
            await process.up()
            stop.set()
        assert process.terminate() == 0
        found = written(process)
        assert len(found) == len(set(found)), "something was written twice"
        acknowledged = [text for writer in writers for text in writer.acknowledged]
        assert set(found) == set(acknowledged), "everything was insisted on, so everything is there, and nothing else"
        for writer in writers:
            mine = [text for text in found if text.startswith(f"{writer._name}.")]
            assert mine == writer.acknowledged, "a writer's order was not kept"
            assert writer.seqs == sorted(writer.seqs)
        reader = Reader(process.home.state)
        assert reader.cluster().epoch > 5, "the kills should have met seals"
        reader.close()


# --- what callers see -------------------------------------------------------------------------------------------------


async def test_calls_share_a_connection(process: Process) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        await ledger.barrier(deadline_s=5)
        before = (await ledger.leader()).seq
        results = await asyncio.gather(*(write(ledger, str(n)) for n in range(300)))
        seqs = {result.seq for result in results}
        assert len(seqs) < 150, "commands that come together ride in one entry"
        assert await ledger.barrier(deadline_s=5) > max(seqs)
        leader = await ledger.leader()
        assert (leader.member, leader.is_self, leader.epoch) == ("m1", True, 1)
        assert leader.seq > before
        assert [member.id for member in await ledger.members()] == ["m1"]
    assert process.terminate() == 0
    assert process.last_line()["event"] == "ledger_stopped"
    assert not process.home.ledger_socket.exists()
    assert sorted(map(int, written(process))) == list(range(300))


async def test_wait_ends_with_the_next_entry_or_the_deadline(process: Process) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger, connect(process.home.ledger_socket) as other:
        seq = await ledger.barrier(deadline_s=5)
        assert await ledger.wait(seq - 1, deadline_s=5) == seq
        assert await ledger.wait(seq, deadline_s=0.05) == seq
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(ledger.wait(seq, deadline_s=10))
            await asyncio.sleep(0)
            await write(other, "x")
        assert waiting.result() > seq


async def test_a_repeat_after_a_kill_gets_the_first_answer(process: Process) -> None:
    process.start()
    await process.up()
    made = proposal(note(why="once"))
    async with connect(process.home.ledger_socket) as ledger:
        first = await ledger.propose(made, deadline_s=5)
        process.kill()
        with pytest.raises(Unreachable):
            await ledger.propose(made, deadline_s=5)
        process.start()
        await process.up()
        assert await ledger.propose(made, deadline_s=5) == first, "the next call dials again"
    process.terminate()
    assert written(process) == ["once"]


async def test_nobody_there_is_unreachable(process: Process) -> None:
    with pytest.raises(Unreachable, match="nobody answers"):
        async with connect(process.home.ledger_socket):
            pass


async def test_a_stopped_ledger_is_no_quorum_at_the_deadline(process: Process) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        await ledger.barrier(deadline_s=5)
        os.kill(process.pid, 19)
        try:
            with pytest.raises(QuorumLost) as caught:
                await write_quickly(ledger)
            assert "same request id" in caught.value.hint
        finally:
            os.kill(process.pid, 18)
        await ledger.barrier(deadline_s=5)


async def write_quickly(ledger: Ledger) -> None:
    await ledger.propose(proposal(note()), deadline_s=0.1)


async def test_what_fits_no_entry_is_a_clear_answer(process: Process) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        for size in (PROPOSAL_BYTES_MAX, 5 << 20):
            big = SetDesired(fleet_zstd=bytes(size), digest="d", base_revision=0)
            result = await ledger.propose(proposal(big), deadline_s=5)
            assert isinstance(result, Rejected)
            assert "an entry of the ledger holds" in result.why


# --- who is let in ----------------------------------------------------------------------------------------------------


async def test_the_socket_is_private(process: Process) -> None:
    process.start()
    await process.up()
    assert stat.S_IMODE(process.home.ledger_socket.stat().st_mode) == 0o600
    for path in process.home.state.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


@pytest.mark.root
async def test_another_user_is_cut_off(process: Process) -> None:
    process.start()
    await process.up()
    for path in (process.base, process.home.run, process.home.private):
        path.chmod(0o755)
    process.home.ledger_socket.chmod(0o666)
    ask = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket(socket.AF_UNIX); s.settimeout(5);"
        "s.connect(sys.argv[1]); data = b''\n"
        "try:\n s.sendall(bytes.fromhex(sys.argv[2])); data = s.recv(100)\nexcept ConnectionError: pass\n"
        "sys.exit(7 if not data else 0)"
    )
    call = rpc.pack(rpc.Call(id=1, operation=rpc.AskLeader()))
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", ask, str(process.home.ledger_socket), call.hex())
    assert await child.wait() == 7


@pytest.mark.parametrize("junk", [b"\xff\xff\xff\xff", struct.pack(">I", 3) + b"abc", b"GET / HTTP/1.1\r\n\r\n"])
async def test_junk_ends_only_its_connection(process: Process, junk: bytes) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        reader, writer = await asyncio.open_unix_connection(str(process.home.ledger_socket))
        writer.write(junk)
        async with asyncio.timeout(5):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
        await ledger.barrier(deadline_s=5)


async def test_a_half_frame_holds_up_nobody(process: Process) -> None:
    process.start()
    await process.up()
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(process.home.ledger_socket))
        slow.sendall(struct.pack(">I", 1000) + b"x")
        async with connect(process.home.ledger_socket) as ledger:
            await ledger.barrier(deadline_s=5)


# --- damage -----------------------------------------------------------------------------------------------------------


async def fill(process: Process, count: int = 10) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        for n in range(count):
            await write(ledger, str(n))
    process.kill()


async def test_a_flipped_bit_ends_the_start_with_the_way_out_in_the_last_line(process: Process) -> None:
    await fill(process)
    flip(next(process.home.state.glob("journal-*")), frames.HEAD_BYTES + 300)
    process.start()
    assert process.wait() == 1
    last = process.last_line()
    assert last["event"] == "ledger_failed"
    assert "damaged at offset" in last["error"]
    command = re.search(r"`python (-m slum.ledger.recover .*?)`", last["hint"])
    assert command is not None
    child = await asyncio.create_subprocess_exec(sys.executable, *command[1].split(), stderr=asyncio.subprocess.PIPE)
    _, said = await child.communicate()
    assert child.returncode == 0, said
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        assert isinstance(await write(ledger, "after"), Done)
    process.terminate()
    assert written(process) == [*map(str, range(10)), "after"]


async def test_a_torn_tail_is_fine(process: Process) -> None:
    await fill(process)
    path = next(process.home.state.glob("journal-*"))
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    torn = frames.encode_frame(999, b"never synced", b"whatever")[:20]
    with path.open("r+b") as file:
        file.seek(end)
        file.write(torn)
    process.start()
    await process.up()
    assert "torn_frame_was_cut" in process.log.read_text()
    process.terminate()
    assert written(process) == list(map(str, range(10)))


# --- size -------------------------------------------------------------------------------------------------------------


def big_fleet(services: int = 100, tenements: int = 100) -> Fleet:
    """10,000 instances of services that have little in common, with settings as real ones have them."""
    made = []
    for t in range(tenements):
        ours = tuple(
            Service(
                name=f"svc-{t}-{s}",
                command=("python", "-m", f"app{t}.main{s}", "--listen", "$SOCKET_PATH"),
                bundle=f"{random.Random(t * 1000 + s).getrandbits(256):064x}",
                env=(EnvVar(name="MODE", value="prod"), EnvVar(name="SHARD", value=str(t * s))),
                memory_limit_mb=64 + s,
                health="/healthz",
            )
            for s in range(services)
        )
        made.append(Tenement(name=f"t{t}", operator="local", services=ours))
    return Fleet(name="big", operators=(LocalOperator(name="local"),), tenements=tuple(made))


async def test_a_fleet_of_10_000_instances_fits_one_entry_and_is_read_fast(process: Process) -> None:
    wanted = big_fleet()
    packed = pack_fleet(wanted)
    assert len(packed) < PROPOSAL_BYTES_MAX
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        started = time.monotonic()
        command = SetDesired(fleet_zstd=packed, digest="d1", base_revision=0)
        result = await ledger.propose(proposal(command), deadline_s=30)
        took = time.monotonic() - started
        assert isinstance(result, Done), result
        sys.stdout.write(f"{len(packed)} bytes, applied in {took:.2f} s\n")
        assert took < 10
        one = msgspec.structs.replace(wanted.tenements[7].services[7], memory_limit_mb=1)
        ours = msgspec.structs.replace(
            wanted.tenements[7], services=(*wanted.tenements[7].services[:7], one, *wanted.tenements[7].services[8:])
        )
        again = msgspec.structs.replace(wanted, tenements=(*wanted.tenements[:7], ours, *wanted.tenements[8:]))
        command = SetDesired(fleet_zstd=pack_fleet(again), digest="d2", base_revision=1)
        assert isinstance(await ledger.propose(proposal(command), deadline_s=30), Done)
        reader = Reader(process.home.state)
        found = reader.fleet()
        assert found is not None
        assert found[1] == again
        started = time.monotonic()
        for _ in range(100):
            reader.fleet()
        assert time.monotonic() - started < 1, "an unchanged fleet is not decoded again"
        assert [event.subject for event in reader.events(kind="service_changed")] == ["service:svc-7-7"]
        assert reader.verify().ok
        reader.close()


async def test_it_stays_small(process: Process) -> None:
    process.start()
    await process.up()
    async with connect(process.home.ledger_socket) as ledger:
        await asyncio.gather(*(write(ledger, str(n)) for n in range(500)))
        await ledger.propose(proposal(desired(fleet(service("web")), 0)), deadline_s=5)
    resident, maps = weight(process.pid)
    assert resident < 48 << 10, f"{resident} KiB"
    for foreign in ("httptools", "uvloop", "cryptography"):
        assert foreign not in maps


def weight(pid: int) -> tuple[int, str]:
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
    return resident, Path(f"/proc/{pid}/maps").read_text()
