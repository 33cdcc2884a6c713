"""Which exports and imports there are: two explicit tables."""

from __future__ import annotations

from collections.abc import Mapping

from slum.exports.base import Export, Import
from slum.exports.compose import export_compose
from slum.exports.compose_import import import_compose
from slum.exports.fly_import import import_fly
from slum.exports.flytoml import export_fly
from slum.exports.terraform import export_terraform

EXPORTS: Mapping[str, Export] = {"fly": export_fly, "terraform": export_terraform, "compose": export_compose}
IMPORTS: Mapping[str, Import] = {"fly": import_fly, "compose": import_compose}
