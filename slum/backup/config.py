"""The server's own configuration, ``<data>/server.toml``: today its table [backup], where the ledger is backed up to.

A fleet file cannot say this: the backup must be known before there is a fleet, and on a machine that has lost
everything else. Unknown keys are errors. Credentials never stand in it: they are read from a file of NAME=value lines
that only slum's user may read (``secrets_ref``, default ``<data>/server.env``), or from the environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from slum import tomlfile
from slum.errors import ConfigError
from slum.frozen import Frozen
from slum.node import secretenv
from slum.paths import Home
from slum.problem import nearest

KEY_ID, SECRET = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_LIMITS: Mapping[str, tuple[float, float]] = {
    "interval_ms": (50, 60_000),
    "keep_days": (1, 3650),
    "snapshot_hours": (1, 720),
    "alarm": (1, 86_400),
    "verify_hours": (0, 720),
    "backlog_mb": (1, 1 << 20),
}


class Settings(Frozen, forbid_unknown_fields=True):
    """The table [backup]. Durations without a unit in their name are seconds, as everywhere in the files."""

    url: str
    """``s3://BUCKET/PREFIX`` or ``file:///FOLDER``."""
    endpoint: str = ""
    """Of an S3 server that is not Amazon's, e.g. ``https://s3.example.com``."""
    region: str = "us-east-1"
    secrets_ref: str = ""
    """``file:/abs``: a file of NAME=value lines."""
    interval_ms: int = 1000
    """How long a committed entry may wait until it is sent."""
    keep_days: int = 30
    """How far back a point can be restored."""
    snapshot_hours: int = 24
    alarm: float = 60.0
    """A lag above this is an alarm event."""
    verify_hours: int = 24
    """How often a restore is tried; 0 is never."""
    backlog_mb: int = 512
    """What may pile up on the disk while the store is away; beyond it the backup starts anew when the store is back."""


class Keys:
    """Credentials of the store. Shows nothing to whoever prints it."""

    __slots__ = ("id", "secret")

    def __init__(self, id_: str, secret: str) -> None:
        self.id = id_
        self.secret = secret


class Place(Frozen):
    """Where a store is. *bucket* is empty for file://; *path* is the prefix, or the folder."""

    kind: str
    bucket: str
    path: str

    @property
    def url(self) -> str:
        return f"file://{self.path}" if self.kind == "file" else f"s3://{self.bucket}/{self.path}".rstrip("/")


def secrets_file(home: Home) -> Path:
    return home.data / "server.env"


def load(home: Home) -> Settings | None:
    """Return [backup] of server.toml, None when there is none; ConfigError when it is not sound."""
    file = home.server_config
    if not file.exists():
        return None
    document = tomlfile.read(file)
    for name in document.data:
        if name != "backup":
            line = document.line((name,))
            raise ConfigError(f"{file}:{line}: {name}: unknown table{nearest(name, ('backup',))}")
    table = document.data.get("backup")
    return None if table is None else _settings(document, table)


def made(url: str, **fields: object) -> Settings:
    """Return settings from the command line; ConfigError when they are not sound."""
    settings = Settings(url=url, **{name: value for name, value in fields.items() if value is not None})  # type: ignore[arg-type]  # checked by click
    _check(settings)
    return settings


def _settings(document: tomlfile.Document, table: object) -> Settings:
    if not isinstance(table, dict):
        raise ConfigError(f"{document.name}: backup is not a table", hint="write [backup]")
    known = Settings.__struct_fields__
    for key in table:
        if key not in known:
            line = document.line(("backup", key))
            raise ConfigError(f"{document.name}:{line}: backup.{key}: unknown key{nearest(key, known)}")
    try:
        settings = msgspec.convert(table, Settings)
        _check(settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{document.name}: backup: {error}".replace(" - at `$.", " (").replace("`", ")")) from None
    except ConfigError as error:
        raise ConfigError(f"{document.name}: backup.{error.message}", hint=error.hint) from None
    return settings


def _check(settings: Settings) -> None:
    place_of(settings)
    for name, (low, high) in _LIMITS.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ConfigError(f"{name}: {value} is not between {low:g} and {high:g}")
    if settings.secrets_ref and not settings.secrets_ref.startswith("file:/"):
        raise ConfigError(
            "secrets_ref: is no reference such as file:/abs"
        )  # not shown: people put the secret itself here
    if settings.endpoint:
        parts = urlsplit(settings.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ConfigError("endpoint: is no address such as https://s3.example.com")


def place_of(settings: Settings) -> Place:
    """Return where *settings* point; ConfigError when it is no address of a store."""
    hint = "write s3://BUCKET/PREFIX or file:///FOLDER"
    try:
        parts = urlsplit(settings.url)
        host = parts.hostname or ""
    except ValueError:
        raise ConfigError("url: is no address", hint=hint) from None
    if parts.username or parts.password or parts.query:
        raise ConfigError("url: holds more than an address", hint="credentials go into secrets_ref, never into the URL")
    if parts.scheme == "file" and not host and len(parts.path) > 1:
        return Place(kind="file", bucket="", path="/" + parts.path.strip("/"))
    if parts.scheme == "s3" and _BUCKET.fullmatch(host):
        return Place(kind="s3", bucket=host, path=parts.path.strip("/"))
    raise ConfigError(f"url: {settings.url[:100]!r} is no address of a store", hint=hint)


def keys_of(settings: Settings, environ: Mapping[str, str], default: Path | None = None) -> Keys:
    """Return the store's credentials: of secrets_ref, else of the file *default*, else of *environ*."""
    if place_of(settings).kind == "file":
        return Keys("", "")
    file = Path(settings.secrets_ref.removeprefix("file:")) if settings.secrets_ref else default
    if settings.secrets_ref and file is not None and not file.exists():
        raise ConfigError(f"{file}: no such file", hint=f"it holds {KEY_ID}=... and {SECRET}=..., mode 0600")
    variables = {**environ, **(secretenv.read(file) if file is not None else {})}
    found = Keys(variables.get(KEY_ID, "").strip(), variables.get(SECRET, "").strip())
    if not found.id or not found.secret:
        where = f"{file}, or the environment," if file is not None else "the environment"
        raise ConfigError(f"{where} lacks {KEY_ID} or {SECRET}", hint=f"write both into {file or 'a file'}, mode 0600")
    return found
