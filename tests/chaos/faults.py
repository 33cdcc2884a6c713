"""Faults as they are done to a Site: each begins, and gives back what ends it. What a fault meets that is gone already is no error."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster_site import Host

from chaos.schedule import YEAR_S, Fault
from chaos.site import Site

PROGRAMS = (("ledger",), ("server",), ("front",), ("ledger", "server"), ("ledger", "server", "front"), ("ledger",))
REFILL_S = 0.2
CHUNKS = (16 << 20, 1 << 20, 64 << 10, 4 << 10)
End = Callable[[], None]


class Faults:
    def __init__(self, site: Site) -> None:
        self._site = site
        self._off: Counter[str] = Counter()

    def targets(self, fault: Fault) -> list[Host]:
        """Return on whom *fault* is to be, now."""
        members, pick = list(self._site.members), fault.pick
        turned = members[pick % len(members) :] + members[: pick % len(members)]
        if fault.on in ("leader", "follower"):
            leader = self._site.leads()
            if leader is not None:
                turned = [name for name in turned if name != leader.name]
                turned = [leader.name, *turned] if fault.on == "leader" else turned
        count = {"majority": len(members) // 2 + 1, "all": len(members)}.get(fault.on, 1)
        return [self._site.hosts[name] for name in turned[:count]]

    def begin(self, fault: Fault, hosts: Sequence[Host]) -> End:
        """Do it to *hosts*, and return what takes it back."""
        match fault.kind:
            case "kill":
                return self._kill(hosts, PROGRAMS[fault.pick % len(PROGRAMS)])
            case "off":
                self._turn_off(hosts)
                return lambda: self._turn_on(hosts)
            case "pause":
                return self._pause(hosts)
            case "cut" | "deaf" | "mute":
                return self._cut(fault, hosts)
            case "partial":
                return self._partial(fault, hosts)
            case "full" | "brim":
                return self._fill(hosts, again=fault.kind == "brim")
            case "clock":
                return self._clock(hosts, YEAR_S if fault.pick % 2 else -YEAR_S)
        raise ValueError(fault.kind)

    def _kill(self, hosts: Sequence[Host], programs: Sequence[str]) -> End:
        for pid in _pids(self._site, hosts, programs):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return lambda: None

    def _pause(self, hosts: Sequence[Host]) -> End:
        pids = _pids(self._site, hosts, ("ledger", "server", "front"))

        def tell(number: signal.Signals) -> None:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

        tell(signal.SIGSTOP)
        return lambda: tell(signal.SIGCONT)

    def _turn_off(self, hosts: Sequence[Host]) -> None:
        for host in hosts:
            self._off[host.name] += 1
        self._site.power_off(*hosts)

    def _turn_on(self, hosts: Sequence[Host]) -> None:
        """Boot those that nothing else holds off."""
        for host in hosts:
            self._off[host.name] -= 1
            if self._off[host.name] == 0:
                self._site.boot(host)

    def _cut(self, fault: Fault, hosts: Sequence[Host]) -> End:
        names = {host.name for host in hosts}
        if fault.on == "majority":  # in two halves, each of which is one
            rest = [self._site.hosts[name] for name in self._site.members if name not in names]
            self._site.cut_between(rest, list(hosts))
            return lambda: self._site.heal(*rest)
        for host in hosts:
            self._site.cut(host, incoming=fault.kind != "mute", outgoing=fault.kind != "deaf")
        return lambda: self._site.heal(*hosts)

    def _partial(self, fault: Fault, hosts: Sequence[Host]) -> End:
        others = [name for name in self._site.members if name != hosts[0].name]
        self._site.cut(hosts[0], self._site.hosts[others[fault.pick % len(others)]])
        return lambda: self._site.heal(*hosts)

    def _fill(self, hosts: Sequence[Host], *, again: bool) -> End:
        ended = threading.Event()
        files = [host.data / "filler" for host in hosts]

        def keep_full() -> None:
            while not ended.wait(REFILL_S):
                for file in files:
                    fill(file)

        for file in files:
            fill(file)
        keeping = threading.Thread(target=keep_full, name="filler", daemon=True)
        if again:
            keeping.start()

        def end() -> None:
            ended.set()
            if again:
                keeping.join()
            for file in files:
                file.unlink(missing_ok=True)

        return end

    def _clock(self, hosts: Sequence[Host], offset_s: float) -> End:
        def set_all(offset_s: float) -> None:
            self._turn_off(hosts)
            for host in hosts:
                self._site.set_clock(host, offset_s)
            self._turn_on(hosts)

        set_all(offset_s)
        return lambda: set_all(0)


def fill(file: Path) -> None:
    """Leave no room on the disk that *file* lies on."""
    with file.open("ab") as filler:
        for chunk in CHUNKS:
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(filler.fileno(), os.fstat(filler.fileno()).st_size, chunk)


def _pids(site: Site, hosts: Sequence[Host], programs: Sequence[str]) -> list[int]:
    found = []
    for host in hosts:
        for program in programs:
            with contextlib.suppress(LookupError):
                found.append(site.pid(host, program))
    return found
