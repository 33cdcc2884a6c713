"""What a hostile service tries. Standard library only: it runs behind the wall, with Debian's own Python.

`attacker.py TARGETS` reads a JSON file of targets, tries everything, each in a process of its own, and prints one JSON
object {attempt: [succeeded, what it got or why not]}. An attempt succeeds by returning what it got; any exception is a
failure. Run by root outside of any wall (in a mount namespace of its own), every attempt succeeds: that is the control.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import pty
import signal
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWUSER = 0x1000_0000
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
TIOCSTI = 0x5412
WHOLE_WORD = ctypes.c_ulong(-1)

Attempt = Callable[[dict], str]
ATTEMPTS: dict[str, Attempt] = {}


def attempt(function: Attempt) -> Attempt:
    ATTEMPTS[function.__name__] = function
    return function


class Failed(Exception):
    pass


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


# --- a neighbour -------------------------------------------------------------------------------------------------------


@attempt
def neighbour_environ(targets: dict) -> str:
    """Look through every process that can be seen for the neighbour's secret."""
    for entry in {*filter(str.isdigit, os.listdir("/proc")), str(targets["victim_pid"])}:
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{entry}/environ").read_bytes()
            if targets["secret_name"].encode() in environ:
                return f"pid {entry}: {len(environ)} bytes"
    raise Failed("seen in no process")


@attempt
def neighbour_memory(targets: dict) -> str:
    pid = targets["victim_pid"]
    start = int(Path(f"/proc/{pid}/maps").read_text().split("-")[0], 16)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(start)
        return memory.read(4).hex()


@attempt
def neighbour_memory_by_call(targets: dict) -> str:
    """process_vm_readv of an address that is nowhere: EFAULT says that the door itself was open."""
    here, there = (ctypes.c_ulong * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8), (ctypes.c_ulong * 2)(8, 8)
    try:
        return str(checked(LIBC.process_vm_readv(targets["victim_pid"], here, 1, there, 1, 0)))
    except OSError as error:
        if error.errno == errno.EFAULT:
            return "allowed"
        raise


@attempt
def neighbour_signal(targets: dict) -> str:
    os.kill(targets["victim_pid"], 0)
    return "allowed"


@attempt
def neighbour_ptrace(targets: dict) -> str:
    checked(LIBC.ptrace(PTRACE_SEIZE, targets["victim_pid"], None, None))
    return "seized"


@attempt
def neighbour_root(targets: dict) -> str:
    return str(os.listdir(f"/proc/{targets['victim_pid']}/root"))


@attempt
def neighbour_data(targets: dict) -> str:
    return Path(targets["victim_data"], "secret").read_text()


@attempt
def neighbour_bundle(targets: dict) -> str:
    return str(os.listdir(targets["victim_bundle"]))


@attempt
def neighbour_socket(targets: dict) -> str:
    return connect(targets["victim_socket"])


@attempt
def neighbour_shared_memory(targets: dict) -> str:
    return f"segment {checked(LIBC.shmget(targets['shm_key'], 0, 0))}"


@attempt
def host_processes(targets: dict) -> str:
    """Look for the neighbour's command line."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if targets["victim_word"].encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                return f"pid {entry}"
    raise Failed("only its own")


# --- slum itself and the host's files ----------------------------------------------------------------------------------


@attempt
def slum_api(targets: dict) -> str:
    return connect(targets["api_socket"])


@attempt
def slum_keeper(targets: dict) -> str:
    return connect(targets["keeper_socket"])


@attempt
def slum_run_folder(targets: dict) -> str:
    """See other folders than the way to one's own."""
    here = {*os.listdir(targets["run"]), *os.listdir(targets["run"] + "/i")} - {"i", targets["own_run_name"]}
    if not here:
        raise Failed("only one's own")
    return str(here)


@attempt
def slum_private_folders(targets: dict) -> str:
    return str([os.listdir(folder) for folder in targets["private_folders"]])


@attempt
def slum_any_private_folder(targets: dict) -> str:
    for folder in targets["private_folders"]:
        with contextlib.suppress(OSError):
            return f"{folder}: {os.listdir(folder)}"
    raise Failed("none")


@attempt
def shadow(targets: dict) -> str:
    return f"{len(Path('/etc/shadow').read_bytes())} bytes"


@attempt
def shadow_by_pid_1(targets: dict) -> str:
    return f"{len(Path('/proc/1/root/etc/shadow').read_bytes())} bytes"


@attempt
def host_tmp(targets: dict) -> str:
    return Path(targets["tmp_file"]).read_text()


@attempt
def write_usr(targets: dict) -> str:
    return opens("/usr/lib/os-release", os.O_WRONLY)


@attempt
def write_own_bundle(targets: dict) -> str:
    return opens(__file__, os.O_WRONLY)


@attempt
def host_environment_of_pid_1(targets: dict) -> str:
    if targets["host_marker"].encode() in Path("/proc/1/environ").read_bytes():
        return "found"
    raise Failed("not there")


@attempt
def cgroup_of_the_host(targets: dict) -> str:
    return opens(targets["cgroup_procs"], os.O_WRONLY)


@attempt
def inherited_descriptors(targets: dict) -> str:
    """The names of all descriptors beyond 0, 1, 2 that point to something."""
    if not targets["descriptors"]:
        raise Failed("none")
    return str(targets["descriptors"])


# --- the kernel --------------------------------------------------------------------------------------------------------


@attempt
def become_root(targets: dict) -> str:
    os.setuid(0)
    os.setgid(0)
    return "uid 0"


@attempt
def capabilities(targets: dict) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:") and int(line.split()[1], 16):
            return line
    raise Failed("none")


@attempt
def new_privileges(targets: dict) -> str:
    if "NoNewPrivs:\t0" in Path("/proc/self/status").read_text():
        return "setuid programs work"
    raise Failed("not to be had")


@attempt
def mount(targets: dict) -> str:
    checked(LIBC.mount(b"none", targets["own_data"].encode(), b"tmpfs", 0, None))
    return "mounted"


@attempt
def chroot(targets: dict) -> str:
    os.chroot(targets["own_data"])
    return "done"


@attempt
def make_device(targets: dict) -> str:
    node = Path(targets["own_data"], f"memory-{os.getpid()}")
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 1))
    node.unlink()
    return "made"


@attempt
def block_device(targets: dict) -> str:
    """Open the disk that the root folder lies on, by its name or by a node of our own."""
    names = [name for name in os.listdir("/dev") if name.startswith(("vd", "sd", "nvme", "xvd", "loop", "dm-"))]
    for name in names:
        with contextlib.suppress(OSError):
            return opens(f"/dev/{name}", os.O_RDONLY)
    raise Failed(f"none of {names}")


@attempt
def kernel_log_device(targets: dict) -> str:
    return opens("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)


@attempt
def kernel_log(targets: dict) -> str:
    return f"{checked(LIBC.klogctl(10, None, 0))} bytes"


@attempt
def core_pattern(targets: dict) -> str:
    return opens("/proc/sys/kernel/core_pattern", os.O_WRONLY)


@attempt
def sysrq(targets: dict) -> str:
    """The trigger, or where the kernel has none, the panic switch."""
    trigger = "/proc/sysrq-trigger"
    return opens(trigger if os.path.exists(trigger) else "/proc/sys/kernel/panic", os.O_WRONLY)


@attempt
def kernel_keys(targets: dict) -> str:
    add_key = {"x86_64": 248, "aarch64": 217}[platform.machine()]
    return f"key {checked(LIBC.syscall(add_key, b'user', b'slum-hostile', b'x', ctypes.c_size_t(1), -2))}"


@attempt
def raw_socket(targets: dict) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP):
        return "opened"


@attempt
def packet_socket(targets: dict) -> str:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)):
        return "opened"


@attempt
def new_user_namespace(targets: dict) -> str:
    checked(LIBC.unshare(CLONE_NEWUSER))
    return "unshared"


@attempt
def new_user_namespace_by_clone(targets: dict) -> str:
    number, arguments = {"x86_64": 56, "aarch64": 220}[platform.machine()], [0, 0, 0, 0]
    pid = LIBC.syscall(number, ctypes.c_ulong(CLONE_NEWUSER | signal.SIGCHLD), *map(ctypes.c_ulong, arguments))
    if pid == 0:
        os._exit(0)
    os.waitpid(checked(pid), 0)
    return "cloned"


@attempt
def new_user_namespace_by_clone3(targets: dict) -> str:
    arguments = (ctypes.c_uint64 * 8)(CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    pid = LIBC.syscall(435, arguments, ctypes.c_size_t(64))
    if pid == 0:
        os._exit(0)
    os.waitpid(checked(pid), 0)
    return "cloned"


@attempt
def type_into_a_terminal(targets: dict) -> str:
    return push_input(TIOCSTI)


@attempt
def type_into_a_terminal_with_high_bits(targets: dict) -> str:
    """The kernel looks at 32 bits only; a filter that compares 64 lets this through."""
    return push_input(TIOCSTI | 1 << 32)


# fmt: off
CALLS = {
    "x86_64": {
        "ptrace": 101, "pivot_root": 155, "chroot": 161, "acct": 163, "umount2": 166, "swapon": 167, "swapoff": 168,
        "reboot": 169, "sethostname": 170, "setdomainname": 171, "init_module": 175, "delete_module": 176,
        "quotactl": 179, "settimeofday": 164, "clock_settime": 227, "kexec_load": 246, "add_key": 248,
        "request_key": 249, "keyctl": 250, "migrate_pages": 256, "move_pages": 279, "perf_event_open": 298,
        "fanotify_init": 300, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310,
        "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
        "userfaultfd": 323, "syslog": 103,
    },
    "aarch64": {
        "ptrace": 117, "pivot_root": 41, "chroot": 51, "acct": 89, "umount2": 39, "swapon": 224, "swapoff": 225,
        "reboot": 142, "sethostname": 161, "setdomainname": 162, "init_module": 105, "delete_module": 106,
        "quotactl": 60, "settimeofday": 170, "clock_settime": 112, "kexec_load": 104, "add_key": 217,
        "request_key": 218, "keyctl": 219, "migrate_pages": 238, "move_pages": 239, "perf_event_open": 241,
        "fanotify_init": 262, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "kexec_file_load": 294, "bpf": 280,
        "userfaultfd": 282, "syslog": 116,
    },
}
CALLS_EVERYWHERE = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_getfd": 438, "process_madvise": 440,
    "mount_setattr": 442, "quotactl_fd": 443, "open_tree_attr": 467,
}
# fmt: on


@attempt
def forbidden_calls(targets: dict) -> str:
    """Make each call with nonsense; an answer other than "no such call" or EPERM came from the kernel code behind it."""
    reached = []
    for name, number in {**CALLS[platform.machine()], **CALLS_EVERYWHERE}.items():
        ctypes.set_errno(0)
        if LIBC.syscall(number, *[WHOLE_WORD] * 6) >= 0 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
            reached.append(name)
    if not reached:
        raise Failed("none")
    return " ".join(reached)


def connect(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        return "connected"


def opens(path: str, flags: int) -> str:
    """Open and close; writes nothing, so the control harms nobody."""
    os.close(os.open(path, flags))
    return f"opened {path}"


def push_input(request: int) -> str:
    _, terminal = pty.openpty()
    character = ctypes.create_string_buffer(b"x")
    checked(LIBC.ioctl(terminal, ctypes.c_ulong(request), character))
    return "typed"


def try_one(function: Attempt, targets: dict) -> tuple[bool, str]:
    """Run it in a child: whatever it changes, and even its death, stays there."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            answer = [True, function(targets)]
        except BaseException as error:  # noqa: BLE001 - any failure is the wanted answer
            answer = [False, f"{type(error).__name__}: {error}"]
        os.write(write_end, json.dumps(answer).encode()[:4000])
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as answers:
        text = answers.read()
    _, status = os.waitpid(pid, 0)
    return tuple(json.loads(text)) if text else (False, f"died with status {status}")


def main() -> None:
    targets = json.loads(Path(sys.argv[1]).read_text())
    targets["descriptors"] = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            if int(number) > 2:
                targets["descriptors"][number] = os.readlink(f"/proc/self/fd/{number}")
    only = sys.argv[2:] or list(ATTEMPTS)
    print(json.dumps({name: try_one(ATTEMPTS[name], targets) for name in only}))


if __name__ == "__main__":
    main()
