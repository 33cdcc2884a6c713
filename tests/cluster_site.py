"""Members and tenements of one control plane on one machine, each in a network namespace of its own, made and driven only
through the command line; and what can be done to them: stop, kill, pause, cut off, power off, set the clock wrong.

    with Cluster() as cluster:
        cluster.make(members=3, tenements=2)
        leader = cluster.leader()
        cluster.cut(leader)                    # from everybody, both ways
        cluster.slum(other, "status", "--cluster")

A hub namespace holds a bridge; every host has a veth into it and one address. Faults of the network are nftables rules in the
host's own namespace. Nothing outside of the namespaces and two folders a host is touched, and nothing is left of them. Root
only; needs ip, nft and nsenter. ``python -m tests.cluster_site up|down`` is `make cluster`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slum.node.keeperclient import keeper_command
from slum.paths import Home

REPOSITORY = Path(__file__).resolve().parents[1]
SLUM = Path(sys.executable).with_name("slum")
WRONG_CLOCK = Path(__file__).resolve().parent / "wrong_clock"
API_PORT, LEDGER_PORT = 7443, 7444
PROGRAMS = ("agent", "front", "ledger", "router", "server")
STATE = Path("/tmp/slum-cluster.json")
TOOLS = ("ip", "nft", "nsenter")


class Failed(AssertionError):
    """A command of the cluster did not do what it should."""


@dataclass(frozen=True)
class Ran:
    """What a command said."""

    words: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __str__(self) -> str:
        return f"{' '.join(self.words)}: exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@dataclass
class Host:
    """One machine: a namespace, an address, and slum's two folders."""

    name: str
    netns: str
    address: str
    data: Path
    run: Path
    env: dict[str, str] = field(default_factory=dict)
    """Beside what every host gets; what the clock needs is put here."""

    @property
    def api(self) -> str:
        return f"https://{self.address}:{API_PORT}"

    @property
    def api_socket(self) -> Path:
        return self.run / "p" / "api.sock"

    @property
    def ledger_socket(self) -> Path:
        return self.run / "p" / "ledger.sock"

    def enter(self, *words: str) -> list[str]:
        """Return the command that runs *words* on this host. Not `ip netns exec`: it hides the cgroups."""
        return ["nsenter", f"--net=/run/netns/{self.netns}", "--", *words]


class Cluster:
    """Some hosts. *token* names their namespaces and folders; leaving the ``with`` ends and removes all."""

    def __init__(self, *, token: str = "", keep_logs: Path | None = None) -> None:
        self.token = token or secrets.token_hex(3)
        self.base = Path(f"/tmp/slum-c-{self.token}")
        self.hub = f"sl{self.token}-hub"
        self.hosts: dict[str, Host] = {}
        self.members: list[str] = []
        self._net = 1 + int(self.token, 16) % 250
        self._numbers = itertools.count(1)
        self._keep_logs = keep_logs
        self._made = False
        self._booted: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.show_logs()
        self.close()

    def open(self) -> None:
        """Make the hub."""
        self.base.mkdir(mode=0o711)
        _sh("ip", "netns", "add", self.hub)
        self._hub("ip", "link", "add", "name", "br0", "type", "bridge")
        self._hub("ip", "link", "set", "br0", "up")

    def close(self) -> None:
        """End every process of every host and remove all that was made."""
        for host in self.hosts.values():
            self._end(host)
        for process in self._booted:
            process.wait(30)
        for netns in (*(host.netns for host in self.hosts.values()), self.hub):
            subprocess.run(["ip", "netns", "del", netns], capture_output=True, check=False)
        if self._keep_logs is not None:
            for host in self.hosts.values():
                logs = host.data / "logs" / "_slum"
                if logs.is_dir():
                    shutil.copytree(logs, self._keep_logs / host.name, dirs_exist_ok=True)
        for host in self.hosts.values():
            shutil.rmtree(host.run, ignore_errors=True)
        shutil.rmtree(self.base, ignore_errors=True)

    # --- making -------------------------------------------------------------------------------------------------------
    def host(self, name: str) -> Host:
        """Return the host *name*, made if it is not there: a machine that runs nothing."""
        if name in self.hosts:
            return self.hosts[name]
        number = next(self._numbers)
        netns = f"sl{self.token}-{name}"
        host = Host(
            name=name,
            netns=netns,
            address=f"10.{self._net}.0.{number}",
            data=self.base / name,
            run=Path(f"/tmp/c{self.token}{name}"),
        )
        _sh("ip", "netns", "add", netns)
        inner, outer = f"v{number}", f"w{number}"
        self._hub("ip", "link", "add", "name", outer, "type", "veth", "peer", "name", inner)
        self._hub("ip", "link", "set", inner, "netns", f"/run/netns/{netns}")
        self._hub("ip", "link", "set", outer, "master", "br0", "up")
        self._on(host, "ip", "addr", "add", f"{host.address}/24", "dev", inner)
        self._on(host, "ip", "link", "set", inner, "up")
        self._on(host, "ip", "link", "set", "lo", "up")
        self.hosts[name] = host
        return host

    def make(self, *, members: int = 3, tenements: int = 0) -> None:
        """Make members m1 ... and tenements t1 ... that only wait for a fleet that has them (see fleet_toml)."""
        self.init(self.host("m1"))
        for number in range(2, members + 1):
            self.join(self.host(f"m{number}"))
        for number in range(1, tenements + 1):
            self.host(f"t{number}")

    def init(self, host: Host) -> Ran:
        """`slum server init`; its recovery key goes to recovery.key beside the hosts' folders."""
        key = self.base / "recovery.key"
        ran = self.slum(
            host, "server", "init", "--address", host.address, "--member", host.name, "--recovery-key-file", str(key)
        )
        self.members.append(host.name)
        return ran

    def join(self, host: Host, *, by: str | None = None, replace: str | None = None, check: bool = True) -> Ran:
        """Make *host* a member, with a token made at member *by*."""
        at = self.hosts[by or self.members[0]]
        token = self.token_of(at, "member")
        words = ["server", "join", at.api, "--token-file", "-", "--address", host.address, "--member", host.name]
        ran = self.slum(
            host, *words, *(("--replace", replace) if replace else ()), input=token, check=check, timeout=180
        )
        if ran.code == 0:
            self.members.append(host.name)
            if replace:
                self.members.remove(replace)
        return ran

    def join_tenement(self, host: Host, machine: str, *, by: str | None = None) -> Ran:
        """`slum join`: make *host* the node *machine* of the fleet."""
        at = self.hosts[by or self.members[0]]
        token = self.token_of(at, "node", machine)
        urls = [self.hosts[name].api for name in self.members]
        return self.slum(host, "join", *urls, "--tenement", machine, "--token-file", "-", input=token, timeout=120)

    def token_of(self, at: Host, kind: str, *subject: str) -> str:
        return str(self.slum(at, "token", "new", kind, *subject, "--json").json["token"])

    # --- using --------------------------------------------------------------------------------------------------------
    def slum(self, host: Host, *words: str, check: bool = True, timeout: float = 90.0, input: str | None = None) -> Ran:
        """Run slum on *host*; Failed with all that it said when it does not end with 0."""
        command = host.enter(str(SLUM), *words)
        done = subprocess.run(
            command,
            env=self.env(host),
            capture_output=True,
            text=True,
            timeout=timeout,
            input=input,
            cwd="/",
            check=False,
        )
        ran = Ran(("slum", *words), done.returncode, done.stdout, done.stderr)
        if check and ran.code:
            raise Failed(f"on {host.name}: {ran}")
        return ran

    def env(self, host: Host) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLUM_", "COV_", "PYTEST_"))}
        folders = {"SLUM_DATA_DIR": str(host.data), "SLUM_RUN_DIR": str(host.run)}
        return {**own, **folders, "NO_COLOR": "1", "HOME": str(self.base), **host.env}

    def view(self, host: Host) -> dict[str, Any]:
        """Return what *host* says of the cluster."""
        found: dict[str, Any] = self.slum(host, "status", "--cluster", "--json", timeout=20).json
        return found

    def leader(self, deadline_s: float = 20.0, among: Sequence[str] | None = None) -> Host:
        """Return the member that says that it leads and reaches a majority, as soon as one does."""

        def found() -> Host | None:
            for name in among or self.members:
                with contextlib.suppress(Failed, subprocess.TimeoutExpired):
                    view = self.view(self.hosts[name])
                    if view["leader"] == name and view["role"] == "leader" and view["majority"]:
                        return self.hosts[name]
            return None

        return until(found, deadline_s, "a leader")

    def followers(self) -> list[Host]:
        leader = self.leader().name
        return [self.hosts[name] for name in self.members if name != leader]

    def pid(self, host: Host, program: str) -> int:
        """Return the pid of one of the keeper's children; LookupError when it does not run."""
        for file in (host.run / "p" / "k").glob("c.*"):
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                row = json.loads(file.read_text())
                if row["spawn"]["name"] == program and row.get("pid") and self._runs_on(host, int(row["pid"])):
                    return int(row["pid"])
        raise LookupError(f"{program} does not run on {host.name}")

    def keeper_pid(self, host: Host) -> int:
        for pid, words in self.processes(host):
            if "slum.node.keeper" in words:
                return pid
        raise LookupError(f"no keeper runs on {host.name}")

    def processes(self, host: Host) -> list[tuple[int, str]]:
        """Return all live processes of *host*: ours by their folders, services by the network that they are in."""
        inode = _inode(Path(f"/run/netns/{host.netns}"))
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != os.getpid():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{entry}/cmdline").read_bytes()
                    if command and _inode(Path(f"/proc/{entry}/ns/net")) == inode:
                        found.append((int(entry), command.replace(b"\0", b" ").decode(errors="replace")))
        return found

    # --- breaking: programs and machines ------------------------------------------------------------------------------
    def kill(self, host: Host, *programs: str, signum: int = signal.SIGKILL) -> None:
        """Signal the keeper's children *programs*; a keeper starts them again."""
        for pid in [self.pid(host, program) for program in programs]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def pause(self, host: Host, *programs: str) -> None:
        self.kill(host, *programs, signum=signal.SIGSTOP)

    def go_on(self, host: Host, *programs: str) -> None:
        self.kill(host, *programs, signum=signal.SIGCONT)

    def power_off(self, *hosts: Host, forget_run: bool = True) -> None:
        """Kill everything on *hosts* at once, keeper first; with *forget_run* what a reboot forgets goes too."""
        for host in hosts:
            with contextlib.suppress(LookupError):
                os.kill(self.keeper_pid(host), signal.SIGKILL)
        for host in hosts:
            self._kill_rest(host)
            if forget_run:
                shutil.rmtree(host.run, ignore_errors=True)

    def boot(self, *hosts: Host) -> None:
        """Let machines that were powered off start their keeper again, as their init would; returns at once."""
        for host in hosts:
            words, env = keeper_command(Home(data=host.data, run=host.run))
            started = subprocess.Popen(
                host.enter(*words),
                env={**env, **host.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )
            self._booted.append(started)

    def set_clock(self, host: Host, offset_s: float, *, library: Path | None = None) -> None:
        """Let the programs of *host*, from its next boot on, see a clock that is *offset_s* off (apt: libfaketime).

        Caddy is not fooled: it shows and checks certificates by the real time.
        """
        found = library or next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
        if found is None:
            raise Failed("libfaketime is not installed: apt-get install libfaketime")
        boot_file = host.data / "boot.json"
        boot = json.loads(boot_file.read_text())
        for child in boot["children"]:
            env = {
                k: v
                for k, v in child["env"].items()
                if k not in ("LD_PRELOAD", "FAKETIME", "FAKETIME_DONT_FAKE_MONOTONIC", "PYTHONPATH")
            }
            if offset_s:
                env |= {"LD_PRELOAD": str(found), "FAKETIME": f"{offset_s:+.0f}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
                env["PYTHONPATH"] = str(WRONG_CLOCK)
            child["env"] = env
        boot_file.write_text(json.dumps(boot))

    # --- breaking: the network ----------------------------------------------------------------------------------------
    def cut(self, host: Host, *others: Host, incoming: bool = True, outgoing: bool = True) -> None:
        """Drop what *host* hears from *others* (everybody by default) and what it sends to them; adds to earlier cuts."""
        lines = ["add table inet cut"]
        for hook, direction, wanted in (("input", "saddr", incoming), ("output", "daddr", outgoing)):
            if wanted:
                lines.append(f"add chain inet cut {hook} {{ type filter hook {hook} priority 0; }}")
                addresses = [other.address for other in others] or [f"10.{self._net}.0.0/24"]
                own = f"ip {'daddr' if direction == 'saddr' else 'saddr'} {host.address}"
                lines += [
                    f"add rule inet cut {hook} {own} ip {direction} != {host.address} ip {direction} {address} drop"
                    for address in addresses
                ]
        self._on(host, "nft", "-f", "-", input="\n".join(lines) + "\n")

    def cut_between(self, left: Sequence[Host], right: Sequence[Host]) -> None:
        """Cut every one of *left* from every one of *right*, both ways."""
        for host in left:
            self.cut(host, *right)

    def heal(self, *hosts: Host) -> None:
        """Take back all cuts of *hosts* (of all by default)."""
        for host in hosts or tuple(self.hosts.values()):
            self._on(host, "nft", "-f", "-", input="add table inet cut\ndelete table inet cut\n")

    # --- the end ------------------------------------------------------------------------------------------------------
    def show_logs(self, lines: int = 15) -> None:
        for host in self.hosts.values():
            for log in sorted(host.data.glob("logs/_slum/*/current")):
                tail = log.read_text(errors="replace").splitlines()[-lines:]
                print(f"--- {host.name} {log.parent.name}", *tail, sep="\n")

    def _runs_on(self, host: Host, pid: int) -> bool:
        """Tell whether *pid* lives there: the number of one that ended may be somebody else's by now."""
        with contextlib.suppress(OSError):
            return _lives(pid) and _inode(Path(f"/proc/{pid}/ns/net")) == _inode(Path(f"/run/netns/{host.netns}"))
        return False

    def _end(self, host: Host) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.slum(host, "down", "--services", check=False, timeout=30)
        self._kill_rest(host)

    def _kill_rest(self, host: Host) -> None:
        end = time.monotonic() + 10
        while (rest := self.processes(host)) and time.monotonic() < end:
            for pid, _ in rest:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _hub(self, *words: str) -> None:
        _sh("nsenter", f"--net=/run/netns/{self.hub}", "--", *words)

    def _on(self, host: Host, *words: str, input: str | None = None) -> None:
        _sh(*host.enter(*words), input=input)


def fleet_toml(*, members: Sequence[str] = (), service: str = "") -> str:
    """Return a slum.toml: a local operator for each of *members* and its machine as a tenement.

    Each tenement has one service *hello* that answers with where it runs; *service* is added to its table.
    """
    operators = "".join(f'[operators.{name}]\ntype = "local"\nmember = "{name}"\n\n' for name in members)
    tenements = (f'[tenement.{name}]\noperator = "{name}"\n{hello_toml(name, service)}\n' for name in members)
    return f'[fleet]\nname = "demo"\n\n{operators}{"".join(tenements)}'


def hello_toml(tenement: str, more: str = "") -> str:
    """Return the service *hello* of *tenement*."""
    program = (
        "import http.server, os, socketserver\\n"
        "class H(http.server.BaseHTTPRequestHandler):\\n"
        "    def do_GET(self):\\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write((os.environ['SLUM_TENEMENT'] + ' ' + str(os.getpid())).encode())\\n"
        "    def log_message(self, *a): print(*a, flush=True)\\n"
        "    def address_string(self): return 'client'\\n"
        "class S(socketserver.ThreadingUnixStreamServer): daemon_threads = True\\n"
        "S(os.environ['SOCKET_PATH'], H).serve_forever()"
    )
    return (
        f'[tenement.{tenement}.service.hello]\ncommand = ["python3", "-u", "-c", "{program}"]\n'
        f'isolation = "process"\nhealth = "/"\n{more}\n'
    )


def until(found: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Return the first true value of *found*, asked until *seconds* have passed."""
    end = time.monotonic() + seconds
    last: BaseException | None = None
    while True:
        try:
            value, last = found(), None
        except (OSError, LookupError, AssertionError, ValueError, subprocess.TimeoutExpired) as error:
            value, last = None, error
        if value:
            return value
        if time.monotonic() > end:
            raise Failed(f"not within {seconds:g} s: {what} (last: {last!r})")
        time.sleep(0.05)


def missing_tools() -> list[str]:
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def _sh(*words: str, input: str | None = None) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, input=input)
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {done.stderr.strip()}")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _inode(path: Path) -> int:
    return path.stat().st_ino


def _up(members: int, tenements: int) -> int:
    """Make a cluster that stays, with services on all its tenements, and say how to reach and break it."""
    if STATE.exists():
        print(f"{STATE} says that one is there already: `make cluster-down` first")
        return 2
    command = [sys.executable, str(Path(__file__).resolve()), "keep", str(members), str(tenements)]
    log = open("/tmp/slum-cluster.log", "wb")  # noqa: SIM115  the keeper's, as long as it lives
    keeper = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
    )
    log.close()
    try:
        until(lambda: STATE.exists() or keeper.poll() is not None, 300, "the cluster")
    except KeyboardInterrupt:
        keeper.send_signal(signal.SIGTERM)
        keeper.wait()
        raise
    if not STATE.exists():
        print(Path("/tmp/slum-cluster.log").read_text())
        return 1
    print(json.loads(STATE.read_text())["text"])
    return 0


def _keep(members: int, tenements: int) -> int:
    """Make the cluster, keep its provider, and end it all at SIGTERM."""
    from cluster_provider import Provider, cloud_toml

    ended = [False]
    signal.signal(signal.SIGTERM, lambda *_: ended.__setitem__(0, True))
    nodes = [f"t{number}" for number in range(1, tenements + 1)]
    with Cluster() as cluster:
        cluster.make(members=members)
        hosts = [cluster.hosts[name] for name in cluster.members]
        with Provider(cluster, hosts):
            toml = cluster.base / "slum.toml"
            toml.write_text(fleet_toml(members=["m1"]) + (cloud_toml(nodes) if nodes else ""))
            cluster.slum(hosts[0], "apply", str(toml), "--yes", timeout=120)
            text = _how_to(cluster, toml)
            unfinished = STATE.with_suffix(".new")
            unfinished.write_text(json.dumps({"pid": os.getpid(), "text": text}))
            unfinished.rename(STATE)
            while not ended[0]:
                time.sleep(0.2)
            for host in cluster.hosts.values():
                cluster.power_off(host)
    STATE.unlink(missing_ok=True)
    return 0


def _how_to(cluster: Cluster, toml: Path) -> str:
    tenements = len(cluster.hosts) - len(cluster.members)
    lines = [f"{len(cluster.members)} members, {tenements} tenements elsewhere; fleet {toml}", ""]
    for host in cluster.hosts.values():
        slum = f"{SLUM} --data-dir {host.data} --run-dir {host.run}"
        lines.append(f"  {host.name}  {host.address:<12}  nsenter --net=/run/netns/{host.netns} -- {slum}")
    first, last = cluster.hosts["m1"], cluster.hosts[cluster.members[-1]]
    enter = f"nsenter --net=/run/netns/{first.netns} --"
    return "\n".join(
        [
            *lines,
            "",
            "look:      alias s='" + f"{SLUM} --data-dir {first.data} --run-dir {first.run}'",
            "           s status --cluster; s ps; s logs hello; s events -n 20",
            f"answer:    {enter} curl -s -H 'Host: hello.localhost' http://127.0.0.1:8080/",
            "kill:      kill -9 the pid of ledger, server, front, agent or keeper: they come back (the keeper by `slum up`)",
            f"           pgrep -af 'slum.ledger.*{first.run}$'",
            f"cut off:   {enter} nft 'add table inet cut; add chain inet cut i {{ type filter hook input priority 0; }};"
            " add rule inet cut i iif != lo drop'",
            f"heal:      {enter} nft delete table inet cut",
            f"leave:     {SLUM} --data-dir {last.data} --run-dir {last.run} server leave",
            "end:       make cluster-down",
        ]
    )


def _down() -> int:
    if not STATE.exists():
        print("no cluster is there")
        return 0
    pid = int(json.loads(STATE.read_text())["pid"])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        until(lambda: not _lives(pid), 120, "the end of the cluster")
    STATE.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    verb, *numbers = sys.argv[1:]
    if verb == "up":
        sys.exit(_up(*(int(number) for number in numbers or ("3", "2"))))
    sys.exit(_keep(int(numbers[0]), int(numbers[1])) if verb == "keep" else _down())
