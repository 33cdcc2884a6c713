"""What the ledger's tests share: a member stepped by hand, entries made by hand, a real ledger process."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from slum.errors import SlumError
from slum.ledger.applying import Applied
from slum.ledger.commands import (
    AnyCommand,
    Done,
    Entry,
    Header,
    LeaderStarted,
    Member,
    NoteEvent,
    Proposal,
    Record,
    Rejected,
    Result,
    SetDesired,
    new_request_id,
    pack_fleet,
)
from slum.ledger.events import first_hash
from slum.ledger.member import Member as RunningMember
from slum.ledger.opening import opened
from slum.ledger.schema import Position
from slum.ledger.state import State, bootstrap
from slum.ledger.world import Config
from slum.model import Fleet, LocalOperator, Service, Tenement
from slum.paths import Home

SMALL = Config(epoch_entries=12, epoch_bytes=1 << 20, ballast_bytes=0)
ROOT = Path(__file__).resolve().parents[1]


def fleet(*services: Service, name: str = "quick") -> Fleet:
    tenement = Tenement(name="here", operator="local", services=tuple(sorted(services, key=lambda s: s.name)))
    return Fleet(name=name, operators=(LocalOperator(name="local"),), tenements=(tenement,))


def service(name: str, **fields: Any) -> Service:
    return Service(name=name, command=fields.pop("command", ("run", name)), **fields)


def desired(wanted: Fleet, base: int, why: str = "apply") -> SetDesired:
    packed = pack_fleet(wanted)
    digest = f"{hash(msgspec.msgpack.encode(wanted)) & 0xFFFFFFFFFFFF:012x}"
    return SetDesired(fleet_zstd=packed, digest=digest, base_revision=base, why=why)


def note(kind: str = "instance_noted", subject: str = "instance:here/web/main", **fields: Any) -> Record:
    return Record(events=(NoteEvent(kind=kind, subject=subject, at=fields.pop("at", 1.5), **fields),))


def proposal(
    command: AnyCommand, request_id: str | None = None, *, seen: int = 0, actor: str = "root@test"
) -> Proposal:
    made = request_id or new_request_id(seen)
    return Proposal(command=command, request_id=made, actor=actor)


@dataclass
class Scribe:
    """Applies entries to a State as a leader would have made them, and remembers their bytes."""

    state: State
    at: float = 1000.0
    entries: list[bytes] = field(default_factory=list)

    def lead(self, member: str = "m1", run: str = "r1") -> Applied:
        return self.apply(LeaderStarted(member=member, run=run), term=self.state.position.term + 1)

    def apply(
        self,
        *commands: AnyCommand | Proposal,
        term: int | None = None,
        epoch: int | None = None,
        before_commit: Callable[[Applied], None] | None = None,
    ) -> Applied:
        at = self.state.position
        header = Header(
            generation=at.generation,
            epoch=at.epoch if epoch is None else epoch,
            term=at.term if term is None else term,
            member="m1",
            at=self.at,
        )
        made = tuple(c if isinstance(c, Proposal) else proposal(c) for c in commands)
        data = msgspec.msgpack.encode(Entry(header=header, proposals=made))
        self.entries.append(data)
        return self.state.apply(data, before_commit)

    def one(self, command: AnyCommand | Proposal, **how: Any) -> Result:
        return self.apply(command, **how).results[0]

    def done(self, command: AnyCommand | Proposal) -> Done:
        result = self.one(command)
        assert isinstance(result, Done), result
        return result

    def rejected(self, command: AnyCommand | Proposal, code: str) -> Rejected:
        result = self.one(command)
        assert isinstance(result, Rejected), result
        assert result.code == code, result
        return result


def new_state(path: Path, **how: Any) -> State:
    position = Position(
        cluster_id="c0ffee",
        generation=7,
        epoch=1,
        lineage="l",
        term=0,
        applied=0,
        seq=0,
        chain="00",
        members=(Member(id="m1", incarnation="i"),),
        protocol=1,
        leader="",
        revision=0,
        events=0,
        events_hash=first_hash("c0ffee"),
        results=0,
        results_floor=0,
    )
    bootstrap(path, position, actor="ledger@m1", at=1.0)
    return State.open(path, **how)


@contextmanager
def scribe(folder: Path, name: str = "state.db", **how: Any) -> Iterator[Scribe]:
    state = new_state(folder / name, **how)
    made = Scribe(state)
    try:
        made.lead()
        yield made
    finally:
        state.close()


class Steps:
    """A member in this process, stepped until what is asked has happened. close() syncs nothing: it is a crash."""

    def __init__(self, home: Path, config: Config = SMALL, run: str = "r1") -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self._stack = ExitStack()
        self.member: RunningMember = self._stack.enter_context(
            opened(home, config, run=run, note=lambda event, **fields: self.notes.append((event, fields)))
        )

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def ask(self, *commands: AnyCommand | Proposal) -> list[Result | SlumError]:
        """Propose all at once and step until each is answered."""
        answers: dict[int, Result | SlumError] = {}
        for number, command in enumerate(commands):
            made = command if isinstance(command, Proposal) else proposal(command, seen=self.member.position.seq)
            take = lambda answer, number=number: answers.__setitem__(number, answer)  # noqa: E731
            self.member.proposer.submit(made, take, seq=self.member.position.seq)
        self.until(lambda: len(answers) == len(commands))
        return [answers[number] for number in range(len(commands))]

    def one(self, command: AnyCommand | Proposal) -> Result | SlumError:
        return self.ask(command)[0]

    def until(self, happened: Any, deadline_s: float = 10.0) -> None:
        end = time.monotonic() + deadline_s
        while not happened():
            assert time.monotonic() < end, "did not happen in time"
            self.member.step(0.05)
            for take, answer in self.member.answers():
                take(answer)

    def said(self, event: str) -> bool:
        return any(name == event for name, _ in self.notes)


class Process:
    """A real ledger process in folders of its own under /tmp (socket paths are short)."""

    def __init__(self, *options: str) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
        self.home = Home(data=self.base / "d", run=self.base / "r")
        self.options = options
        self.log = self.base / "log"
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.base)

    def start(self) -> None:
        arguments = [sys.executable, "-m", "slum.ledger.process", "--ballast-bytes", "0"]
        folders = ["--data-dir", str(self.home.data), "--run-dir", str(self.home.run)]
        with self.log.open("ab") as log:
            self._child = subprocess.Popen([*arguments, *folders, *self.options], stderr=log, cwd=ROOT)

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def wait(self, deadline_s: float = 20.0) -> int:
        assert self._child is not None
        return self._child.wait(deadline_s)

    def kill(self) -> None:
        """kill -9, if it still runs."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def terminate(self) -> int:
        assert self._child is not None
        self._child.send_signal(signal.SIGTERM)
        return self.wait()

    async def up(self, deadline_s: float = 20.0) -> None:
        """Return when the socket answers connections."""
        end = time.monotonic() + deadline_s
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(str(self.home.ledger_socket))
            except OSError:
                assert time.monotonic() < end, self.log.read_text()
                await asyncio.sleep(0.01)
            else:
                writer.close()
                await writer.wait_closed()
                return

    def last_line(self) -> dict[str, Any]:
        return msgspec.json.decode(self.log.read_bytes().splitlines()[-1], type=dict[str, Any])


def flip(path: Path, offset: int, bit: int = 3) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))
