"""An output folder that is written only below itself: compared first, then each file put in place whole.

Every step goes through directory descriptors that follow no link, so a link inside the folder can lead nowhere, also
when somebody places it meanwhile. The folder's own name may be a link: it is what the user typed.
"""

from __future__ import annotations

import difflib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from slum.errors import ConfigError

READ_MAX = 8 << 20


class Change(NamedTuple):
    """What writing a file would do: *state* is "new", "changed" or "same"."""

    path: str
    state: str
    diff: tuple[str, ...] = ()


def compare(folder: Path, files: Sequence[tuple[str, str]]) -> tuple[Change, ...]:
    """Return what writing *files* (path, text) into *folder* would change; ConfigError for a link or device in the way."""
    try:
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return tuple(Change(path, "new") for path, _ in files)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    try:
        return tuple(_compared(top, folder, path, text) for path, text in files)
    finally:
        os.close(top)


def write(folder: Path, files: Sequence[tuple[str, str]]) -> None:
    """Put *files* into *folder*, made if it is not there; each is replaced whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    try:
        for path, text in files:
            _write(top, folder, path, text)
    finally:
        os.close(top)


def _compared(top: int, folder: Path, path: str, text: str) -> Change:
    with _parent(top, folder, path, make=False) as (parent, name):
        before = None if parent is None else _read(parent, folder / path, name)
    if before is None:
        return Change(path, "new")
    if before == text:
        return Change(path, "same")
    lines = difflib.unified_diff(
        before.splitlines(), text.splitlines(), f"{path} (there)", f"{path} (now)", lineterm=""
    )
    return Change(path, "changed", tuple(lines))


def _read(parent: int, path: Path, name: str) -> str | None:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _in_the_way(path, error) from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(
                f"{path} is no regular file; it was not touched", hint="remove it, or name another folder"
            )
        return file.read(READ_MAX).decode(errors="surrogateescape")


def _write(top: int, folder: Path, path: str, text: str) -> None:
    with _parent(top, folder, path, make=True) as (parent, name):
        assert parent is not None
        temporary = f".{name[:200]}.{secrets.token_hex(4)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            with os.fdopen(os.open(temporary, flags, 0o644, dir_fd=parent), "w", encoding="utf-8", newline="") as file:
                file.write(text)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError as error:
            raise ConfigError(f"{folder / path} cannot be written: {error.strerror}") from error


@contextmanager
def _parent(top: int, folder: Path, path: str, *, make: bool) -> Iterator[tuple[int | None, str]]:
    """Give a descriptor of the folder of *path* below *top*, None when it is not there and shall not be made."""
    *folders, name = path.split("/")
    if any(part in ("", ".", "..") for part in (*folders, name)):
        raise ConfigError(f"{path!r} does not lie below {folder}")
    at: int | None = os.dup(top)
    try:
        for part in folders:
            assert at is not None
            below = _below(at, folder / path, part, make=make)
            os.close(at)
            at = below
            if at is None:
                break
        yield at, name
    finally:
        if at is not None:
            os.close(at)


def _below(at: int, path: Path, part: str, *, make: bool) -> int | None:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(part, flags, dir_fd=at)
    except FileNotFoundError:
        if not make:
            return None
    except OSError as error:
        raise _in_the_way(path, error) from error
    try:
        os.mkdir(part, dir_fd=at)
        return os.open(part, flags, dir_fd=at)
    except OSError as error:
        raise _in_the_way(path, error) from error


def _in_the_way(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: a link or something else is in the way ({error.strerror}); nothing was followed",
        hint="remove it, or name another folder",
    )
