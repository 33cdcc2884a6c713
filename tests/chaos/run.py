"""One run: a cluster, clients, a schedule of faults, and the checks at its end. Says what it does as it goes."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster_site import Failed, Host, until

from chaos import checks
from chaos.faults import Faults
from chaos.history import Asked, History
from chaos.schedule import Fault, Step, schedule
from chaos.site import Line, Site, at_socket
from chaos.workload import Client, Prober
from slum.ledger.commands import new_request_id

WHOLE_S = 150.0
"""How long after the last fault all members may take to be one cluster again: this machine may have much else to do."""
WORK_S = 240.0
CALM_S = 1.0
CLIENTS = 2
"""At each member's socket; and one a member through the fronts."""
AWAY_S = 15.0
AWAY_ENTRIES = 150
NOTICED_S = 3.0
"""How long a member is cut off before it must know."""


@dataclass(frozen=True)
class Plan:
    seed: int
    seconds: float
    members: int = 3
    tenements: int = 2
    epoch_entries: int | None = 50
    steps: int | None = None
    """At most so many; None: as many as the time takes."""
    pace_s: float = 0.2
    """How long a client waits between two operations, about."""
    keep: Path | None = None
    """Where logs and the history go when something is wrong."""


@dataclass
class Report:
    seed: int
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        head = f"seed {self.seed}: {'FAILED' if self.problems else 'clean'} {json.dumps(self.facts)}"
        return "\n".join([head, *(f"  - {problem}" for problem in self.problems)])


def run(plan: Plan, say: Callable[[str], None]) -> Report:
    """Do *plan* and return what is wrong. Leaves nothing behind, also when it is interrupted."""
    report = Report(plan.seed)
    began = time.monotonic()

    def log(text: str) -> None:
        say(f"{time.monotonic() - began:6.1f} s  {text}")

    with contextlib.ExitStack() as stack:
        site = stack.enter_context(Site(epoch_entries=plan.epoch_entries, keep_logs=plan.keep))
        log(f"making {plan.members} members and {plan.tenements} tenements ({site.token})")
        stack.enter_context(site.begin(plan.members))
        site.populate(plan.tenements)
        drive(plan, site, report, log)
    report.facts["seconds"] = round(time.monotonic() - began)
    report.problems += [f"left behind: {what}" for what in checks.nothing_left(site)]
    return report


def drive(plan: Plan, site: Site, report: Report, log: Callable[[str], None]) -> None:
    """Let clients and faults at *site*, which is whole, for as long as *plan* says, then check all."""
    history = History()
    with workload(plan, site, history) as workers:
        Driver(plan, site, history, report, log).run()
    log(f"checking: {dict(history.count())}")
    finish(plan, site, history, workers, report)
    if report.problems and plan.keep is not None:
        plan.keep.mkdir(parents=True, exist_ok=True)
        history.save(plan.keep / "history.jsonl")


@contextlib.contextmanager
def workload(plan: Plan, site: Site, history: History) -> Iterator[list[Client | Prober]]:
    """Clients at every member and probers of every tenement, at work; afterwards each has finished."""
    members = [site.hosts[name] for name in site.members]
    tenements = [host for name, host in site.hosts.items() if name.startswith("t")]
    homes = [(host, None) for host in members for _ in range(CLIENTS)]
    homes += [(host, tenements[n % len(tenements)]) for n, host in enumerate(members) if tenements]
    workers: list[Client | Prober] = [
        Client(site, history, f"c{number}", home, plan.seed, inside=inside, pace_s=plan.pace_s)
        for number, (home, inside) in enumerate(homes, 1)
    ]
    workers += [Prober(host) for host in tenements]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(90)


class Driver:
    def __init__(self, plan: Plan, site: Site, history: History, report: Report, log: Callable[[str], None]) -> None:
        self._plan, self._site, self._history, self._report, self._log = plan, site, history, report, log
        self._faults = Faults(site)
        self._extra = plan.members
        self._slowest_s = 0.0

    def run(self) -> None:
        end = time.monotonic() + self._plan.seconds
        epoch = self._epoch()
        steps = schedule(self._plan.seed)
        done = 0
        while time.monotonic() < end and done < (self._plan.steps or math.inf):
            self.step(next(steps))
            done += 1
        self._report.facts |= {
            "steps": done,
            "epochs": self._epoch() - epoch,
            "slowest_mend_s": round(self._slowest_s, 1),
        }

    def step(self, step: Step) -> None:
        """Do *step*, wait until all is well again; Failed when it does not become so."""
        self._log(str(step))
        before = self._history.writes_done()
        ready = threading.Event()
        work = Work(lambda: self._work(step.work, ready))
        work.start()
        until(lambda: ready.is_set() or not work.is_alive(), WORK_S, f"{step.work} to begin")
        self._do(step.faults)
        healed = time.monotonic()
        self._site.until_whole(WHOLE_S)
        self._slowest_s = max(self._slowest_s, time.monotonic() - healed)
        work.join(WORK_S)
        if work.is_alive() or work.failed is not None:
            raise Failed(f"step {step.number}: {step.work} did not end well: {work.failed}")
        self._site.until_whole(WHOLE_S)
        time.sleep(CALM_S)
        self._log(f"     whole; {self._history.writes_done() - before} writes")

    def _do(self, faults: Sequence[Fault]) -> None:
        began = time.monotonic()
        moments = sorted(
            [(fault.start_s, 0, n) for n, fault in enumerate(faults)]
            + [(fault.start_s + fault.hold_s, 1, n) for n, fault in enumerate(faults)]
        )
        ends: dict[int, Callable[[], None]] = {}
        try:
            for at, is_end, number in moments:
                fault = faults[number]
                time.sleep(max(0.0, began + at - time.monotonic()))
                if is_end:
                    ends.pop(number)()
                    continue
                hosts = self._faults.targets(fault)
                self._log(f"     {fault.kind} {' '.join(host.name for host in hosts)}")
                ends[number] = self._faults.begin(fault, hosts)
                if len(faults) == 1:
                    self._look(fault, hosts)
        finally:
            for end in ends.values():
                end()

    def _look(self, fault: Fault, hosts: Sequence[Host]) -> None:
        """Look at what a lone fault must show while it lasts."""
        if fault.kind == "cut" and len(hosts) == 1 and fault.hold_s > NOTICED_S:
            until(
                lambda: self._site.ask(hosts[0], "/v1/cluster")["age_s"] > NOTICED_S,
                30,
                "a member that knows that it is cut off",
            )
            self._report.problems += minority_problems(self._site, hosts[0], self._history)
        if fault.kind == "clock":
            others = [self._site.hosts[name] for name in self._site.members if name != hosts[0].name]
            until(
                lambda: any("clock" in a["kind"] for a in self._site.ask(others[0], "/v1/cluster")["alarms"]),
                60,
                "an alarm",
            )

    # --- what goes on besides -----------------------------------------------------------------------------------------
    def _work(self, what: str, ready: threading.Event) -> None:
        try:
            match what:
                case "join":
                    self._extra += 1
                    self._join(self._site.host(f"m{self._extra}"), ready)
                case "leave":
                    self._leave(self._site.hosts[f"m{self._extra}"], ready)
                case "behind":
                    self._behind(ready)
        finally:
            ready.set()

    def _join(self, host: Host, ready: threading.Event) -> None:
        """`slum server join`, the same again until it is a member."""
        site = self._site
        at = site.hosts["m1"]
        token: str = until(lambda: site.token_of(at, "member"), WORK_S, "a token")
        ready.set()
        words = ("server", "join", at.api, "--token-file", "-", "--address", host.address, "--member", host.name)

        def has_joined() -> bool:
            ran = site.slum(host, *words, "--yes", input=token, check=False, timeout=180)
            if ran.code:
                self._log(f"     join: {ran.code} {ran.err.strip().splitlines()[-1:]}")
            return ran.code == 0

        until(has_joined, WORK_S, f"{host.name} to be a member")
        site.members.append(host.name)

    def _leave(self, host: Host, ready: threading.Event) -> None:
        ready.set()

        def has_left() -> bool:
            ran = self._site.slum(host, "server", "leave", "--yes", check=False, timeout=120)
            if ran.code:
                self._log(f"     leave: {ran.code} {ran.err.strip().splitlines()[-1:]}")
            return ran.code == 0

        self._site.members.remove(host.name)
        until(has_left, WORK_S, f"{host.name} to have left")
        self._site.power_off(host)

    def _behind(self, ready: threading.Event) -> None:
        """Have a follower away until it needs more than the retained log where epochs are small, then let it come back."""
        leader = self._site.leads()
        name = next(name for name in reversed(self._site.members) if leader is None or name != leader.name)
        host = self._site.hosts[name]
        self._site.power_off(host)
        seq, end = self._history.newest_seq, time.monotonic() + AWAY_S
        with contextlib.suppress(Failed):
            until(lambda: self._history.newest_seq > seq + AWAY_ENTRIES, end - time.monotonic())
        self._site.boot(host)
        ready.set()

    def _epoch(self) -> int:
        return max(int(self._site.ask(self._site.hosts[name], "/v1/cluster")["epoch"]) for name in self._site.members)


class Work(threading.Thread):
    def __init__(self, does: Callable[[], None]) -> None:
        super().__init__(name="work", daemon=True)
        self._does = does
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            self._does()
        except BaseException as error:  # noqa: BLE001  the step raises it
            self.failed = error


def minority_problems(site: Site, host: Host, history: History) -> list[str]:
    """Return what is wrong with how *host*, which is cut off and knows it, answers: it refuses writes, and its reads say their age."""
    asked = history.begin(Asked(id=f"c0-{secrets.randbelow(1 << 40)}", kind="add", member=host.name, key="k0"))
    request_id = new_request_id(history.newest_seq)
    body = {
        "verb": "restart",
        "service": "counters",
        "id": "k0",
        "tenement": "m1",
        "request_id": request_id,
        "host": asked.id,
    }
    problems = []
    with contextlib.closing(Line(lambda: at_socket(host, 15))) as line:
        answer = line.ask("POST", "/v1/actions", json.dumps(body).encode(), {"content-type": "application/json"})
        said = answer.document.get("error", {})
        if answer.status != 503 or said.get("code") != "no_quorum" or not said.get("lasting"):
            problems.append(f"{host.name}, cut off, answered a write with {answer.status} {answer.text[:300]}")
        fresh = line.ask("GET", "/v1/state?fresh=1")
        if fresh.status != 503:
            problems.append(f"{host.name}, cut off, answered a fresh read with {fresh.status}")
        ledger = line.ask("GET", "/v1/status").document["ledger"]
        if ledger["majority"] or ledger["age_s"] < NOTICED_S / 2:
            problems.append(f"{host.name}, cut off, says {ledger}")
        if line.ask("GET", "/v1/state").status != 200:
            problems.append(f"{host.name}, cut off, does not answer reads")
    return problems


def finish(plan: Plan, site: Site, history: History, workers: Sequence[Client | Prober], report: Report) -> None:
    """Check all that must be so once nobody works any more; adds to *report*."""
    problems = report.problems
    clients = [worker for worker in workers if isinstance(worker, Client)]
    problems += [f"{client.name} died: {client.failed!r}" for client in clients if client.failed is not None]
    problems += [f"{worker.name} hangs" for worker in workers if worker.is_alive()]
    for prober in (worker for worker in workers if isinstance(worker, Prober)):
        if len(prober.words) != 1 or prober.bad or not prober.answers:
            problems.append(f"{prober.name}: {prober.answers} answers of {sorted(prober.words)}, and {prober.bad[:5]}")
    problems += checks.members_agree(site)
    log = checks.written(checks.events_of(site, site.hosts["m1"]))
    problems += checks.against_the_log(history.all, log)
    problems += checks.linearizable(history.all, plan.seed)
    report.facts |= {
        "asked": dict(sorted(history.count().items())),
        "longest_pause_s": round(history.longest_pause_s(), 1),
    }
