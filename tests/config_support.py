"""Small fleets for the tests of configuration and plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from slum.errors import ConfigError
from slum.fleetfile import Loaded, load

HEAD = """\
[operators.local]
type = "local"
[tenement.here]
operator = "local"
"""
"""Lines 1 to 4 of most files under test."""


def write(folder: Path, text: str, name: str = "slum.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def loaded(folder: Path, text: str) -> Loaded:
    return load(write(folder, text))


def problems(folder: Path, text: str) -> tuple[str, ...]:
    """Return the problems of a slum.toml with *text*, without the folder's name."""
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text))
    lines = caught.value.problems
    assert caught.value.message == f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return tuple(line.replace(f"{folder}/", "") for line in lines)
