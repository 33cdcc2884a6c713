"""The few files of /etc that programs behind a wall need, copied into one folder that is mounted as their /etc.

One mount instead of one for each file (each costs 0.1 ms at every start), and a change reaches services that run already,
which it does not through a mounted file once the host replaces that by rename, as most tools do. Whole folders are mounted
upon it as they are. Nothing here is secret: the files are readable to every user of the host, and none other is copied.
"""

from __future__ import annotations

import os
from pathlib import Path

from slum.errors import SlumError

FILES = ("resolv.conf", "hosts", "passwd", "group", "nsswitch.conf", "ld.so.cache", "localtime")
FOLDERS = (
    "ssl",
    # Programs of /usr that are links through the first (awk, java), and TLS on Fedora.
    *("alternatives", "pki", "crypto-policies"),
)
HOST = Path("/etc")


class Etc:
    """The folder *folder*, made when absent; several processes may refresh it at once, since files come by rename."""

    def __init__(self, folder: Path, host: Path = HOST) -> None:
        self._folder = folder
        self._host = host
        self._seen: dict[str, tuple[int, int, int]] = {}

    def mounts(self) -> tuple[str, ...]:
        """Bring the copies up to date and return bubblewrap's words for them."""
        self._refresh()
        argv = ["--ro-bind", str(self._folder), "/etc"]
        for name in FOLDERS:
            if (self._host / name).is_dir():
                argv += ["--ro-bind", str(self._host / name), f"/etc/{name}"]
        return tuple(argv)

    def _refresh(self) -> None:
        """Copy each file whose time, size or inode is new; one that is gone on the host goes here too."""
        if not self._seen or not self._folder.is_dir():
            self._seen.clear()
            try:
                for folder in (self._folder, *(self._folder / name for name in FOLDERS)):
                    folder.mkdir(exist_ok=True)
                    folder.chmod(0o755)
            except OSError as error:
                raise SlumError(f"{self._folder} cannot be made: {error}", hint="slum doctor") from error
        for name in FILES:
            try:
                status = (self._host / name).stat()
            except OSError:
                (self._folder / name).unlink(missing_ok=True)
                self._seen.pop(name, None)
                continue
            mark = (status.st_mtime_ns, status.st_size, status.st_ino)
            if self._seen.get(name) != mark:
                self._copy(name)
                self._seen[name] = mark

    def _copy(self, name: str) -> None:
        """Copy one file's content; the time zone, a link into /usr, as a link, since programs read its name."""
        unfinished = self._folder / f".{name}.{os.getpid()}"
        source = self._host / name
        if name == "localtime" and source.is_symlink():
            unfinished.unlink(missing_ok=True)
            unfinished.symlink_to(os.readlink(source))
        else:
            unfinished.write_bytes(source.read_bytes())
            unfinished.chmod(0o644)
        unfinished.rename(self._folder / name)
