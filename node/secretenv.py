"""Where ``env:NAME`` secrets come from: the agent's own environment, overlaid by the file <data>/agent/env.

The keeper starts the agent with an environment of its own, so that no secret lies in boot.json or the keeper's table; who
wants `env:` secrets writes KEY=VALUE lines into that file. It is read anew at each lookup, so a rotated secret needs no
restart of the agent. Must never log or keep a value, nor accept a file that others may read.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from slum.errors import ConfigError
from slum.paths import Home

FILE_BYTES_MAX = 1 << 20


def secret_file(home: Home) -> Path:
    return home.agent / "env"


def lookup(home: Home, name: str, environ: Mapping[str, str]) -> str | None:
    """Return the value of *name*, the file's before *environ*'s; None when neither has it.

    ConfigError when the file is there but unusable: not ours alone, not UTF-8, or a line that is no KEY=VALUE.
    """
    return read(secret_file(home)).get(name, environ.get(name))


def read(file: Path) -> dict[str, str]:
    """Return the file's variables; empty when there is no file. Blank lines and lines that begin with # are skipped."""
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            raw = opened.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or status.st_uid != os.geteuid():
        raise ConfigError(
            f"{file} holds secrets and others may read it", hint=f"chmod 600 {file}, owned by slum's user"
        )
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(f"{file} is longer than {FILE_BYTES_MAX >> 20} MiB")
    variables = {}
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ConfigError(f"{file}:{number}: not KEY=VALUE")  # the line itself may be a secret
        variables[name.strip()] = value
    return variables


def write(file: Path, variables: Mapping[str, str]) -> None:
    """Replace *file* by *variables*, whole or not at all, 0600 and on disk when this returns; ConfigError when it cannot.

    Comments of a file that was written by hand are not kept.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as made:
            made.write("".join(f"{name}={value}\n" for name, value in sorted(variables.items())).encode())
            made.flush()
            os.fsync(made.fileno())
        temporary.rename(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"{file} cannot be written: {error.strerror}", hint="be the user it belongs to") from None
