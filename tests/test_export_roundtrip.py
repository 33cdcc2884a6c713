"""A fleet exported and read back is the fleet, but for what the export said it cannot say; hostile texts included."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from exports_support import fleets, too_wide, uncovered
from hypothesis import HealthCheck, given, settings

from slum import tomlfile
from slum.exports.base import Loss, Site
from slum.exports.registry import EXPORTS, IMPORTS
from slum.exports.slumtoml import slum_toml
from slum.fleetfile import load_document
from slum.model import Fleet
from slum.validate import check_fleet

QUICK = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@pytest.mark.parametrize("name", IMPORTS)
def test_what_comes_back_is_the_fleet_minus_its_losses(name: str) -> None:
    @QUICK
    @given(fleets())
    def check(fleet: Fleet) -> None:
        rendered = EXPORTS[name](fleet, Site())
        back = IMPORTS[name]({file.path: file.text for file in rendered.files if not file.path.endswith(".md")})
        assert uncovered(fleet, back.fleet, rendered.losses) == {}
        assert too_wide(fleet, rendered.losses) == []
        assert check_fleet(back.fleet) == ()

    check()


@QUICK
@given(fleets())
def test_the_same_fleet_gives_the_same_bytes(fleet: Fleet) -> None:
    for name, export in EXPORTS.items():
        assert export(fleet, Site()) == export(fleet, Site()), name


@QUICK
@given(fleets())
def test_compose_of_what_came_back_is_the_same_compose(fleet: Fleet) -> None:
    def files(one: Fleet) -> dict[str, str]:
        found = EXPORTS["compose"](one, Site()).files
        return {file.path: file.text for file in found if not file.path.endswith(".md")}

    once = files(fleet)
    assert files(IMPORTS["compose"](once).fleet) == once


@QUICK
@given(fleets())
def test_every_path_stays_below_the_folder_and_is_told_once(fleet: Fleet) -> None:
    for export in EXPORTS.values():
        paths = [file.path for file in export(fleet, Site()).files]
        assert len(set(paths)) == len(paths)
        assert not any(path.startswith("/") or ".." in path.split("/") for path in paths)


@QUICK
@given(fleets())
def test_slum_toml_of_a_fleet_declares_that_fleet(fleet: Fleet) -> None:
    text = slum_toml(fleet)
    try:
        document = tomlfile.parse(text.encode(), "slum.toml", Path("/nonexistent"))
    except Exception:
        print(text)
        raise
    stripped = _without_sources(fleet)
    assert (
        load_document(tomlfile.parse(slum_toml(stripped).encode(), "slum.toml", Path("/nonexistent"))).fleet == stripped
    )
    assert document.data


def _without_sources(fleet: Fleet) -> Fleet:
    """Sources are looked for on disk; a build needs one."""
    import msgspec

    replace = msgspec.structs.replace
    return replace(
        fleet,
        tenements=tuple(
            replace(t, services=tuple(replace(s, source=None, build=None) for s in t.services)) for t in fleet.tenements
        ),
    )


DOC = (Path(__file__).resolve().parents[1] / "docs" / "exports.md").read_text()
COLUMNS = ("fly", "terraform", "compose")


def kind(loss: Loss) -> str:
    """Return the place of *loss* without names: ``service.deploy``, ``operators.org``, ``tenement.settings.data_dir``."""
    first, *rest = loss.path.split(".")
    if first == "fleet":
        return loss.path
    if first == "tenement" and len(rest) > 2 and rest[1] == "service":
        return f"service.{rest[3]}"
    return ".".join([first, *rest[1:]])


@QUICK
@given(fleets())
def test_every_loss_is_in_the_manual(fleet: Fleet) -> None:
    rows = {row[1]: row[0].split(" | ")[1:] for row in re.finditer(r"^\| `([a-z_.]+)` \|.*\|$", DOC, re.MULTILINE)}
    for name, export in EXPORTS.items():
        for loss in export(fleet, Site()).losses:
            assert "loss" in rows[kind(loss)][COLUMNS.index(name)], (name, loss)
            assert loss.why
