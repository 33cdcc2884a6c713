"""Making a host a machine of ours: which steps are left, as data, and doing them one after the other.

steps() is pure: from what the host says of itself and what it shall be. Each step is checked by the hand there before
it is done, and done whole or not at all, so a bootstrap that was killed anywhere is simply done again. The join token
goes by stdin and stands in no argument, message or log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from slum.errors import OperatorError
from slum.frozen import Frozen
from slum.operators import naming
from slum.operators.base import Join, MachineSpec
from slum.operators.ssh_hand import Hand
from slum.operators.wheelhouse import Target, Wheel, Wheelhouse, build, target_of

OPT = "/opt/slum"
NEED_MB = 400
"""Wheels, what is installed of them, and some air."""
JOIN_S, PACKAGES_S = 150.0, 180.0
LOCK_S = 60.0
LOG_BYTES_MAX = 1 << 20
AGENT_FILES = ("identity.json", "home.json", "node.key", "node.crt", "ca.crt")

Tell = Callable[[str, str], None]
"""Called with a step's name and how it goes ("", or what it says when it is done)."""


class Facts(Frozen):
    """What a host says of itself."""

    distribution: str
    python: str
    arch: str
    libc: str
    systemd: bool
    free_mb: int
    read_only: tuple[str, ...]
    missing: tuple[str, ...]
    """Debian's names of programs that levels need and that are not there."""
    apt: bool
    installed: tuple[str, ...]
    wheels: tuple[str, ...]
    cluster: str
    """Whose steps were done here last."""
    claim: dict[str, Any]
    identity: dict[str, Any]
    runs: bool
    """A machine has joined completely and its keeper answers."""
    unit: str
    agent_python: str

    @property
    def target(self) -> Target:
        return target_of(self.python, self.arch, self.libc)

    def is_machine(self, cluster: str, key: str) -> bool:
        """Tell whether the machine *key* is here, whole and running."""
        return self.runs and (self.identity.get("cluster"), self.identity.get("key")) == (cluster, key)


class Upload(Frozen):
    wheels: tuple[Wheel, ...]

    @property
    def title(self) -> str:
        return f"upload {len(self.wheels)} files, {sum(wheel.size for wheel in self.wheels) / 1e6:.1f} MB"


class Packages(Frozen):
    """Debian's packages; without them slum runs, and `slum doctor` says what does not work."""

    names: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"apt {' '.join(self.names)}"


class Install(Frozen):
    house: Wheelhouse

    @property
    def title(self) -> str:
        return f"install {OPT}/{self.house.name}"


class JoinHome(Frozen):
    house: str
    machine: str
    join: Join

    @property
    def title(self) -> str:
        return f"join as {self.machine}"

    @property
    def argv(self) -> tuple[str, ...]:
        slum = f"{OPT}/{self.house}/bin/slum"
        return (slum, "join", *self.join.server.split(), "--tenement", self.machine, "--token-file", "-")


Step = Upload | Packages | Install | JoinHome


def steps(facts: Facts, house: Wheelhouse, spec: MachineSpec | None) -> tuple[Step, ...]:
    """Return what is left to do, in order, until *house* is installed and, with *spec*, the machine has joined home."""
    left: list[Step] = []
    if house.name not in facts.installed:
        missing = tuple(wheel for wheel in house.wheels if wheel.sha256 not in facts.wheels)
        left += [Upload(wheels=missing)] if missing else []
        left.append(Install(house=house))
    if facts.missing and facts.apt:
        left.insert(0, Packages(names=facts.missing))
    if spec is not None and not facts.is_machine(spec.cluster, spec.key):
        if spec.join is None:
            raise OperatorError(f"{spec.machine} would not know how to join home")
        left.append(JoinHome(house=house.name, machine=spec.machine, join=spec.join))
    return tuple(left)


def path_of(wheel: Wheel) -> str:
    """Return where *wheel* lies on a host."""
    return f"{OPT}/wheels/{wheel.sha256}/{wheel.name}"


def files_of(step: Step, facts: Facts) -> tuple[str, ...]:
    """Return what *step* does to the host's files, as lines of a diff."""
    match step:
        case Upload():
            return tuple(f"+ {path_of(wheel)}  {wheel.size / 1e6:.1f} MB" for wheel in step.wheels)
        case Packages():
            return tuple(f"+ Debian package {name}" for name in step.names)
        case Install():
            return (f"+ {OPT}/{step.house.name}/  {len(step.house.wheels)} packages",)
        case JoinHome():
            unit = ("/etc/systemd/system/slum.service",) if facts.systemd else ()
            agent = (f"/var/lib/slum/agent/{name}" for name in AGENT_FILES)
            return tuple(f"+ {path}" for path in (*agent, "/var/lib/slum/boot.json", *unit))


def check(where: str, facts: Facts, house: Wheelhouse | None = None) -> None:
    """Raise OperatorError when this host cannot hold slum, before anything is changed on it."""
    if facts.read_only:
        raise OperatorError(
            f"{where}: {' and '.join(facts.read_only)} cannot be written: its file system is read-only",
            hint="mount it read-write; slum needs /opt/slum, /var/lib/slum and /run",
            provider_code="read_only",
        )
    if (house is None or house.name not in facts.installed) and facts.free_mb < NEED_MB:
        raise OperatorError(
            f"{where}: {facts.free_mb} MB are free, and slum needs {NEED_MB}",
            hint="make room below /opt and /var/lib, then do it again",
            provider_code="disk_full",
        )


class Houses:
    """The wheelhouses of one process: each is built once, however many hosts wait for it."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._built: dict[Target, Wheelhouse] = {}
        self._building = asyncio.Lock()

    async def of(self, target: Target) -> Wheelhouse:
        async with self._building:
            if target not in self._built:
                self._built[target] = await build(target, self._cache)
            return self._built[target]


class Diary:
    """The log of one host's bootstraps, a line a step; kept below LOG_BYTES_MAX."""

    def __init__(self, path: Path, tell: Tell | None = None) -> None:
        self.path = path
        self._tell = tell

    def note(self, step: str, said: str = "") -> None:
        if self._tell is not None:
            self._tell(step, said)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > LOG_BYTES_MAX:
            self.path.rename(self.path.with_suffix(".log.1"))
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with open(self.path, "a") as file:
            file.writelines(f"{at} {step}: {line}\n" for line in said.splitlines() or ["..."])


async def look(hand: Hand) -> Facts:
    return Facts(**(await hand.ask("facts")))


async def bring_up(
    hand: Hand,
    houses: Houses,
    spec: MachineSpec | None,
    diary: Diary,
    *,
    fence: Sequence[int] = (),
) -> Facts:
    """Make the host of *hand* have slum and, with *spec*, be that machine; return what it was before. May be repeated."""
    before = facts = await look(hand)
    if spec is not None and facts.is_machine(spec.cluster, spec.key):
        diary.note("done", "it is the machine already")
        return before
    check(hand.where, facts)
    house = await houses.of(facts.target)
    check(hand.where, facts, house)
    if not steps(facts, house, spec):
        diary.note("done", "nothing to do")
        return before
    await hand.ask("take", cluster=spec.cluster if spec else "", fence=list(fence), wait_s=LOCK_S)
    if spec is not None:
        name = naming.name_of(spec.cluster, spec.key)
        await hand.ask(
            "claim", name=name, cluster=spec.cluster, key=spec.key, machine=spec.machine, tenement=spec.tenement
        )
    try:
        await _do_all(hand, house, spec, diary)
    except OperatorError as error:
        if error.provider_code != "damaged":
            raise
        diary.note("damaged", error.message)
        await _do_all(hand, house, spec, diary)
    diary.note("done", f"{facts.distribution}, Python {facts.python}, {house.name}")
    return before


async def _do_all(hand: Hand, house: Wheelhouse, spec: MachineSpec | None, diary: Diary) -> None:
    """Do what is left to do by what the host says now: somebody may have been at work until we had the lock."""
    for step in steps(await look(hand), house, spec):
        diary.note(step.title)
        began = time.monotonic()
        said = await _do(step, hand)
        diary.note(step.title, f"{said or 'done'} ({time.monotonic() - began:.1f} s)")


async def switch(hand: Hand, house: Wheelhouse, diary: Diary) -> bool:
    """Let the machine on this host go on under *house*, installed before; False when it does already or is none."""
    await hand.ask("take", cluster="", fence=[], wait_s=LOCK_S)
    diary.note(f"switch to {house.name}")
    done = bool((await hand.ask("switch", name=house.name))["switched"])
    diary.note(f"switch to {house.name}", "done" if done else "it runs already, or no machine is there")
    return done


async def _do(step: Step, hand: Hand) -> str:
    match step:
        case Upload():
            for wheel in step.wheels:
                await _upload(wheel, hand)
            return ""
        case Packages():
            return await _packages(step, hand)
        case Install():
            wheels = {wheel.name: wheel.sha256 for wheel in step.house.wheels}
            said = await hand.ask("install", name=step.house.name, wheels=wheels)
            return str(said["output"]).strip()
        case JoinHome():
            return await _join(step, hand)


async def _upload(wheel: Wheel, hand: Hand) -> None:
    with open(wheel.path, "rb") as file:  # noqa: ASYNC230 - read in small pieces
        await hand.ask("put", (file, wheel.size), path=path_of(wheel), size=wheel.size, sha256=wheel.sha256, mode=0o644)


async def _packages(step: Packages, hand: Hand) -> str:
    """Install them where the host's apt can; when not, say so: only what needs them does not work there."""
    options = ["-qq", "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=10"]
    install = ["apt-get", "install", *options, "--no-install-recommends", "-y", *step.names]
    said = {"status": 1, "output": ""}
    for argv in (install, ["apt-get", "update", *options], install):
        try:
            said = await hand.ask("run", argv=argv, stdin="", timeout_s=PACKAGES_S)
        except OperatorError as error:
            if error.provider_code != "timeout":
                raise
            said = {"status": 1, "output": error.message}
        if said["status"] == 0 and argv is install:
            return ""
    last = (str(said["output"]).strip().splitlines() or ["apt said nothing"])[-1]
    return f"not installed, `slum doctor` there shows what does not work without {' and '.join(step.names)}: {last}"


async def _join(step: JoinHome, hand: Hand) -> str:
    said = await hand.ask("run", argv=list(step.argv), stdin=f"{step.join.token}\n", timeout_s=JOIN_S)
    output = str(said["output"]).replace(step.join.token, "(hidden)").strip()
    if said["status"] != 0:
        words = " / ".join(output.splitlines()[-3:])
        raise OperatorError(
            f"{hand.where}: {step.machine} could not join: {words or 'it said nothing'}",
            hint=f"can the host reach {' or '.join(step.join.server.split())}?",
            provider_code="join",
        )
    return output
