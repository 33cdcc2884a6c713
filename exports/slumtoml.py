"""A fleet as slum.toml, the way a person would write it: what holds its default is left out. Pure.

load() of the text gives the same fleet; a property test holds it to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import tomli_w

from slum import filekeys
from slum.exports.tomltext import tidy
from slum.filekeys import KeySpec
from slum.model import (
    DEFAULT_ID,
    Deploy,
    EnvVar,
    Fleet,
    JoinOperator,
    Label,
    Listen,
    LocalOperator,
    Operator,
    Secret,
    Service,
    SshHost,
    Tenement,
    operator_type,
)

Toml = dict[str, Any]


def slum_toml(fleet: Fleet) -> str:
    """Return the text of a slum.toml that declares *fleet*, services inline."""
    document: Toml = {}
    own = _keys(fleet, filekeys.FLEET)
    if own:
        document["fleet"] = own
    if fleet.operators:
        document["operators"] = {operator.name: _operator(operator) for operator in fleet.operators}
    if fleet.tenements:
        document["tenement"] = {tenement.name: _tenement(tenement) for tenement in fleet.tenements}
    return tidy(tomli_w.dumps(document))


def _operator(operator: Operator) -> Toml:
    kind = operator_type(operator)
    return {"type": kind} | (
        {}
        if isinstance(operator, JoinOperator) or (isinstance(operator, LocalOperator) and not operator.member)
        else _keys(operator, filekeys.OPERATORS[kind][1])
    )


def _tenement(tenement: Tenement) -> Toml:
    plain = msgspec.structs.replace(tenement, config=None)
    document = _keys(plain, filekeys.TENEMENT)
    if settings := _keys(tenement.settings, filekeys.SETTINGS):
        document["settings"] = settings
    if routing := _keys(tenement, filekeys.ROUTING):
        document["routing"] = routing
    instances = {s.name: list(s.instances) for s in tenement.services if s.instances != (DEFAULT_ID,)}
    if instances:
        document["instances"] = instances
    if tenement.services:
        document["service"] = {service.name: _service(service) for service in tenement.services}
    return document


def _service(service: Service) -> Toml:
    document = _keys(service, filekeys.SERVICE)
    usual = Deploy.OVERLAP
    if service.listen in (Listen.PORT, Listen.NONE) or (service.listen is Listen.SOCKET and service.socket is not None):
        usual = Deploy.REPLACE
    if service.deploy is usual:
        document.pop("deploy", None)
    else:
        document["deploy"] = str(service.deploy)
    return document


def _keys(struct: msgspec.Struct, keys: Mapping[str, KeySpec]) -> Toml:
    """Return the keys of *struct* that do not hold their default, as TOML values."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(struct)}
    found: Toml = {}
    for key, spec in keys.items():
        if spec.field in defaults and (value := getattr(struct, spec.field)) != defaults[spec.field]:
            found[key] = _value(value)
    return found


def _value(value: Any) -> Any:
    if isinstance(value, tuple):
        if value and isinstance(value[0], EnvVar | Label):
            return {item.name: item.value for item in value}
        if value and isinstance(value[0], Secret):
            return {item.name: item.source for item in value}
        return [_value(item) for item in value]
    if isinstance(value, SshHost):
        return _keys(value, filekeys.SSH_HOST)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, str) else value
