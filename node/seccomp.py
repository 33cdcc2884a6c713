"""The system calls that no service behind a `namespace` wall may make, as a BPF file for bubblewrap.

A service has no capabilities, so most of these calls would fail anyway; the filter keeps the kernel code behind them out
of reach. A refused call answers EPERM, so that programs can go on without it; clone3 answers ENOSYS, since its flags lie
in memory where no filter can read them, and C libraries then use clone. Only a call by another architecture's table (a
32-bit program) kills. libseccomp and its binding cost 3 MB of memory, so `filter_file` lets a child process write the
file, once for each content and architecture; this module must never import them at its top.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path

from slum.errors import SlumError

ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
"""AUDIT_ARCH_* by what uname calls the machine."""

DENIED = (
    *("mount", "umount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount"),
    *("fspick", "mount_setattr", "setns", "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp"),
    *("pidfd_getfd", "keyctl", "add_key", "request_key", "bpf", "perf_event_open", "userfaultfd", "kexec_load"),
    *("kexec_file_load", "init_module", "finit_module", "delete_module", "create_module", "query_module"),
    *(
        "get_kernel_syms",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "acct",
        "swapon",
        "swapoff",
        "reboot",
    ),
    *("sethostname", "setdomainname", "quotactl", "quotactl_fd", "nfsservctl", "lookup_dcookie", "vhangup", "syslog"),
    *("iopl", "ioperm", "modify_ldt", "vm86", "vm86old", "settimeofday", "stime", "clock_settime", "open_by_handle_at"),
    *("fanotify_init", "move_pages", "migrate_pages", "uselib", "ustat", "sysfs", "_sysctl"),
)
"""By name; one that an architecture does not have is left out there."""
NEWEST = 462
"""mseal, of Linux 6.10. Calls with a higher number answer ENOSYS, as on an older kernel: what does not exist yet cannot
be judged, libraries fall back. Numbers are the same on all architectures since 424."""

NAMESPACE_FLAGS = (0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000)
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}."""
NEW_TIME = 0x80
"""CLONE_NEWTIME; for unshare alone, clone has a signal number in these bits."""

FAMILIES_DENIED = (0, *range(3, 10), *range(11, 16))
"""All below 17 but AF_UNIX 1, AF_INET 2, AF_INET6 10 and AF_NETLINK 16; what is above 16 is denied whole (packet, vsock,
alg, bluetooth, xdp ...)."""
NETLINK = 16
SOCK_RAW, SOCK_PACKET, SOCK_TYPE_MASK = 3, 10, 0xF

IOCTLS_DENIED = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX; the kernel reads 32 bits of the argument, so only these are compared."""
PERSONALITIES_DENIED = (0x0004_0000, 0x0010_0000, 0x0040_0000)
"""ADDR_NO_RANDOMIZE, MMAP_PAGE_ZERO, READ_IMPLIES_EXEC."""
PERSONALITY_QUERY = 0x8000_0000
"""Set in 0xffffffff, which only asks."""


def filter_file(folder: Path) -> Path:
    """Return the filter's file in *folder* (which exists), written by a child process when absent; SlumError when it cannot be made."""
    if platform.machine() not in ARCHITECTURES:
        raise SlumError(f"there is no system call filter for {platform.machine()}, only for {', '.join(ARCHITECTURES)}")
    file = folder / f"seccomp-{platform.machine()}-{_digest()}.bpf"
    if file.exists():
        return file
    argv = [sys.executable, "-m", "slum.node.seccomp", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode or not file.exists():
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SlumError(f"the system call filter cannot be built: {last}", hint="apt install libseccomp2")
    return file


def write_filter(file: Path, machine: str | None = None) -> None:
    """Write the BPF program for *machine* ("x86_64", "aarch64"; None is this one) to *file*, atomically.

    Imports pyseccomp, so it belongs into a process of its own (see filter_file) or a test.
    """
    import pyseccomp

    denied = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    if machine is not None and machine != platform.machine():
        rules.add_arch(ARCHITECTURES[machine])
        rules.remove_arch(pyseccomp.Arch.NATIVE)

    for name in DENIED:
        _add(rules, denied, name)
    _add(rules, pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in NAMESPACE_FLAGS:
        rules.add_rule(denied, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    for flag in (*NAMESPACE_FLAGS, NEW_TIME):
        rules.add_rule(denied, "unshare", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    for family in FAMILIES_DENIED:
        rules.add_rule(denied, "socket", pyseccomp.Arg(0, pyseccomp.EQ, family))
    rules.add_rule(denied, "socket", pyseccomp.Arg(0, pyseccomp.GT, NETLINK))
    rules.add_rule(denied, "socket", pyseccomp.Arg(0, pyseccomp.EQ, NETLINK), pyseccomp.Arg(2, pyseccomp.NE, 0))
    for family in (2, 10):
        for kind in (SOCK_RAW, SOCK_PACKET):
            wanted = pyseccomp.Arg(1, pyseccomp.MASKED_EQ, SOCK_TYPE_MASK, kind)
            rules.add_rule(denied, "socket", pyseccomp.Arg(0, pyseccomp.EQ, family), wanted)
    for request in IOCTLS_DENIED:
        rules.add_rule(denied, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, 0xFFFF_FFFF, request))
    for bit in PERSONALITIES_DENIED:
        rules.add_rule(denied, "personality", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, PERSONALITY_QUERY | bit, bit))

    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    with unfinished.open("wb") as out:
        out.write(_too_new(ARCHITECTURES[machine or platform.machine()]))
        out.flush()
        rules.export_bpf(out)
    unfinished.rename(file)


def _too_new(architecture: int) -> bytes:
    """Return the instructions that stand before libseccomp's own: ENOSYS for native calls above NEWEST.

    libseccomp refuses numbers that it has no name for. Each instruction is a struct sock_filter: code, jump if true,
    jump if false, operand; offsets 0 and 4 of the data are the call's number and the architecture.
    """
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    return b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (load, 0, 0, 4),
            (equal, 0, 3, architecture),
            (load, 0, 0, 0),
            (at_least, 0, 1, NEWEST + 1),
            (answer, 0, 0, 0x0005_0000 | errno.ENOSYS),
        )
    )


def _add(rules: object, action: int, name: str) -> None:
    """Deny *name*; a name that libseccomp or the architecture does not know is left out (OSError EINVAL)."""
    try:
        rules.add_rule(action, name)  # type: ignore[attr-defined]  # pyseccomp has no types
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _digest() -> str:
    """Return 12 hex digits that change with this module, hence with the rules."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    write_filter(Path(sys.argv[1]))
