"""The agent's line to the control plane, against a member that serves a real WebSocket."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fakes.member import Member

from slum import wire
from slum.model import Stamp
from slum.node.doors import Door, Near
from slum.node.link import Link


class Quiet:
    """An agent with nothing to tell but what it can do."""

    def __init__(self) -> None:
        self.detail = "bubblewrap is not installed"

    def hello(self) -> wire.Hello:
        level = wire.LevelStatus(level="namespace", available=not self.detail, detail=self.detail)
        return wire.Hello(
            protocol=1,
            version="0",
            machine="local:m1",
            tenement="here",
            stamp=Stamp(),
            boot_id="b",
            host="h",
            cpus=1,
            memory_bytes=1,
            levels=(level,),
        )

    def report(self, *, full: bool) -> wire.Report | None:
        return None

    def heartbeat(self) -> wire.Heartbeat:
        return wire.Heartbeat(at=0.0, load=0.0, memory_available_bytes=0, rss_bytes=0)

    def desire(self, desired: wire.Desired) -> None: ...

    def open_stream(self, request: wire.OpenStream, door: Door) -> None: ...


async def test_a_new_proof_of_a_level_is_told_by_a_new_hello(tmp_path: Path) -> None:
    member, agent = Member(tmp_path / "api.sock"), Quiet()
    await member.start()
    link = Link(Near(member.path), agent)
    task = asyncio.create_task(link.run())
    try:
        await member.until(lambda: len(member.hellos) == 1)
        agent.detail = ""
        link.introduce()
        await member.until(lambda: len(member.hellos) == 2)
        assert [hello.levels[0].available for hello in member.hellos] == [False, True]
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await member.stop()
