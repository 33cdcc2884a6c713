"""What changed from one fleet to the next, for the audit trail: pure, ordered, equal for equal inputs.

Values of environment variables appear as digests only. For what people see before an apply there is slum.plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from slum.model import EnvVar, Fleet, Operator, Secret, Service, Tenement, operator_type

FEW = 10


class Change(NamedTuple):
    """One change: *kind* is an event's kind, *subject* what it is about, *where* the tenement of a service."""

    kind: str
    subject: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    where: str = ""


def diff_fleets(before: Fleet, after: Fleet) -> tuple[Change, ...]:
    """Return every change: operators, then tenements, each followed by its services, by name."""
    return (*_diff_operators(before, after), *_diff_tenements(before, after))


def summary(changes: tuple[Change, ...]) -> str:
    """Return one line: "2 services added, 1 changed; 1 tenement removed", or "no change"."""
    parts = []
    for noun in ("service", "tenement", "operator"):
        counts = {verb: sum(c.kind == f"{noun}_{verb}" for c in changes) for verb in ("added", "changed", "removed")}
        said = [f"{count} {verb}" for verb, count in counts.items() if count]
        if said:
            number, rest = said[0].split(" ", 1)
            said[0] = f"{number} {noun if number == '1' else noun + 's'} {rest}"
            parts.append(", ".join(said))
    return "; ".join(parts) or "no change"


def describe(kind: str, subject: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
    """Return a change in words, one line a field: "changed service notes.memory_limit_mb 256 -> 512"."""
    what = subject.replace(":", " ", 1)
    verb = kind.rpartition("_")[2]
    if verb != "changed":
        return [f"{verb} {what}"]
    before, after = before or {}, after or {}
    fields = [name for name in {**before, **after} if name != "tenement"]
    if not fields or "too_large" in fields:
        return [f"changed {what}"]
    return [f"changed {what}.{name} {_word(before.get(name))} -> {_word(after.get(name))}" for name in fields]


def _diff_operators(before: Fleet, after: Fleet) -> Iterator[Change]:
    old, new = ({operator.name: operator for operator in fleet.operators} for fleet in (before, after))
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was != now:
            yield _change("operator", name, _operator(was), _operator(now))


def _diff_tenements(before: Fleet, after: Fleet) -> Iterator[Change]:
    old, new = ({tenement.name: tenement for tenement in fleet.tenements} for fleet in (before, after))
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        bare_was, bare_now = _tenement(was), _tenement(now)
        if bare_was != bare_now:
            yield _change("tenement", name, bare_was, bare_now)
        yield from _diff_services(name, was, now)


def _diff_services(tenement: str, before: Tenement | None, after: Tenement | None) -> Iterator[Change]:
    old, new = ({service.name: service for service in t.services} if t else {} for t in (before, after))
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if was is None or now is None:
            kind, service = ("added", now) if now is not None else ("removed", was)
            body = _brief(tenement, service) if service is not None else None
            yield Change(
                f"service_{kind}",
                f"service:{name}",
                body if kind == "removed" else None,
                body if kind == "added" else None,
                tenement,
            )
        else:
            yield _change("service", name, _service(was), _service(now), tenement)


def _change(
    noun: str, name: str, before: dict[str, Any] | None, after: dict[str, Any] | None, where: str = ""
) -> Change:
    """Return the change of one thing; of one that stays, only the fields that differ."""
    verb = "added" if before is None else "removed" if after is None else "changed"
    if before is not None and after is not None:
        differ = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
        before = {key: before.get(key) for key in differ}
        after = {key: after.get(key) for key in differ}
        if where:
            before, after = {"tenement": where} | before, {"tenement": where} | after
    return Change(f"{noun}_{verb}", f"{noun}:{name}", before, after, where)


def _operator(operator: Operator | None) -> dict[str, Any] | None:
    if operator is None:
        return None
    fields: dict[str, Any] = {"type": operator_type(operator), **msgspec.to_builtins(operator)}
    return {key: value for key, value in fields.items() if key != "name"}


def _tenement(tenement: Tenement | None) -> dict[str, Any] | None:
    if tenement is None:
        return None
    fields = {name: getattr(tenement, name) for name in Tenement.__struct_fields__ if name not in ("name", "services")}
    fields["settings"] = msgspec.to_builtins(tenement.settings)
    fields["labels"] = {label.name: label.value for label in tenement.labels}
    return fields


def _brief(tenement: str, service: Service) -> dict[str, Any]:
    """What an added or removed service was; the whole is in the revision."""
    ids = list(service.instances)
    return {
        "tenement": tenement,
        "isolation": str(service.isolation),
        "command": list(service.command),
        "instances": ids if len(ids) <= FEW else len(ids),
    }


def _service(service: Service) -> dict[str, Any]:
    return {name: _plain(getattr(service, name)) for name in Service.__struct_fields__ if name != "name"}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        if value and isinstance(value[0], EnvVar):
            return {e.name: "sha256:" + hashlib.sha256(e.value.encode()).hexdigest()[:12] for e in value}
        if value and isinstance(value[0], Secret):
            return {secret.name: secret.source for secret in value}
        return list(value)
    return value


def _word(value: Any) -> str:
    if value is None:
        return "none"
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 60 else text[:57] + "..."
