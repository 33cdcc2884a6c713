"""Real hosts with sshd on this machine: own network, pid, mount and uts namespaces, and a root made of this machine's /usr.

Nothing is downloaded: /usr is bound read-only (or below an overlay, where something is to be missing), all else is a folder
of the host's own. With *systemd* the host is booted by systemd-nspawn. Needs root, sshd, ip and unshare.

    python tests/ssh_hosts.py up 5 --systemd 2        # prints a slum.toml; `down` removes them all (make ssh-hosts[-down])
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh
import pytest

FOLDERS = [
    "usr",
    "etc/ssh",
    "proc",
    "sys",
    "dev",
    "run",
    "tmp",
    "var/lib",
    "var/log",
    "var/tmp",
    "root",
    "home/deploy",
    "opt",
    "srv",
]
ETC = [
    "os-release",
    "ssl",
    "ca-certificates",
    "alternatives",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "nsswitch.conf",
    "localtime",
]
PASSWD = """root:x:0:0:root:/root:/bin/bash
sshd:x:101:65534::/run/sshd:/usr/sbin/nologin
deploy:x:1000:1000::/home/deploy:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
SSHD = """Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin yes
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""
UNIT = """[Unit]
After=network.target
[Service]
ExecStartPre=/bin/mkdir -p /run/sshd
ExecStart=/usr/sbin/sshd -D -e
KillMode=process
[Install]
WantedBy=multi-user.target
"""
TOOLS = ("sshd", "unshare", "nsenter", "ip")
STATE = Path("/var/tmp/slum-ssh-hosts/state.json")
UP_S = 30.0


@dataclass(frozen=True)
class Shape:
    """What is particular about a host. *mounts* are lines of shell, run in it before sshd, with $R its root."""

    systemd: bool = False
    overlay: bool = False
    """/usr can be changed."""
    sudo: bool = False
    """`deploy` may become root."""
    prepare: str = ""


NO_PYTHON = Shape(overlay=True, prepare="rm -f $R/usr/bin/python3* $R/usr/local/bin/python3*")
OLD_PYTHON = Shape(
    overlay=True,
    prepare=r"""rm -f $R/usr/bin/python3 $R/usr/local/bin/python3*; mv $R/usr/bin/python3.11 $R/usr/bin/real
cat >$R/usr/bin/python3 <<'END'
#!/bin/sh
[ "$1" = -V ] && { echo Python 3.9.2; exit; }
[ "$1" = -I ] && shift; [ "$1" = -S ] && shift
exec /usr/bin/real -c "import sys; sys.version_info = (3, 9, 2, 'final', 0); exec(sys.argv[1])" "$2"
END
chmod 755 $R/usr/bin/python3; rm -f $R/usr/bin/python3.1*""",
)
FULL_DISK = Shape(prepare="mount -t tmpfs -o size=24m slum $R/opt")
READ_ONLY = Shape(prepare="mount -t tmpfs slum $R/run; mkdir $R/run/sshd; mount -o remount,ro,bind $R")


@dataclass
class Host:
    name: str
    address: str
    root: Path
    namespace: str
    shape: Shape
    process: subprocess.Popen[bytes] | None = None

    @property
    def host_key(self) -> str:
        """Its public key, "ssh-ed25519 AAAA..."."""
        return " ".join((self.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2])

    def new_host_key(self) -> None:
        """Give it another key, as if it had been installed anew; sshd reads it at the next connection."""
        for file in (self.root / "etc/ssh").glob("ssh_host_*"):
            file.unlink()
        _ssh_keygen(self.root / "etc/ssh/ssh_host_ed25519_key")

    def pids(self) -> list[int]:
        """Return the host's processes, as this machine counts them."""
        found = []
        mine = os.stat(f"/run/netns/{self.namespace}").st_ino
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{pid}/ns/net").st_ino == mine:
                    found.append(int(pid))
        return found


@dataclass
class Site:
    """Hosts on one bridge, and the key that opens them."""

    folder: Path
    net: str
    bridge: str
    key: Path
    hosts: list[Host] = field(default_factory=list)

    @property
    def gateway(self) -> str:
        """This machine's address, as the hosts see it."""
        return f"{self.net}.1"

    def add(self, shape: Shape = Shape()) -> Host:
        number = len(self.hosts) + 1
        name = f"{self.bridge}{number}"
        host = Host(name, f"{self.net}.{number + 9}", self.folder / name, name, shape)
        self.hosts.append(host)
        _make_root(host, self.key.with_suffix(".pub").read_text())
        _wire(host, self.bridge, self.gateway)
        start(host)
        return host

    def wait(self) -> None:
        """Return when all of them take connections."""
        end = time.monotonic() + UP_S
        for host in self.hosts:
            while True:
                with contextlib.suppress(OSError), socket.create_connection((host.address, 22), 1) as link:
                    if link.recv(4) == b"SSH-":
                        break
                log = Path(f"{host.root}.log").read_text()[-2000:]
                assert host.process is None or host.process.poll() is None, f"{host.name} ended: {log}"
                assert time.monotonic() < end, f"{host.name} does not come up: {log}"
                time.sleep(0.02)

    def close(self) -> None:
        for host in self.hosts:
            stop(host)
            _run("ip", "netns", "del", host.namespace, check=False)
        _run("ip", "link", "del", self.bridge, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def require(*more: str) -> None:
    """Skip where hosts cannot be made, or tools of *more* are not there; in CI that is a failure."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = [
        tool for tool in (*TOOLS, *more) if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: scripts/install.sh dev")


def new_site(folder: Path | None = None) -> Site:
    tag = f"{random.SystemRandom().randrange(16**4):04x}"
    folder = folder or Path(tempfile.mkdtemp(prefix="slum-hosts-", dir="/var/tmp"))
    folder.mkdir(mode=0o755, exist_ok=True)
    folder.chmod(0o755)
    net = f"10.{200 + int(tag[:2], 16) % 50}.{int(tag[2:], 16)}"
    site = Site(folder, net, f"sl{tag}", folder / "key")
    _ssh_keygen(site.key)
    _run("ip", "link", "add", site.bridge, "type", "bridge")
    _run("ip", "address", "add", f"{site.gateway}/24", "dev", site.bridge)
    _run("ip", "link", "set", site.bridge, "up")
    return site


@contextlib.contextmanager
def a_site(*shapes: Shape) -> Iterator[Site]:
    """Yield a site with a host of each of *shapes*, all of them up."""
    site = new_site()
    try:
        for shape in shapes:
            site.add(shape)
        site.wait()
        yield site
    finally:
        site.close()


def start(host: Host) -> None:
    """Boot *host*; it has the same disk as before."""
    script = host.root.parent / f"{host.name}.sh"
    script.write_text(_script(host))
    log = open(host.root.parent / f"{host.name}.log", "ab")  # noqa: SIM115 - the child's
    command = ["nsenter", f"--net=/run/netns/{host.namespace}", "unshare", "--mount", "--propagation", "private"]
    if not host.shape.systemd:
        command += ["--pid", "--fork", "--kill-child", "--uts", "--ipc"]
    with log:
        host.process = subprocess.Popen(
            [*command, "sh", "-eu", str(script)], stdout=log, stderr=log, start_new_session=True
        )


def stop(host: Host) -> None:
    """Cut its power."""
    if host.process is None:
        return
    for pid in host.pids() if host.shape.systemd else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(host.process.pid, signal.SIGKILL)
    host.process.wait(10)
    end = time.monotonic() + 10
    while host.pids() and time.monotonic() < end:
        time.sleep(0.01)
    host.process = None


def _script(host: Host) -> str:
    root = host.root
    usr = f"mount --bind /usr {root}/usr && mount -o remount,ro,bind {root}/usr"
    if host.shape.overlay:
        over = f"{root}.over"
        usr = (
            f"mkdir -p {over} && mount -t tmpfs slum {over} && mkdir {over}/up {over}/work && "
            f"mount -t overlay -o lowerdir=/usr,upperdir={over}/up,workdir={over}/work slum {root}/usr"
        )
    lines = [f"R={root}", f"mount --bind {root} {root}"]
    if host.shape.systemd:
        lines += [
            f"exec systemd-nspawn --quiet --boot --directory {root} --network-namespace-path=/run/netns/{host.namespace}"
            f" --register=no --keep-unit --bind-ro=/usr --machine={host.name} --console=pipe --hostname={host.name}"
        ]
        return "\n".join(lines) + "\n"
    lines += [
        usr,
        f"hostname {host.name}",
        "mount -t proc proc $R/proc",
        "mount -t tmpfs -o mode=755 slum $R/dev",
        "for one in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 $R/dev/${one%:*} c 1 ${one#*:}; done",
        "mknod -m 666 $R/dev/tty c 5 0; mkdir $R/dev/pts $R/dev/shm; mount -t devpts -o newinstance,ptmxmode=666 x $R/dev/pts",
        "ln -s pts/ptmx $R/dev/ptmx; ln -s /proc/self/fd $R/dev/fd; mount -t tmpfs slum $R/dev/shm",
        "mount -t tmpfs slum $R/run; mkdir $R/run/sshd",
        host.shape.prepare,
        "exec chroot $R /usr/sbin/sshd -D -e",
    ]
    return "\n".join(lines) + "\n"


def _make_root(host: Host, public_key: str) -> None:
    root = host.root
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "tmp").chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if Path("/", name).is_symlink():
            (root / name).symlink_to(os.readlink(f"/{name}"))
    for name in ETC:
        source = Path("/etc", name)
        if source.is_dir():
            shutil.copytree(source, root / "etc" / name, symlinks=True, ignore_dangling_symlinks=True)
        elif source.exists():
            shutil.copy(source, root / "etc" / name)
    etc = root / "etc"
    (etc / "passwd").write_text(PASSWD)
    (etc / "group").write_text("root:x:0:\ndeploy:x:1000:\nnogroup:x:65534:\ntty:x:5:\n")
    (etc / "shadow").write_text("root:*:1::::::\ndeploy:*:1::::::\n")
    (etc / "shadow").chmod(0o600)
    (etc / "hosts").write_text(f"127.0.0.1 localhost {host.name}\n::1 localhost\n")
    (etc / "hostname").write_text(f"{host.name}\n")
    (etc / "ssh/sshd_config").write_text(SSHD)
    (etc / "ssh/authorized_keys").write_text(public_key)
    _ssh_keygen(etc / "ssh/ssh_host_ed25519_key")
    os.chown(root / "home/deploy", 1000, 1000)
    if host.shape.sudo:
        (etc / "sudoers").write_text("root ALL=(ALL) ALL\ndeploy ALL=(ALL) NOPASSWD: ALL\n")
        (etc / "sudoers").chmod(0o440)
        (etc / "pam.d").mkdir()
        (etc / "pam.d/sudo").write_text(
            "auth required pam_permit.so\naccount required pam_permit.so\nsession required pam_permit.so\n"
        )
    if host.shape.systemd:
        units = etc / "systemd/system"
        (units / "multi-user.target.wants").mkdir(parents=True)
        (units / "ssh.service").write_text(UNIT)
        (units / "multi-user.target.wants/ssh.service").symlink_to("../ssh.service")
        (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
        (etc / "machine-id").write_text("")


def _wire(host: Host, bridge: str, gateway: str) -> None:
    inside, outside = f"{host.name}i", f"{host.name}o"
    _run("ip", "netns", "add", host.namespace)
    _run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside)
    _run("ip", "link", "set", outside, "master", bridge, "up")
    _run("ip", "link", "set", inside, "netns", host.namespace)
    within = ("ip", "-n", host.namespace)
    _run(*within, "link", "set", inside, "name", "eth0")
    _run(*within, "address", "add", f"{host.address}/24", "dev", "eth0")
    _run(*within, "link", "set", "eth0", "up")
    _run(*within, "link", "set", "lo", "up")
    _run(*within, "route", "add", "default", "via", gateway)


def _ssh_keygen(path: Path) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.touch(0o600)
    path.write_bytes(key.export_private_key())
    Path(f"{path}.pub").write_bytes(key.export_public_key())


def _run(*argv: str, check: bool = True) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("count", nargs="?", type=int, default=5)
    parser.add_argument("--systemd", type=int, default=0, help="how many of them are booted by systemd")
    given = parser.parse_args(argv)
    if STATE.exists():
        _down()
    if given.what == "down":
        return 0
    STATE.parent.mkdir(mode=0o755, exist_ok=True)
    site = new_site(STATE.parent)
    for number in range(given.count):
        site.add(Shape(systemd=number >= given.count - given.systemd))
    record = [{"namespace": h.namespace, "pid": h.process.pid if h.process else 0} for h in site.hosts]
    STATE.write_text(json.dumps({"bridge": site.bridge, "hosts": record}))
    site.wait()
    listed = "".join(f'  "root@{host.address}",\n' for host in site.hosts)
    print(f"# they join a control plane that is open to them: slum server init --address {site.gateway}")
    print(f'[operators.hosts]\ntype = "ssh"\nkey = "{site.key}"\nhosts = [\n{listed}]\n')
    print(f'[tenement.workers]\noperator = "hosts"\ncount = {given.count}\n\n[tenement.workers.service.hello]')
    print('command = "python3 -m http.server --bind 127.0.0.1"\nlisten = "none"\nisolation = "process"')
    return 0


def _down() -> None:
    found = json.loads(STATE.read_text())
    for host in found["hosts"]:
        with contextlib.suppress(FileNotFoundError):
            inode = os.stat(f"/run/netns/{host['namespace']}").st_ino
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                with contextlib.suppress(OSError):
                    if os.stat(f"/proc/{pid}/ns/net").st_ino == inode:
                        os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "del", host["namespace"], check=False)
    _run("ip", "link", "del", found["bridge"], check=False)
    shutil.rmtree(STATE.parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
