"""The base of slum's data types: immutable, keyword-only msgspec structs that travel as JSON or msgpack as they stand."""

from __future__ import annotations

from typing import dataclass_transform

import msgspec


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """All fields are encoded. The decorator tells type checkers what subclasses inherit."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Sparse(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields that hold their default are left out of the encoding."""
