"""Read a slum.toml and the tenement.toml files that it names into a fully resolved fleet.

Input is a path, output the model's Fleet with all aliases and defaults applied, or one ConfigError that lists every
problem at once, each with file, line and key. It reads TOML files and looks whether source folders exist; it must never
write, pack, resolve secrets or talk to anything. What a value may be is validate's to judge; what a key is called and
how it is read stands in filekeys.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slum import filekeys, tomlfile
from slum.errors import ConfigError
from slum.filekeys import KeySpec, Wrong
from slum.model import (
    DEFAULT_ID,
    Deploy,
    Fleet,
    FlyOperator,
    Listen,
    Operator,
    Service,
    Settings,
    Tenement,
)
from slum.problem import At, Problem, nearest, shown
from slum.tomlfile import Document
from slum.validate import check_credentials, check_effects, check_fleet

PROBLEMS_SHOWN = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A fleet as its files declare it. *sources* has the absolute folder of each service that has one."""

    fleet: Fleet
    sources: Mapping[tuple[str, str], Path]
    warnings: tuple[Problem, ...]
    files: tuple[Path, ...]


def load(path: Path) -> Loaded:
    """Return the fleet that the slum.toml at *path* declares; ConfigError with all problems when it is not sound."""
    return load_document(tomlfile.read(path))


def load_document(main: Document) -> Loaded:
    """The same for a slum.toml that is parsed already; the files that it names are read from its folder."""
    report = _Report(main)
    fleet = _read_fleet(report)
    report.judge(check_fleet(fleet))
    report.raise_if_any()
    report.warn_of(check_credentials(fleet))
    report.warn_of(check_effects(fleet))
    return Loaded(
        fleet=fleet,
        sources=dict(sorted(report.sources.items())),
        warnings=tuple(sorted(dict.fromkeys(report.warnings), key=_order)),
        files=tuple(report.files),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A spot in a document: where a value stands, and what messages call it."""

    document: Document
    at: At

    def __truediv__(self, key: str | int) -> _Place:
        return _Place(self.document, (*self.at, key))

    def problem(self, message: str) -> Problem:
        return Problem(at=self.at, message=message, file=self.document.name, line=self.document.line(self.at))


class _Report:
    """What one load finds: problems, warnings, sources, and where each part of the model came from."""

    def __init__(self, main: Document) -> None:
        self.main = main
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self.sources: dict[tuple[str, str], Path] = {}
        self.files = [main.folder / Path(main.name).name]
        self.documents: dict[Path, Document | ConfigError] = {}
        self.origins: dict[At, _Place] = {(): _Place(main, ())}
        """Place in the model -> place in a file; the longest prefix counts."""
        self.broken: set[At] = set()
        """Places in the model whose value could not be read, so that a rule about the stand-in says nothing."""

    def wrong(self, place: _Place, message: str, model_at: At | None = None) -> None:
        self.problems.append(place.problem(message))
        if model_at is not None:
            self.broken.add(model_at)

    def warn(self, place: _Place, message: str) -> None:
        self.warnings.append(place.problem(message))

    def judge(self, found: tuple[Problem, ...]) -> None:
        """Take over validate's problems, unless the value they are about could not be read anyway."""
        self.problems += [
            self._located(problem)
            for problem in found
            if not self._is_broken(problem.at) and problem.given not in self.broken
        ]

    def warn_of(self, found: tuple[Problem, ...]) -> None:
        self.warnings += [self._located(problem) for problem in found]

    def raise_if_any(self) -> None:
        lines = tuple(str(problem) for problem in sorted(dict.fromkeys(self.problems), key=_order))
        if lines:
            count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
            rest = (f"... and {len(lines) - PROBLEMS_SHOWN} more",) if len(lines) > PROBLEMS_SHOWN else ()
            raise ConfigError(count, problems=(*lines[:PROBLEMS_SHOWN], *rest))

    def _is_broken(self, at: At) -> bool:
        return any(at[:length] in self.broken for length in range(len(at) + 1))

    def _located(self, problem: Problem) -> Problem:
        length = next(n for n in range(len(problem.at), -1, -1) if problem.at[:n] in self.origins)
        origin = self.origins[problem.at[:length]]
        place = _Place(origin.document, (*origin.at, *problem.at[length:]))
        return place.problem(problem.message)


def _order(problem: Problem) -> tuple[str, int, str]:
    return problem.file, problem.line or 0, str(problem)


def _read_fleet(report: _Report) -> Fleet:
    top = _Place(report.main, ())
    data = report.main.data
    _refuse_unknown(report, top, data, filekeys.SLUM_TABLES)
    fields = _read_keys(
        report, top / "fleet", _table(report, top / "fleet", data.get("fleet", {})), filekeys.FLEET, ("fleet",)
    )
    operators = tuple(
        _read_operator(report, name, top / "operators" / name, value)
        for name, value in sorted(_table(report, top / "operators", data.get("operators", {})).items())
    )
    tenements = tuple(
        _read_tenement(report, name, top / "tenement" / name, value)
        for name, value in sorted(_table(report, top / "tenement", data.get("tenement", {})).items())
    )
    if not tenements:
        report.warn(top, "declares no [tenement.NAME]: applying it removes all that runs")
    return Fleet(**fields, operators=operators, tenements=tenements)


def _read_operator(report: _Report, name: str, place: _Place, value: object) -> Operator:
    at: At = ("operators", name)
    table = _table(report, place, value, at)
    kind = table.get("type")
    if not isinstance(kind, str) or kind not in filekeys.OPERATORS:
        if at not in report.broken:
            types = ", ".join(filekeys.OPERATORS)
            message = f"needs `type`: one of {types}" if kind is None else f"{shown(kind)} is none of {types}"
            report.wrong(place / "type" if "type" in table else place, message, at)
        return FlyOperator(name=name, org="x", region="xxx")  # stands in; nothing is asked of its machines
    struct, keys = filekeys.OPERATORS[kind]
    rest = {key: item for key, item in table.items() if key != "type"}
    operator: Operator = struct(name=name, **_read_keys(report, place, rest, keys, at, also=("type",)))
    return operator


def _read_tenement(report: _Report, name: str, place: _Place, value: object) -> Tenement:
    at: At = ("tenement", name)
    table = _table(report, place, value, at)
    own = {key: item for key, item in table.items() if key not in filekeys.TENEMENT_TABLES}
    inline = {key: item for key, item in table.items() if key in filekeys.TENEMENT_TABLES}
    fields = _read_keys(report, place, own, filekeys.TENEMENT, at, also=filekeys.TENEMENT_TABLES)
    if "config" in fields:
        for key in inline:
            report.wrong(place / key, "stands beside `config`; move it into that file, or drop `config`")
        parts = _read_config(report, fields["config"], place, at)
    else:
        parts = _read_parts(report, place, inline, name)
        if not parts["services"] and at not in report.broken:
            report.warn(place, "has no services; name a `config`, or add [tenement.NAME.service.NAME]")
    return Tenement(name=name, **fields, **parts)


def _read_config(report: _Report, config: str, place: _Place, at: At) -> dict[str, Any]:
    """Return what the tenement.toml called *config* declares; it is parsed once, however many tenements name it."""
    if config.startswith("~"):
        report.wrong(place / "config", "`~` is not expanded; write the whole path")
        return {"services": ()}
    path = Path(os.path.normpath(report.main.folder / config))
    if path not in report.documents:
        try:
            report.documents[path] = tomlfile.read(path, str(Path(report.main.name).parent / config))
            report.files.append(path)
        except ConfigError as error:
            report.documents[path] = error
    document = report.documents[path]
    if isinstance(document, ConfigError):
        report.wrong(place / "config", document.message)
        return {"services": ()}
    top = _Place(document, ())
    _refuse_unknown(report, top, document.data, filekeys.TENEMENT_TABLES)
    return _read_parts(report, top, document.data, str(at[1]))


def _read_parts(report: _Report, place: _Place, data: Mapping[str, Any], tenement: str) -> dict[str, Any]:
    """Return settings, services and routing from the tables in *data*, which stand at *place*."""
    at: At = ("tenement", tenement)
    for key in ("settings", "routing", "service"):
        report.origins[(*at, key)] = place / key
    settings = _table(report, place / "settings", data.get("settings", {}), (*at, "settings"))
    routing = _table(report, place / "routing", data.get("routing", {}), (*at, "routing"))
    return {
        "settings": Settings(**_read_keys(report, place / "settings", settings, filekeys.SETTINGS, (*at, "settings"))),
        "services": _read_services(report, place, data, tenement),
        **_read_keys(report, place / "routing", routing, filekeys.ROUTING, (*at, "routing")),
    }


def _read_services(report: _Report, place: _Place, data: Mapping[str, Any], tenement: str) -> tuple[Service, ...]:
    services = _table(report, place / "service", data.get("service", {}))
    old = _table(report, place / "process", data.get("process", {}))
    ids = _read_instances(report, place / "instances", data.get("instances", {}), (*services, *old))
    found: dict[str, Service] = {}
    for word, tables in (("service", services), ("process", old)):
        for name, value in tables.items():
            spot = place / word / name
            if word == "process":
                report.warn(spot, f"`process` is deprecated; write `service`: [service.{name}]")
            if name in found:
                report.wrong(
                    spot, f"is declared under `service` too (line {place.document.line((*place.at, 'service', name))})"
                )
                continue
            at: At = ("tenement", tenement, "service", name)
            report.origins[at] = spot
            if name in ids:
                report.origins[(*at, "instances")] = place / "instances" / name
            found[name] = _read_service(report, spot, value, at, ids.get(name, (DEFAULT_ID,)))
    return tuple(found[name] for name in sorted(found))


def _read_instances(
    report: _Report, place: _Place, value: object, known: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    ids: dict[str, tuple[str, ...]] = {}
    for name, item in _table(report, place, value).items():
        if name not in known:
            report.wrong(place / name, f"{shown(name)} is no service of this tenement{nearest(name, known)}")
            continue
        try:
            ids[name] = filekeys.texts(item)
        except Wrong as wrong:
            report.wrong(_inside(place / name, wrong), wrong.message)
    return ids


def _read_service(report: _Report, place: _Place, value: object, at: At, ids: tuple[str, ...]) -> Service:
    table = dict(_table(report, place, value, at))
    if at in report.broken:
        return Service(name=str(at[-1]), command=("x",))
    for old, key in filekeys.SERVICE_ALIASES.items():
        if old in table and key in table:
            report.wrong(place / old, f"is an old word for `{key}`, which is there too; keep `{key}`")
            del table[old]
        elif old in table:
            report.warn(place / old, f"`{old}` is deprecated; write `{key}`")
            report.origins[(*at, key)] = place / old
            table[key] = table.pop(old)
    fields = _read_keys(report, place, table, filekeys.SERVICE, at, also=filekeys.SERVICE_ALIASES)
    fields["command"] = (*fields["command"], *fields.pop("args", ()))
    own_socket = "socket" in fields and fields.get("listen", Listen.SOCKET) is Listen.SOCKET
    if own_socket or fields.get("listen") in (Listen.PORT, Listen.NONE):
        fields.setdefault("deploy", Deploy.REPLACE)
    service = Service(name=str(at[-1]), instances=ids, **fields)
    if service.source is not None and not service.source.startswith("~"):
        _note_source(report, place / "source", service.source, (str(at[1]), service.name))
    return service


def _note_source(report: _Report, place: _Place, source: str, key: tuple[str, str]) -> None:
    folder = Path(os.path.abspath(place.document.folder / source))
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            report.wrong(place, f"{shown(source)} is not a folder")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        report.wrong(place, f"{shown(source)}: {why.lower()}")
    report.sources[key] = folder


def _table(report: _Report, place: _Place, value: object, model_at: At | None = None) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    report.wrong(place, f"{shown(value)} is not a table", model_at)
    return {}


def _refuse_unknown(report: _Report, place: _Place, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            report.wrong(place / key, f"unknown key{nearest(key, known)}")


def _read_keys(
    report: _Report,
    place: _Place,
    table: Mapping[str, Any],
    keys: Mapping[str, KeySpec],
    at: At,
    *,
    also: Mapping[str, str] | tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the model's fields for the keys of *table*; those that cannot be read are reported and left out.

    *at* is the table's place in the model; *also* are keys that are read elsewhere, known for the did-you-mean.
    """
    report.origins.setdefault(at, place)
    fields: dict[str, Any] = {}
    misspelt: set[str] = set()
    for key, value in table.items():
        if key not in keys:
            near = nearest(key, (*keys, *also))
            misspelt.update(word for word in keys if f"`{word}`" in near)
            report.wrong(place / key, f"unknown key{near}")
            continue
        try:
            fields[keys[key].field] = keys[key].read(value)
        except Wrong as wrong:
            for fault in wrong.faults:
                at_fault = (*at, key) if wrong.rest is None else (*at, key, *fault.inside)
                report.wrong(_inside(place / key, fault), fault.message, at_fault)
            if wrong.rest is not None:
                fields[keys[key].field] = wrong.rest
    for key, spec in keys.items():
        if spec.stand_in is not None and spec.field not in fields:
            if key not in table and at not in report.broken:
                if key not in misspelt:
                    report.wrong(place, f"needs `{key}`")
                report.broken.add((*at, key))
            fields[spec.field] = spec.stand_in
    return fields


def _inside(place: _Place, wrong: Wrong) -> _Place:
    for part in wrong.inside:
        place = place / part
    return place
