"""docs/configuration.md and the loader agree: every key, its default and its limits, in the right section."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import pytest

from slum import filekeys, validate, validate_operator, validate_service
from slum.filekeys import KeySpec
from slum.interpolate import PLACEHOLDERS
from slum.model import Fleet, Service, Settings, SshHost, Tenement
from slum.problem import Range

DOC = (Path(__file__).resolve().parents[1] / "docs" / "configuration.md").read_text()
SECTIONS: Mapping[str, tuple[type[Any], Mapping[str, KeySpec], Mapping[str, Range]]] = {
    "## `[fleet]`": (Fleet, filekeys.FLEET, {}),
    "A host as a table": (SshHost, filekeys.SSH_HOST, validate_operator.HOST_RANGES),
    "## `[tenement.NAME]`": (Tenement, filekeys.TENEMENT, validate.TENEMENT_RANGES),
    "### `[settings]`": (Settings, filekeys.SETTINGS, validate.SETTINGS_RANGES),
    "### `[service.NAME]`": (Service, filekeys.SERVICE, validate_service.RANGES),
    "### `[routing]`": (Tenement, filekeys.ROUTING, {}),
    **{
        f'### `type = "{name}"`': (struct, keys, validate_operator.FLY_RANGES if name == "fly" else {})
        for name, (struct, keys) in filekeys.OPERATORS.items()
    },
}


def rows(heading: str) -> dict[str, tuple[str, str, str]]:
    """Return key -> (type, default, meaning) of the tables between *heading* and the next one."""
    start = DOC.index(f"\n{heading}") + len(heading)
    text = re.split(r"\n#|\nA host as a table", DOC[start:], maxsplit=1)[0]
    found = re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \| ([^|]+) \| (.*) \|$", text, re.MULTILINE)
    return {key: (kind, default, meaning) for key, kind, default, meaning in found}


@pytest.mark.parametrize("heading", SECTIONS)
def test_exactly_the_keys_that_the_loader_knows(heading: str) -> None:
    assert set(rows(heading)) == set(SECTIONS[heading][1])


def documented() -> Iterator[tuple[str, str]]:
    for heading, (_, keys, _) in SECTIONS.items():
        yield from ((heading, key) for key in keys if key != "args")


@pytest.mark.parametrize(("heading", "key"), list(documented()))
def test_defaults_are_those_of_the_model(heading: str, key: str) -> None:
    struct, keys, _ = SECTIONS[heading]
    field = next(f for f in msgspec.structs.fields(struct) if f.name == keys[key].field)
    if field.required:
        expected = "required"
    elif field.default in (None, ()):
        expected = "none"
    elif isinstance(field.default, float):
        expected = f"`{field.default:g}`"
    elif isinstance(field.default, tuple):
        expected = f"`{json.dumps(field.default)}`"
    else:
        expected = f"`{json.dumps(str(field.default) if isinstance(field.default, StrEnum) else field.default)}`"
    assert rows(heading)[key][1] == expected


@pytest.mark.parametrize("heading", SECTIONS)
def test_limits_are_those_of_validate(heading: str) -> None:
    _, keys, ranges = SECTIONS[heading]
    for key, spec in keys.items():
        if spec.field in ranges:
            allowed = ranges[spec.field]
            assert f"{allowed.low:.12g} to {allowed.high:.12g}" in rows(heading)[key][2], key


def test_every_range_belongs_to_a_key() -> None:
    for struct, keys, ranges in SECTIONS.values():
        assert set(ranges) <= {spec.field for spec in keys.values()}, struct


def test_words_of_closed_sets_and_placeholders_are_named() -> None:
    for heading, (struct, keys, _) in SECTIONS.items():
        for key, spec in keys.items():
            kind = next((f.type for f in msgspec.structs.fields(struct) if f.name == spec.field), None)
            for word in kind if isinstance(kind, type) and issubclass(kind, StrEnum) else ():
                assert f'"{word}"' in rows(heading)[key][2], (key, word)
    assert set(re.findall(r"^\| `\{([a-z_]+)\}`", DOC, re.MULTILINE)) == set(PLACEHOLDERS)
    for table in filekeys.TENEMENT_TABLES:
        assert f"[{table}" in DOC


def test_every_field_of_the_model_can_be_written_in_a_file() -> None:
    """Otherwise a fleet could hold what no file can say. Names are table names; the rest is made by others."""
    made = {"name", "bundle", "instances", "services", "settings", "routing_listen", "operators", "tenements"}
    for struct, keys, _ in SECTIONS.values():
        known = {spec.field for spec in keys.values()}
        if keys is not filekeys.ROUTING:
            assert set(struct.__struct_fields__) - known <= made, struct
