"""The rules for operators: what goes to ssh and to the providers as a name, host or path. Part of validate; pure.

Strict on purpose: these texts become arguments and URLs, so a leading dash or a slash is refused here, once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from slum.model import FlyOperator, HetznerOperator, HostKeyPolicy, LocalOperator, Operator, SshHost, SshOperator
from slum.problem import At, Problem, Range, shown
from slum.validate_service import check_path, check_ranges

HOSTS_MAX = 1000
FLY_RANGES: Mapping[str, Range] = {
    "cpus": Range(low=1, high=64),
    "memory_mb": Range(low=256, high=1_048_576),
    "volume_gb": Range(low=1, high=500),
}
HOST_RANGES: Mapping[str, Range] = {"port": Range(low=1, high=65535)}
CPU_KINDS = ("shared", "performance")

_WORD = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,62}[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:.]{2,45}(?:%[A-Za-z0-9_.-]{1,15})?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_JUMP = re.compile(
    rf"(?:(?:{_USER.pattern})@)?(?:{_WORD.pattern}|[A-Za-z0-9][A-Za-z0-9.-]{{0,251}}|\[[0-9a-fA-F:]+\])(?::\d{{1,5}})?"
)
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}=?")
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,254}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SECRETS_REF = re.compile(r"(?:file:/|env:[A-Za-z_]|[A-Za-z0-9]+://)[^\s\x00]{0,500}")
_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")


def check_operator(operator: Operator, at: At) -> Iterator[Problem]:
    """Yield what is wrong with *operator*, all but its name; *at* is its place."""
    match operator:
        case LocalOperator(member=member):
            yield from _matches(_WORD, member, (*at, "member"), "is no member id")
        case SshOperator():
            yield from _check_ssh(operator, at)
        case FlyOperator():
            yield from _check_fly(operator, at)
        case HetznerOperator():
            yield from _check_hetzner(operator, at)


def check_labels(labels: tuple[tuple[str, str], ...], at: At) -> Iterator[Problem]:
    """Yield what is wrong with labels given as (name, value)."""
    for name, count in Counter(name for name, _ in labels).items():
        if not _LABEL.fullmatch(name):
            yield Problem(at=(*at, name), message="is no label: 1 to 63 of letters, digits, `.`, `_`, `/` and `-`")
        if count > 1:
            yield Problem(at=(*at, name), message="is given twice")
    for name, value in labels:
        if value and not _LABEL.fullmatch(value):  # the providers' common subset
            message = f"{shown(value)} is no label value: at most 63 of letters, digits, `.`, `_`, `/` and `-`"
            yield Problem(at=(*at, name), message=message)


def _matches(pattern: re.Pattern[str], text: str | None, at: At, otherwise: str) -> Iterator[Problem]:
    if text is not None and not pattern.fullmatch(text):
        yield Problem(at=at, message=f"{shown(text)} {otherwise}")


def _check_ssh(operator: SshOperator, at: At) -> Iterator[Problem]:
    if not 1 <= len(operator.hosts) <= HOSTS_MAX:
        yield Problem(at=(*at, "hosts"), message=f"{len(operator.hosts):,} hosts are not between 1 and {HOSTS_MAX:,}")
        return
    yield from _matches(_USER, operator.user, (*at, "user"), "is no user name")
    yield from _matches(_JUMP, operator.jump, (*at, "jump"), "is not user@host:port")
    yield from _matches(
        _FINGERPRINT, operator.jump_fingerprint, (*at, "jump_fingerprint"), "is no fingerprint such as SHA256:..."
    )
    if operator.host_key is HostKeyPolicy.PINNED and operator.jump and not operator.jump_fingerprint:
        yield Problem(at=(*at, "jump"), message='has no jump_fingerprint, which host_key = "pinned" needs')
    for key in ("key", "known_hosts"):
        path = getattr(operator, key)
        if path is not None:
            yield from check_path(path, (*at, key))
            if not path.startswith(("/", "~")):
                yield Problem(at=(*at, key), message=f"{shown(path)} is not an absolute path")
    for number, host in enumerate(operator.hosts):
        yield from _check_host(host, (*at, "hosts", number), pinned=operator.host_key is HostKeyPolicy.PINNED)
    for (name, port), count in Counter((h.host.lower(), h.port) for h in operator.hosts).items():
        if count > 1:
            yield Problem(at=(*at, "hosts"), message=f"{shown(name)} port {port} is given twice")


def _check_host(host: SshHost, at: At, *, pinned: bool) -> Iterator[Problem]:
    yield from _matches(_HOST, host.host, at, "is no host name or address")
    yield from _matches(_USER, host.user, at, "is no user name")
    yield from _matches(_FINGERPRINT, host.fingerprint, at, "is no fingerprint such as SHA256:...")
    yield from check_ranges(host, HOST_RANGES, at)
    yield from check_labels(tuple((label.name, label.value) for label in host.labels), (*at, "labels"))
    if pinned and host.fingerprint is None:
        yield Problem(at=at, message=f'{shown(host.host)} has no fingerprint, which host_key = "pinned" needs')


def _check_fly(operator: FlyOperator, at: At) -> Iterator[Problem]:
    yield from check_ranges(operator, FLY_RANGES, at)
    yield from _matches(_WORD, operator.org, (*at, "org"), "is no Fly organisation slug")
    yield from _matches(re.compile(r"[a-z]{3}"), operator.region, (*at, "region"), 'is no Fly region such as "iad"')
    yield from _matches(_IMAGE, operator.image, (*at, "image"), "is no image name")
    if operator.cpu_kind not in CPU_KINDS:
        yield Problem(at=(*at, "cpu_kind"), message=f"{shown(operator.cpu_kind)} is none of {', '.join(CPU_KINDS)}")
    yield from _check_token(operator, at)


def _check_hetzner(operator: HetznerOperator, at: At) -> Iterator[Problem]:
    yield from _matches(_WORD, operator.location, (*at, "location"), 'is no location such as "fsn1"')
    yield from _matches(_WORD, operator.server_type, (*at, "server_type"), 'is no server type such as "cx23"')
    yield from _matches(_IMAGE, operator.image, (*at, "image"), "is no image name")
    for number, key in enumerate(operator.ssh_keys):
        if not key.strip() or len(key) > 255 or not key.isprintable():
            yield Problem(at=(*at, "ssh_keys", number), message=f"{shown(key)} is no name of an SSH key")
    yield from _check_token(operator, at)


def _check_token(operator: FlyOperator | HetznerOperator, at: At) -> Iterator[Problem]:
    if not _ENV_NAME.fullmatch(operator.token_env):  # the text is not shown: people put the token itself here
        yield Problem(at=(*at, "token_env"), message="is not the name of an environment variable")
    if operator.secrets_ref is not None and not _SECRETS_REF.fullmatch(operator.secrets_ref):
        yield Problem(at=(*at, "secrets_ref"), message='is no reference such as "file:/abs" or "env:NAME"')
