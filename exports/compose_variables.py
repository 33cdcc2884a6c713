"""A service's variables and secrets, as a Compose file gives them and as slum does. Part of compose_import; pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from slum.exports.assemble import RESERVED, VARIABLE
from slum.exports.base import Losses
from slum.exports.compose_shape import whole
from slum.exports.container import OWN, as_written
from slum.exports.interpolation import fill

Yaml = dict[str, Any]


class Project(msgspec.Struct, frozen=True, kw_only=True):
    """One Compose file, with what its services share."""

    path: str
    folder: str
    fleet: str
    domain: str
    tenement: str
    listen: tuple[str, ...]
    services: Mapping[str, Yaml]
    volumes: Mapping[str, Any]
    secrets: Mapping[str, Any]
    timeouts: Mapping[str, float]
    files: Mapping[str, str]


class Variables:
    """Reads one service; what it says and a fleet cannot goes to *losses*."""

    def __init__(self, project: Project, name: str, table: Yaml, names: Mapping[str, str], losses: Losses) -> None:
        self.project, self.name, self.table, self.names = project, name, table, names
        self.losses = losses
        self.env, self.secrets = self._environment()
        self.ours = self.env.get("SLUM_SERVICE") == names[name]
        self.own = {key: self.env.pop(key) for key in OWN if key in self.env} if self.ours else {}
        self.places: dict[str, str] = {}

    def lost(self, key: str, what: str, why: str, instead: str = "") -> None:
        self.losses.add(f"services.{self.name}" + (f".{key}" if key else ""), what, why, instead)

    def text(self, value: object, key: str) -> str:
        """Return *value* as text with its variables filled in; those that cannot be known are a loss."""
        if isinstance(value, bool):
            return "true" if value else "false"
        filled = fill(str(value))
        if filled.missing:
            names = ", ".join(filled.missing)
            self.lost(key, f"${{{names}}}", "the variable has no default", "write its value into slum.toml")
        if filled.defaulted:
            names = ", ".join(filled.defaulted)
            self.lost(key, f"${{{names}}}", "a fleet has no variables; the default was taken")
        return filled.text

    def whole(self, value: object, key: str) -> int:
        return whole(value, f"{self.project.path}: services.{self.name}.{key}")

    def written(self, text: str) -> str:
        return as_written(text, places=self.places)

    def _environment(self) -> tuple[dict[str, str], dict[str, str]]:
        env: dict[str, str] = {}
        secrets: dict[str, str] = {}
        given = self.table.get("environment") or {}
        if isinstance(given, list):
            pairs = [str(item).partition("=") for item in given]
            given = {name: value if sign else None for name, sign, value in pairs}
        for key, value in given.items():
            key = str(key)
            if not VARIABLE.fullmatch(key):
                self.lost(f"environment.{key}", "a variable", "slum's variables are of A-Z, a-z, 0-9 and _")
                continue
            alone = key if value is None else fill(str(value)).alone
            filled = fill("" if value is None else str(value))
            if alone is not None and not filled.defaulted:
                secrets[key] = f"env:{alone}"  # read where it runs, like Compose reads it where it is started
            elif filled.missing:
                why = f"${{{', '.join(filled.missing)}}} is not known here, so the whole text is read where it runs"
                self.lost(f"environment.{key}", str(value), why, f"set {key} for the agent, or `file:/etc/slum/{key}`")
                secrets[key] = f"env:{key}"
            else:
                env[key] = self.text(value, f"environment.{key}")
        return env, secrets

    def _foreign_names(self) -> None:
        """Drop variables that slum sets itself, and let names of other containers mean this machine."""
        if self.ours:
            return
        others = sorted(set(self.project.services) - {self.name}, key=len, reverse=True)
        for key in sorted(self.env):
            if RESERVED.fullmatch(key):
                self.lost(f"environment.{key}", self.env.pop(key), "slum sets it itself")
                continue
            value = self.env[key]
            for other in others:
                name = re.escape(other)
                value = re.sub(rf"(?<=[@/,]){name}(?=[:/,]|$)|^{name}(?=:\d)|^{name}$", "127.0.0.1", value)
            if value != self.env[key]:
                why = "services of a tenement share its loopback"
                self.lost(f"environment.{key}", f"{self.env[key]!r} becomes {value!r}", why)
                self.env[key] = value
        for key in [key for key in self.secrets if RESERVED.fullmatch(key)]:
            self.lost(f"environment.{key}", self.secrets.pop(key), "slum sets it itself")

    def _secrets(self) -> None:
        for item in self.table.get("secrets") or ():
            source = str(item.get("source") if isinstance(item, dict) else item)
            target = str((item.get("target") if isinstance(item, dict) else None) or source)
            declared = self.project.secrets.get(source) or {}
            name = target if self.ours else self._variable_of(target)
            if "environment" in declared:
                self.secrets[name] = f"env:{fill(str(declared['environment'])).text}"
                continue
            path = fill(str(declared.get("file", ""))).text
            if not path.startswith("/"):
                self.lost(
                    f"secrets.{source}", path or "external", "slum reads it on the machine", f"/etc/slum/{source}"
                )
                path = f"/etc/slum/{source}"
            self.secrets[name] = f"file:{path}"

    def _variable_of(self, target: str) -> str:
        """A mounted secret becomes a variable; the usual NAME_FILE variable says which."""
        base = posixpath.basename(target)
        for key, value in list(self.env.items()):
            if key.endswith("_FILE") and value == f"/run/secrets/{base}":
                del self.env[key]
                self.lost(
                    f"environment.{key}",
                    value,
                    "slum gives secrets as variables",
                    f"{key.removesuffix('_FILE')} is set",
                )
                return key.removesuffix("_FILE")
        name = re.sub(r"[^A-Za-z0-9_]", "_", base).upper()
        self.lost("secrets", f"/run/secrets/{base}", "slum gives secrets as variables, not as files", f"${name}")
        return name if VARIABLE.fullmatch(name) else f"SECRET_{name}"
