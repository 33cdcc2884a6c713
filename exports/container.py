"""A service as a container sees it: the places that replace an instance's folders, its variables, and the way back.

The places are fixed, so that an import can put the placeholders back: DATA is ``{data_dir}``, SOCKET is ``{socket}``.
A program needs no change: it finds its socket in $SOCKET_PATH, its port in $PORT, or a listening descriptor 3, as on a
tenement; which of them is set says how it listens. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import msgspec

from slum.interpolate import interpolate, unknown
from slum.model import EnvVar, Listen, Service

APP = "/app"
DATA = "/data"
RUN = "/run/slum"
SOCKET = f"{RUN}/app.sock"
OWN = ("SLUM_TENEMENT", "SLUM_SERVICE", "SLUM_INSTANCE", "SOCKET_PATH", "PORT", "LISTEN_FDS")
"""Variables that slum itself gives a service."""
_SOCKET_PATH = re.compile(r"\{data_dir\}/(?:[A-Za-z0-9._/-]|\{(?:id|name)\})+")


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, all placeholders filled in."""

    tenement: str
    service: Service
    id: str
    command: tuple[str, ...]
    workdir: str | None
    env: tuple[EnvVar, ...]
    socket: str | None
    """Where it listens inside its container, when that is a socket."""

    @property
    def uses_data(self) -> bool:
        texts = (*self.service.command, self.service.workdir or "", self.service.socket or "")
        return any("{data_dir}" in text for text in (*texts, *(v.value for v in self.service.env)))

    @property
    def own(self) -> dict[str, str]:
        """The variables that say who the instance is and how it listens."""
        found = {"SLUM_TENEMENT": self.tenement, "SLUM_SERVICE": self.service.name, "SLUM_INSTANCE": self.id}
        if self.socket is not None:
            found["SOCKET_PATH"] = self.socket
        if self.service.listen is Listen.FD:
            found["LISTEN_FDS"] = "1"
        if self.service.listen is Listen.PORT:
            found["PORT"] = str(self.service.port)
        return found


def own_socket(service: Service) -> str | None:
    """Return the socket path of the service's own choosing, when a router's file can name it without quoting."""
    return service.socket if service.socket is not None and _SOCKET_PATH.fullmatch(service.socket) else None


def run_of(tenement: str, service: Service, id: str) -> Run:
    """Return instance *id* of *service* as it runs in a container."""

    def fill(text: str, socket: str = SOCKET) -> str:
        return interpolate(text, name=service.name, id=id, data_dir=DATA, socket=socket, port=service.port)

    socket = None
    if service.listen in (Listen.SOCKET, Listen.FD):
        socket = fill(own) if (own := own_socket(service)) is not None else SOCKET
    place = socket or SOCKET
    workdir = None if service.workdir is None else fill(service.workdir, place)
    if workdir is not None and not workdir.startswith("/"):
        workdir = f"{APP}/{workdir}"
    return Run(
        tenement=tenement,
        service=service,
        id=id,
        command=tuple(fill(word, place) for word in service.command),
        workdir=workdir,
        env=tuple(EnvVar(name=v.name, value=fill(v.value, place)) for v in service.env),
        socket=socket,
    )


def as_written(text: str, *, places: Mapping[str, str]) -> str:
    """Return *text* as slum.toml writes it: braces doubled, the folders in *places* as placeholders."""
    escaped = text.replace("{", "{{").replace("}", "}}")
    for place in sorted(places, key=len, reverse=True):
        pattern = rf"(?<![A-Za-z0-9_./-]){re.escape(place)}(?![A-Za-z0-9_.-])"
        escaped = re.sub(pattern, lambda _, place=place: places[place], escaped)  # type: ignore[misc]
    return escaped


def as_one(texts: Sequence[tuple[str, str]]) -> str | None:
    """Return one template that gives each (id, written text), with ``{id}`` where they differ; None if there is none."""
    if len({text for _, text in texts}) == 1:
        return texts[0][1]
    ids = [one for one, _ in texts]
    bodies = [text for _, text in texts]
    ends = tuple(len(body) for body in bodies)
    tried: set[tuple[int, ...]] = set()
    stack: list[tuple[tuple[int, ...], str]] = [((0,) * len(bodies), "")]
    while stack and len(tried) < 100_000:
        at, made = stack.pop()
        if at == ends and not unknown(made):
            return made
        if at in tried:
            continue
        tried.add(at)
        if all(body.startswith(one, n) for body, one, n in zip(bodies, ids, at, strict=True)):
            stack.append((tuple(n + len(one) for n, one in zip(at, ids, strict=True)), made + "{id}"))
        letters = {body[n : n + 1] for body, n in zip(bodies, at, strict=True)}
        if len(letters) == 1 and "" not in letters:
            stack.append((tuple(n + 1 for n in at), made + letters.pop()))
    return None
