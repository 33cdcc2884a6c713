"""Folders of bundles and builds: copy one to be written in, seal one against writing, remove one.

The work of these runs in a niced child, ``python -m slum.node.trees VERB ...``, so that the agent neither stalls nor grows.
A tree may have been written by a service: no link in it is followed, and a folder is taken from its owner before what is
in it is looked at. Sealed means: owner root (or slum's user), group as told, no write bits but for the owner's on folders.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import slum
from slum.errors import SlumError

FOLDER_MODE = 0o750
TIMEOUT_S = 600.0
NICENESS = 10
SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


def child_command(module: str, *arguments: object) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of ``python -m MODULE ARGUMENTS`` with the same slum as this one."""
    package = Path(slum.__file__ or "").parent.parent
    argv = [sys.executable, "-P", "-m", module, *(str(argument) for argument in arguments)]
    return argv, {"PYTHONPATH": str(package), "PATH": os.defpath}


def in_child(verb: str, *arguments: object) -> None:
    """Do *verb* in a niced child and wait for it; SlumError with its last words when it fails. Blocks: for a thread."""
    argv, env = child_command("slum.node.trees", verb, *arguments)
    try:
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlumError(f"cannot {verb} {arguments[0]}: not done in {TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        raise SlumError(f"cannot {verb} {arguments[0]}: {last_words(done.stderr, done.returncode)}")


async def run_child(module: str, *arguments: object, timeout_s: float, doing: str) -> str:
    """Run ``python -m MODULE ARGUMENTS`` to its end without blocking; return "", or its last words when it failed.

    SlumError, which says what it was *doing*, when it takes too long; it is killed then, and when we are cancelled.
    """
    import asyncio  # not at the top: the children of this module need to start soon

    argv, env = child_command(module, *arguments)
    null, pipe = asyncio.subprocess.DEVNULL, asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*argv, env=env, stdin=null, stdout=null, stderr=pipe)
    try:
        async with asyncio.timeout(timeout_s):
            _, said = await child.communicate()
    except TimeoutError as error:
        raise SlumError(f"{doing} took more than {timeout_s:.0f} s") from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()
    return last_words(said.decode(errors="replace"), child.returncode) if child.returncode else ""


def last_words(said: str, status: int) -> str:
    """Return the last line that a failed child wrote, or how it ended."""
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"exit {status}"


def copy(source: Path, target: Path, uid: int, gid: int) -> None:
    """Make *target*, which must not exist, a copy of *source* that *uid* may write in. Negative: the caller's own."""
    target.mkdir(mode=0o700)
    for folder, folders, files, fd in os.fwalk(source, follow_symlinks=False):
        here = target / Path(folder).relative_to(source)
        for name in folders + files:
            kind = os.stat(name, dir_fd=fd, follow_symlinks=False)
            made = here / name
            if stat.S_ISLNK(kind.st_mode):
                os.symlink(os.readlink(name, dir_fd=fd), made)
            elif stat.S_ISDIR(kind.st_mode):
                made.mkdir(mode=FOLDER_MODE)
            else:
                _copy_file(name, fd, made, 0o750 if kind.st_mode & 0o111 else 0o640)
            os.chown(made, uid, gid, follow_symlinks=False)
    target.chmod(FOLDER_MODE)
    os.chown(target, uid, gid)


def seal(root: Path, gid: int) -> None:
    """Take *root* and all in it from its owner, for *gid* to read; then have it on disk. May be repeated."""
    _seal(root, gid)
    for _folder, folders, files, fd in os.fwalk(root, follow_symlinks=False):
        for name in folders + files:
            _seal(Path(name), gid, fd)
    sync(root)


def remove(root: Path) -> None:
    """Remove *root* and all in it; absent is fine. It is out of use at once: a crash leaves a name with a dot."""
    if root.is_symlink() or root.is_file():
        root.unlink()
        return
    if not root.exists():
        return
    gone = root if root.name.startswith(".gone-") else root.with_name(f".gone-{os.urandom(8).hex()}")
    if gone != root:
        root.rename(gone)
    # Root needs no mode bits; and with another owner about, a link may take a folder's place before a chmod by name.
    for folder, folders, _files in os.walk(gone) if os.geteuid() != 0 else ():
        for name in folders:
            path = os.path.join(folder, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(gone)


def sync(folder: Path) -> None:
    """Have all of the file system of *folder* on disk: one call, however many files (syncfs(2))."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "syncfs failed", str(folder))
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Have the names in *folder* on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy_file(name: str, folder_fd: int, made: Path, mode: int) -> None:
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    with open(source, "rb") as reader, open(made, "xb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)
        os.fchmod(writer.fileno(), mode)


def _seal(path: Path, gid: int, folder_fd: int | None = None) -> None:
    """Seal one entry. Once its folder belongs to us nobody can put another thing in its place between the calls."""
    kind = os.stat(path, dir_fd=folder_fd, follow_symlinks=False).st_mode
    os.chown(path, os.geteuid(), gid, dir_fd=folder_fd, follow_symlinks=False)
    if stat.S_ISDIR(kind):
        os.chmod(path, FOLDER_MODE, dir_fd=folder_fd)
    elif stat.S_ISREG(kind):
        os.chmod(path, 0o550 if kind & 0o111 else 0o440, dir_fd=folder_fd)
    elif not stat.S_ISLNK(kind):
        os.unlink(path, dir_fd=folder_fd)  # a socket or FIFO that the build left: nobody is behind it


def main(arguments: list[str]) -> int:
    """Do one verb; 0, or 1 with the reason as the last line of stderr."""
    os.nice(NICENESS)
    try:
        match arguments:
            case ["copy", source, target, uid, gid]:
                copy(Path(source), Path(target), int(uid), int(gid))
            case ["seal", root, gid]:
                seal(Path(root), int(gid))
            case ["remove", root]:
                remove(Path(root))
            case _:
                sys.stderr.write("usage: copy SOURCE TARGET UID GID | seal FOLDER GID | remove FOLDER\n")
                return 2
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
