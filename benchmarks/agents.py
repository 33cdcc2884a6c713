"""A thousand agents on three members, by the front that users reach: what they cost, how soon all are told, how soon they are back.

    python benchmarks/agents.py [--agents 1000] [--seconds 60] [--kills 3]

Members are made by `slum server init` and `join`, in network namespaces, with their real fronts (Caddy, TLS 1.3). The agents are
two load generators (agents_load.py) with the agent's own link, and a node certificate each from a join token. Bounds are
absolute, for no peer has members and agents of this kind. Root; about 4 minutes. Exits 1 when a bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from cluster_site import Cluster, Host, until  # noqa: E402  found in tests, put on the path above
from measure import cpu_s, rss_bytes  # noqa: E402  found beside this file

from slum.client import Client  # noqa: E402
from slum.model import EnvVar, Fleet, JoinOperator, Service, Tenement  # noqa: E402
from slum.paths import Home  # noqa: E402

GENERATORS = 2
FIRST_ADDRESS = 50
ADDRESSES = 40
"""Each generator joins from so many addresses, one after the other."""
CALM_S = 12.0
"""After the last agent came, before CPU is measured: the first heartbeats, and what the joins left to do."""
PROGRAMS = {
    "slum.ledger": "ledger",
    "slum.server": "server",
    "caddy": "Caddy",
    "slum.node.keeper": "keeper",
    "slum.node.agent": "agent",
}
failures: list[str] = []


def verdict(what: str, value: float, bound: float, unit: str) -> None:
    """Print one figure against its bound and remember whether it was missed."""
    ok = value <= bound
    print(f"  {what:62} {value:8.2f} {unit:10} (bound {bound:g})  {'ok' if ok else 'OVER'}", flush=True)
    if not ok:
        failures.append(what)


def fleet_of(agents: int, version: str) -> Fleet:
    """Return a fleet of machines that join by themselves, with two services each that *version* makes other releases."""
    services = tuple(
        Service(
            name=name,
            command=("python3", "app.py", "--workers", "2"),
            env=(EnvVar(name="VERSION", value=version), EnvVar(name="LOG_LEVEL", value="info")),
            health="/healthz",
        )
        for name in ("web", "worker")
    )
    tenements = tuple(Tenement(name=name, operator="hand", services=services) for name in names_of(agents))
    return Fleet(name="many", operators=(JoinOperator(name="hand"),), tenements=tenements)


def names_of(agents: int) -> list[str]:
    return [f"a{number}" for number in range(1, agents + 1)]


class Generators:
    """The load generators, and the newest that each agent said: *said*[what][machine] is an event."""

    def __init__(self, cluster: Cluster, agents: int) -> None:
        self.said: dict[str, dict[str, dict[str, Any]]] = {what: {} for what in ("joined", "connected", "acknowledged")}
        self._children: list[subprocess.Popen[bytes]] = []
        self._threads: list[threading.Thread] = []
        members = [cluster.hosts[name] for name in cluster.members]
        names = names_of(agents)
        for number in range(GENERATORS):
            host = cluster.host(f"g{number + 1}")
            subnet = host.address.rpartition(".")[0]
            first = FIRST_ADDRESS + number * ADDRESSES
            words = [sys.executable, str(HERE / "agents_load.py"), str(cluster.base / "agents")]
            words += [str(members[0].api_socket), "--urls", ",".join(member.api for member in members)]
            words += ["--device", device_of(host), "--agents", ",".join(names[number::GENERATORS])]
            words += ["--addresses", ",".join(f"{subnet}.{last}" for last in range(first, first + ADDRESSES))]
            child = subprocess.Popen(host.enter(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            thread = threading.Thread(target=self._read, args=(child, host.name), name=f"hear {host.name}")
            self._children.append(child)
            self._threads.append(thread)
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._children:
            child.kill()
            child.wait()
        for thread in self._threads:
            thread.join()
        for child in self._children:
            for end in (child.stdin, child.stdout):
                if end is not None:
                    end.close()

    def _read(self, child: subprocess.Popen[bytes], name: str) -> None:
        for line in child.stdout or ():
            event = json.loads(line)
            if event["what"] == "lost":
                self.said["connected"].pop(event["machine"], None)
            else:
                self.said[event["what"]][event["machine"] or name] = event

    def wait(self, found: Callable[[], Any], seconds: float, what: str) -> Any:
        """Return the first true value of *found*; AssertionError when there is none in time, or a generator has ended."""

        def looked() -> Any:
            ended = [child.pid for child in self._children if child.poll() is not None]
            if ended:
                raise SystemExit(f"load generators {ended} have ended")
            return found()

        return until(looked, seconds, what)

    def again(self) -> None:
        """Have all agents begin anew, spread over the members at random; return once they are connected."""
        began, agents = time.monotonic(), len(self.connected())
        for child in self._children:
            if child.stdin is not None:
                child.stdin.write(b"again\n")
                child.stdin.flush()
        self.wait(lambda: sum(one["at"] > began for one in self.connected().values()) == agents, 60, "lines")

    def connected(self) -> dict[str, dict[str, Any]]:
        return dict(self.said["connected"])

    def at(self, server: str) -> set[str]:
        """Return the agents whose line is to the member at *server*."""
        return {machine for machine, event in self.connected().items() if event["server"] == server}


def device_of(host: Host) -> str:
    found = subprocess.run(host.enter("ip", "-j", "addr"), check=True, capture_output=True)
    for link in json.loads(found.stdout):
        if any(one.get("local") == host.address for one in link["addr_info"]):
            return str(link["ifname"])
    raise LookupError(f"no device of {host.name} has its address")


def client_of(host: Host) -> Client:
    return Client(Home(data=host.data, run=host.run))


def populate(cluster: Cluster, agents: int) -> Generators:
    """Apply the fleet, wait for its machines, start the agents and return them, all connected."""
    leader = cluster.leader()
    began = time.monotonic()
    with client_of(leader) as client:
        client.apply(fleet_of(agents, "1"), base_revision=0, why="benchmark")
        until(lambda: _created(client) == agents, 170, "machines")
        print(f"    {agents} machines in the ledger after {time.monotonic() - began:.1f} s", flush=True)
    began = time.monotonic()
    generators = Generators(cluster, agents)
    try:
        generators.wait(lambda: len(generators.said["joined"]) == GENERATORS, 600, "joins")
        print(f"    joined after {time.monotonic() - began:.1f} s", flush=True)
        generators.wait(lambda: len(generators.connected()) == agents, 60, "lines")
    except BaseException:
        generators.__exit__(None, None, None)
        raise
    counts = {name: len(generators.at(cluster.hosts[name].api)) for name in cluster.members}
    print(f"    {agents} agents connected: {counts}; load {os.getloadavg()[0]:.1f}", flush=True)
    return generators


def _created(client: Client) -> int:
    return sum(one.state not in ("pending", "creating") for one in client.status().tenements)


def _programs(cluster: Cluster) -> dict[tuple[str, str, int], str]:
    """Return the member's processes: (member, program, pid)."""
    found = {}
    for name in cluster.members:
        for pid, words in cluster.processes(cluster.hosts[name]):
            program = next((short for part, short in PROGRAMS.items() if part in words), words.split()[0])
            found[name, program, pid] = words
    return found


def steady(cluster: Cluster, agents: int, seconds: float) -> None:
    print(f"{agents} agents, a heartbeat every 5 s each, for {seconds:g} s; load {os.getloadavg()[0]:.1f}", flush=True)
    processes = _programs(cluster)
    before = {key: cpu_s(key[2]) for key in processes}
    began = time.monotonic()
    time.sleep(seconds)
    after = {key: cpu_s(key[2]) for key in processes}
    took = time.monotonic() - began
    share: dict[str, float] = {}
    for program in sorted({program for _, program, _ in processes}):
        mine = [key for key in processes if key[1] == program]
        share[program] = sum(after[key] - before[key] for key in mine) / took * 100
        most = max(rss_bytes(pid) for _, _, pid in mine) / 1e6
        print(
            f"    {program:10} {share[program]:6.2f} % of a core, all {len(mine)} together; largest {most:.0f} MB",
            flush=True,
        )
    print(f"    load at the end {os.getloadavg()[0]:.1f}")
    verdict("CPU of all members, Caddy included", sum(share.values()), 20, "% of core")


def push(cluster: Cluster, generators: Generators, agents: int, version: str) -> None:
    """One apply that changes every tenement, until the API shows that every agent acts on it."""
    print(f"a config for each of {agents} agents; load {os.getloadavg()[0]:.1f}", flush=True)
    with client_of(cluster.leader()) as client:
        base = client.status().revision
        fleet = fleet_of(agents, version)
        began = time.monotonic()
        done = client.apply(fleet, base_revision=base, why="benchmark")
        committed = time.monotonic() - began

        def told() -> list[float]:
            said = list(generators.said["acknowledged"].values())
            return [event["at"] - began for event in said if event["seq"] >= done.seq]

        generators.wait(lambda: len(told()) == agents, 30, "acknowledgements")
        until(lambda: all(one.stamp.seq >= done.seq for one in client.status().tenements), 30, "the API")
        shown = time.monotonic() - began
    took = sorted(told())
    print(
        f"    since the request: committed {committed:.2f} s; acknowledged: median {statistics.median(took):.2f} s,"
        f" last {took[-1]:.2f} s; in the API's answer {shown:.2f} s",
        flush=True,
    )
    verdict("request to the last acknowledgement", took[-1], 2, "s")


def kill(cluster: Cluster, generators: Generators, host: Host) -> list[float]:
    """Kill all of *host* at once; return after how long each of its agents had a line to another member.

    Afterwards it is booted again, and the agents, which would stay where they are, are spread over all members again.
    """
    theirs = generators.at(host.api)
    began = time.monotonic()
    cluster.power_off(host)

    def back() -> list[float]:
        now = generators.connected()
        return [now[one]["at"] - began for one in theirs if one in now and now[one]["server"] != host.api]

    generators.wait(lambda: len(back()) == len(theirs), 60, "the agents of the one that died")
    took = sorted(back())
    print(
        f"    {host.name} died: its {len(took)} agents are back after {statistics.median(took):.2f} s (median),"
        f" {took[-1]:.2f} s (last); load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    cluster.boot(host)
    other = next(cluster.hosts[name] for name in cluster.members if name != host.name)
    until(lambda: _is_whole(cluster.view(other)), 60, "all members")
    generators.again()
    time.sleep(CALM_S / 2)
    return took


def _is_whole(view: dict[str, Any]) -> bool:
    return bool(view["majority"]) and all(one["followed"] and one["lag"] in (0, None) for one in view["members"])


def kills(cluster: Cluster, generators: Generators, count: int) -> None:
    print(f"kill -9 of a member's server, ledger, Caddy and keeper, {count} times")
    hosts = [cluster.hosts[name] for name in cluster.members]
    took = [kill(cluster, generators, hosts[number % len(hosts)]) for number in range(count)]
    verdict("its agents have another member, the largest median", max(map(statistics.median, took)), 2, "s")
    verdict("the last agent of all", max(one[-1] for one in took), 10, "s")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--kills", type=int, default=3)
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    with Cluster() as cluster:
        cluster.make(members=3)
        with populate(cluster, given.agents) as generators:
            time.sleep(CALM_S)
            steady(cluster, given.agents, given.seconds)
            push(cluster, generators, given.agents, "2")
            if given.kills:
                kills(cluster, generators, given.kills)
    print("within all bounds" if not failures else f"over their bounds: {', '.join(failures)}")
    return 1 if failures else 0


def _stop(*_: object) -> None:
    """End, and let nobody disturb what is being removed then."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
