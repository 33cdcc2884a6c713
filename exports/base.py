"""What an export and an import are: a fleet in, files and losses out, and the way back.

Pure: the same fleet and site give the same bytes; nothing is read, written, asked or resolved here, and no secret's value
can appear since a fleet holds only where one is found. What the target cannot say, or says but does not do, is a Loss,
never silence.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from typing import Protocol

from slum.credentials import mask
from slum.frozen import Frozen
from slum.model import Fleet, Service

LOSSES = "losses.json"


class File(Frozen):
    """*path* is relative to the output folder, with forward slashes and no ``..``."""

    path: str
    text: str


class Loss(Frozen):
    """What another system cannot say. *path* is the place in the fleet, in the words of slum.toml.

    An import has losses as well: there *path* is the place in the file that was read.
    """

    path: str
    what: str
    why: str
    instead: str = ""


class Site(Frozen):
    """What an export may know beside the fleet, all of it text."""

    root: str = ""
    """The way from the output folder to the folder that sources are relative to; empty when they are the same."""
    sources: Mapping[tuple[str, str], str] = {}
    """Folder of (tenement, service) relative to the output folder; without an entry it is *root* and the service's source."""
    version: str = "0"
    machines: Mapping[str, str] = {}
    """Machine name -> the provider's id, for those that exist."""

    def folder(self, tenement: str, service: Service, *, up: str = "") -> str:
        """Return the source folder of *service* as a file sees it that lies *up* ("../") below the output folder."""
        given = self.sources.get((tenement, service.name))
        path = posixpath.normpath(posixpath.join(self.root, service.source or ".") if given is None else given)
        return path if posixpath.isabs(path) else up + path


class Rendered(Frozen):
    files: tuple[File, ...]
    losses: tuple[Loss, ...] = ()


class Imported(Frozen):
    """A fleet as another system's files tell it; the losses are what these say and a fleet cannot."""

    fleet: Fleet
    losses: tuple[Loss, ...] = ()


class Export(Protocol):
    def __call__(self, fleet: Fleet, site: Site) -> Rendered: ...


class Import(Protocol):
    def __call__(self, files: Mapping[str, str]) -> Imported:
        """Return the fleet that *files* tell of: path relative to the slum.toml-to-be -> text."""
        ...


class Losses:
    """Collects losses while an export runs; equal ones are kept once, in the order of their paths.

    A stranger's file may hold a password anywhere: what looks like one is not repeated.
    """

    def __init__(self) -> None:
        self._found: dict[Loss, None] = {}

    def add(self, path: str, what: str, why: str, instead: str = "") -> None:
        self._found[Loss(path=path, what=mask(what), why=why, instead=instead)] = None

    def all(self) -> tuple[Loss, ...]:
        return tuple(sorted(self._found, key=lambda loss: (loss.path, loss.what)))


def service_path(tenement: str, service: str, key: str = "") -> str:
    """Return the place of a service, or of one of its keys, as a Loss names it."""
    return f"tenement.{tenement}.service.{service}" + (f".{key}" if key else "")
