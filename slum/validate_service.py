"""The rules for one service on its own: its texts, numbers, and which keys go together. Part of validate; pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from slum.interpolate import placeholders, unknown
from slum.model import ID_PATTERN, Deploy, Level, Listen, Service
from slum.problem import At, Problem, Range, file_key, shown

RANGES: Mapping[str, Range] = {
    "port": Range(low=1, high=65535),
    "drain_timeout_s": Range(low=0, high=3600),
    "startup_timeout_s": Range(low=0.1, high=3600),
    "stop_timeout_s": Range(low=0, high=3600),
    "request_timeout_s": Range(low=0.001, high=86_400),
    "idle_timeout_s": Range(low=1, high=2_592_000),
    "memory_limit_mb": Range(low=1, high=4_194_304),
    "cpu_shares": Range(low=1, high=10_000),
    "pids_limit": Range(low=1, high=4_194_304),
    "storage_quota_mb": Range(low=1, high=16_777_216),
    "memory_mb": Range(low=16, high=4_194_304),
    "vcpus": Range(low=1, high=256),
}
INSTANCES_MAX = 10_000
COMMAND_BYTES_MAX = 64 << 10
ENV_BYTES_MAX = 64 << 10
TEXT_MAX = 4096
PATH_MAX = 1024

LEVEL_KEYS: Mapping[str, frozenset[Level]] = {
    "image": frozenset({Level.SANDBOX, Level.VM}),
    "rootfs": frozenset({Level.SANDBOX, Level.VM}),
    "kernel": frozenset({Level.VM}),
    "memory_mb": frozenset({Level.VM}),
    "vcpus": frozenset({Level.VM}),
}
"""The keys that mean something at some isolation levels only."""

_ID = re.compile(ID_PATTERN)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_RESERVED = re.compile(r"SLUM_.*|LISTEN_(FDS|PID|FDNAMES)|SOCKET_PATH|PORT")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HEALTH = re.compile(r"/[!-~]{0,511}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def check_service(service: Service, at: At) -> Iterator[Problem]:
    """Yield what is wrong with *service*, all but its name and its relations to others; *at* is its place."""
    yield from check_ranges(service, RANGES, at)
    yield from _check_command(service, at)
    yield from _check_ids(service, at)
    yield from _check_paths(service, at)
    yield from _check_environment(service, at)
    yield from _check_listen(service, at)
    yield from _check_level(service, at)


def check_ranges(struct: object, ranges: Mapping[str, Range], at: At) -> Iterator[Problem]:
    for field, allowed in ranges.items():
        value = getattr(struct, field)
        if value is not None and (problem := allowed.problem((*at, file_key(field)), value)):
            yield problem


def check_text(text: str, at: At, limit: int = TEXT_MAX) -> Iterator[Problem]:
    """Yield a problem when *text* is empty, too long, or holds control characters (tab and newline are fine)."""
    if not text.strip():
        yield Problem(at=at, message="is empty")
    elif len(text) > limit:
        yield Problem(at=at, message=f"is longer than {limit:,} characters")
    elif _CONTROL.search(text):
        yield Problem(at=at, message="holds a control character")


def check_path(path: str, at: At) -> Iterator[Problem]:
    yield from check_text(path, at, PATH_MAX)
    if path.startswith("~"):
        yield Problem(at=at, message=f"{shown(path)}: `~` is not expanded; write the whole path")
    elif ".." in path.split("/"):
        yield Problem(at=at, message=f"{shown(path)} leaves its folder by `..`")


def _check_placeholders(service: Service, text: str, at: At) -> Iterator[Problem]:
    for part in unknown(text):
        message = f"{shown(part)} is no placeholder; known are {{name}} {{id}} {{data_dir}} {{socket}} {{port}}"
        yield Problem(at=at, message=f"{message}, and {{{{ }}}} stand for braces")
    used, given = placeholders(text), (*at[:4], "listen")
    if "port" in used and service.listen is not Listen.PORT:
        yield Problem(at=at, message='{port} has a value only with listen = "port"', given=given)
    if "socket" in used and service.listen not in (Listen.SOCKET, Listen.FD):
        yield Problem(at=at, message='{socket} has a value only with listen = "socket" or "fd"', given=given)


def _check_command(service: Service, at: At) -> Iterator[Problem]:
    place = (*at, "command")
    if not service.command or not service.command[0].strip():
        yield Problem(at=place, message="is empty; give the program to run")
    if sum(len(word) + 1 for word in service.command) > COMMAND_BYTES_MAX:
        yield Problem(at=place, message=f"is longer than {COMMAND_BYTES_MAX:,} characters")
        return
    if any("\0" in word for word in service.command):
        yield Problem(at=place, message="holds a NUL character")
    for word in service.command:
        yield from _check_placeholders(service, word, place)
    for key in ("build", "pre_deploy"):
        text = getattr(service, key)
        if text is not None:
            yield from check_text(text, (*at, key))
    if service.build is not None and service.source is None and service.bundle is None:
        yield Problem(at=(*at, "build"), message="needs a `source` to build")


def _check_ids(service: Service, at: At) -> Iterator[Problem]:
    place = (*at, "instances")
    if not service.instances:
        yield Problem(at=place, message="has no ids; leave the entry out for one instance called `main`")
    if len(service.instances) > INSTANCES_MAX:
        yield Problem(at=place, message=f"{len(service.instances):,} ids are more than {INSTANCES_MAX:,}")
        return
    for name in service.instances:
        if not _ID.fullmatch(name):
            yield Problem(at=place, message=f"{shown(name)} is no id: 1 to 40 of a-z, 0-9 and inner dashes")
    yield from repeated(service.instances, place)


def repeated(names: tuple[str, ...], at: At) -> Iterator[Problem]:
    """Yield a problem for each name that stands twice, also when only the case differs."""
    counts = Counter(name.casefold() for name in names)
    for folded, count in counts.items():
        if count > 1:
            same = sorted({name for name in names if name.casefold() == folded})
            how = "is given twice" if len(same) == 1 else "differ only by case"
            yield Problem(at=at, message=f"{' and '.join(map(shown, same))} {how}")


def _check_paths(service: Service, at: At) -> Iterator[Problem]:
    for key in ("workdir", "image", "rootfs", "kernel"):
        path = getattr(service, key)
        if path is not None:
            yield from check_path(path, (*at, key))
    if service.workdir is not None:
        yield from _check_placeholders(service, service.workdir, (*at, "workdir"))
    if service.source is not None:  # where it lies is the client's business; it never reaches a machine's disk
        yield from check_text(service.source, (*at, "source"), PATH_MAX)
        if service.source.startswith("~"):
            yield Problem(at=(*at, "source"), message="`~` is not expanded; write the whole path")
    if service.bundle is not None and not _DIGEST.fullmatch(service.bundle):
        yield Problem(at=(*at, "bundle"), message=f"{shown(service.bundle)} is no sha256 in hex")


def _check_environment(service: Service, at: At) -> Iterator[Problem]:
    total = 0
    for kind, names in (("env", [v.name for v in service.env]), ("secrets", [s.name for s in service.secrets])):
        yield from _check_variables(tuple(names), (*at, kind))
    for name in sorted({v.name for v in service.env} & {s.name for s in service.secrets}):
        yield Problem(at=(*at, "secrets", name), message="is in `env` too; keep one of them")
    for variable in service.env:
        place = (*at, "env", variable.name)
        total += len(variable.name) + len(variable.value.encode(errors="replace")) + 2
        if "\0" in variable.value:
            yield Problem(at=place, message="holds a NUL character")
        yield from _check_placeholders(service, variable.value, place)
    if total > ENV_BYTES_MAX:
        yield Problem(at=(*at, "env"), message=f"is larger than {ENV_BYTES_MAX:,} bytes in all")
    for secret in service.secrets:
        place = (*at, "secrets", secret.name)
        kind, _, where = secret.source.partition(":")
        if kind == "file" and where.startswith("/"):
            yield from check_path(where, place)
        elif not (kind == "env" and _VARIABLE.fullmatch(where)):
            # The text is not shown: people put the secret itself here.
            yield Problem(at=place, message='is neither "file:/absolute/path" nor "env:NAME"')


def _check_variables(names: tuple[str, ...], at: At) -> Iterator[Problem]:
    for name, count in Counter(names).items():
        if not _VARIABLE.fullmatch(name):
            yield Problem(at=(*at, name), message="is no variable name: A-Z, a-z, 0-9 and _, at most 128")
        elif _RESERVED.fullmatch(name):
            yield Problem(at=(*at, name), message="is set by slum itself; choose another name")
        if count > 1:
            yield Problem(at=(*at, name), message="is given twice")


def _check_listen(service: Service, at: At) -> Iterator[Problem]:
    listen, routed = service.listen, service.listen is not Listen.NONE
    on_socket = listen in (Listen.SOCKET, Listen.FD)
    given = (*at, "listen")
    if listen is Listen.PORT and service.port is None:
        yield Problem(at=(*at, "port"), message='listen = "port" needs it', given=given)
    if listen is not Listen.PORT and service.port is not None:
        yield Problem(at=(*at, "port"), message=f'needs listen = "port", but listen is "{listen}"', given=given)
    if listen is Listen.PORT and len(service.instances) > 1:
        yield Problem(
            at=(*at, "port"), message=f"{len(service.instances)} instances cannot share one port", given=given
        )
    if service.deploy is Deploy.OVERLAP and not on_socket:
        yield Problem(
            at=(*at, "deploy"), message='"overlap" needs listen = "socket" or "fd"; use "replace"', given=given
        )
    for key, needs in (("health", routed), ("request_timeout", routed), ("idle_timeout", listen is Listen.FD)):
        field = key if key == "health" else f"{key}_s"
        if getattr(service, field) is not None and not needs:
            wanted = 'listen = "fd"' if key == "idle_timeout" else "a service that listens"
            yield Problem(at=(*at, key), message=f'needs {wanted}, but listen is "{listen}"', given=given)
    if service.health is not None and not _HEALTH.fullmatch(service.health):
        yield Problem(at=(*at, "health"), message=f'{shown(service.health)} is no path such as "/healthz"')
    if service.socket is not None:
        yield from _check_socket(service, (*at, "socket"), on_socket=on_socket)


def _check_socket(service: Service, at: At, *, on_socket: bool) -> Iterator[Problem]:
    """A socket of the service's own: only in its own folder, so that no route can be led to somebody else's."""
    path, given = service.socket or "", (*at[:-1], "listen")
    yield from check_path(path, at)
    yield from _check_placeholders(service, path, at)
    if "{socket}" in path:
        yield Problem(at=at, message="cannot be made from {socket}, which it defines")
    elif not path.startswith("{data_dir}/"):
        yield Problem(at=at, message=f'{shown(path)} must lie in the instance\'s folder: "{{data_dir}}/app.sock"')
    if len(path.encode(errors="replace")) > 80:
        yield Problem(at=at, message="is longer than 80 bytes; a socket's whole path holds 107")
    if not on_socket:
        yield Problem(at=at, message=f'needs listen = "socket" or "fd", but listen is "{service.listen}"', given=given)
    if service.listen is Listen.SOCKET and service.deploy is Deploy.OVERLAP:
        message = 'two generations cannot bind one path; use deploy = "replace", or no `socket`'
        yield Problem(at=at, message=message, given=given)


def _check_level(service: Service, at: At) -> Iterator[Problem]:
    for key, levels in LEVEL_KEYS.items():
        if getattr(service, key) is not None and service.isolation not in levels:
            words = " or ".join(f'"{level}"' for level in Level if level in levels)
            yield Problem(at=(*at, key), message=f'needs isolation = {words}, but isolation is "{service.isolation}"')
    if service.image is not None and service.rootfs is not None:
        yield Problem(at=(*at, "rootfs"), message="is given beside `image`; keep one of them")
