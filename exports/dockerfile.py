"""The Dockerfile of a service, and reading it back.

slum runs a service on its machine's own programs, so a Dockerfile has to choose an image: by the program that the command
names, and it says so. Two small scripts keep the service's contract: `slum-entry` gives it secrets as variables, a fresh
socket or a listening descriptor 3; `slum-health` asks as slum's own probe does. They need sh and perl, which every Debian
image has. Nothing of a fleet is ever part of a shell word: texts go in as JSON, or not at all. Pure.
"""

from __future__ import annotations

import json
import re
import shlex
from posixpath import basename

import msgspec

from slum.exports.container import APP, DATA, RUN
from slum.model import Service

UID = 10001
PROGRAMS = {
    "python": "python:3.13-slim-bookworm",
    "uv": "ghcr.io/astral-sh/uv:python3.13-bookworm-slim",
    "node": "node:22-bookworm-slim",
    "npm": "node:22-bookworm-slim",
    "ruby": "ruby:3.4-slim-bookworm",
    "bundle": "ruby:3.4-slim-bookworm",
    "php": "php:8.4-cli-bookworm",
    "java": "eclipse-temurin:21-jre",
    "perl": "perl:5.40-slim-bookworm",
    "redis-server": "redis:7-bookworm",
    "postgres": "postgres:17-bookworm",
    "nginx": "nginx:1.28-bookworm",
}
OTHERWISE = "debian:bookworm-slim"
GUESSED = "# The machine's own programs are not in an image; this one was chosen by the command. Change it as needed."

ENTRY = r"""#!/bin/sh
# Starts the program as slum does: secrets as variables, and either a free $SOCKET_PATH or descriptor 3 listening.
set -eu
tcp=$1; shift
for file in /run/secrets/*; do
  [ -f "$file" ] && export "${file##*/}=$(cat "$file")"
done
[ -z "${FLY_PROCESS_GROUP:-}" ] || export SLUM_SERVICE="$FLY_PROCESS_GROUP"
[ -z "${SOCKET_PATH:-}" ] || rm -f "$SOCKET_PATH"
case "$tcp" in
  -) ;;
  *:*)
    if [ "${FLY_PROCESS_GROUP:-}" = "${tcp#*:}" ]; then tcp=${tcp%%:*}; else tcp=-; unset LISTEN_FDS SOCKET_PATH PORT; fi ;;
esac
if [ -n "${LISTEN_FDS:-}" ]; then
  exec perl -Mstrict -MSocket=:all -e '
    $^F = 3;
    my $tcp = shift; my $s;
    if ($tcp eq "-") {
      socket($s, PF_UNIX, SOCK_STREAM, 0) && bind($s, pack_sockaddr_un($ENV{SOCKET_PATH})) or die "socket: $!";
      chmod 0666, $ENV{SOCKET_PATH};
    } else {
      socket($s, PF_INET6, SOCK_STREAM, 0) && setsockopt($s, SOL_SOCKET, SO_REUSEADDR, 1)
        && setsockopt($s, IPPROTO_IPV6, IPV6_V6ONLY, 0)
        && bind($s, pack_sockaddr_in6($tcp, IN6ADDR_ANY)) or die "socket: $!";
    }
    listen($s, 4096) or die "listen: $!";
    if (fileno($s) != 3) { require POSIX; POSIX::dup2(fileno($s), 3) or die "dup2: $!"; }
    $ENV{LISTEN_PID} = $$;
    exec { $ARGV[0] } @ARGV or die "$ARGV[0]: $!\n";
  ' -- "$tcp" "$@"
fi
if [ "$tcp" != - ]; then
  if [ -n "${SOCKET_PATH:-}" ]; then to="UNIX-CONNECT:$SOCKET_PATH"; else to="TCP:127.0.0.1:$PORT"; fi
  socat "TCP6-LISTEN:$tcp,ipv6only=0,reuseaddr,fork,backlog=4096" "$to" &
fi
exec "$@"
"""

HEALTH = r"""#!/usr/bin/perl
# Healthy: the service accepts a connection and, when a path is given, answers it with 2xx or 3xx.
use strict; use warnings; use IO::Socket::INET; use IO::Socket::UNIX;
alarm 5;
my $s = $ENV{PORT} ? IO::Socket::INET->new(PeerAddr => "127.0.0.1:$ENV{PORT}")
                   : IO::Socket::UNIX->new(Peer => $ENV{SOCKET_PATH});
$s or die "no connection: $!\n";
exit 0 unless @ARGV;
print $s "GET $ARGV[0] HTTP/1.1\r\nHost: localhost\r\nUser-Agent: slum-health\r\nConnection: close\r\n\r\n";
my $line = <$s> // ""; $line =~ s/\s+$//;
exit 0 if $line =~ m{^HTTP/1\.[01] [23]\d\d};
die "answered: $line\n";
"""

_REFERENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,254}")


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What a Dockerfile of ours says of its service."""

    image: str | None
    build: str | None
    has_source: bool
    context: str | None
    """The folder that is copied, when the file names it."""


def image_of(service: Service) -> str | None:
    """Return the image that *service* names, when that is a reference an engine can read."""
    return service.image if service.image is not None and _REFERENCE.fullmatch(service.image) else None


def base_image(service: Service) -> str:
    """Return the image to build on: the service's, or the likeliest for its command."""
    image = image_of(service)
    if image is not None:
        return image
    program = basename(service.command[0])
    bare = re.sub(r"[0-9.]+$", "", program)
    in_venv = ".venv/bin/" in service.command[0] or "venv" in (service.build or "")
    return PROGRAMS.get(program) or PROGRAMS.get(bare) or (PROGRAMS["python"] if in_venv else OTHERWISE)


def dockerfile(service: Service, *, copy: str | None, context: str | None, tcp: str = "-") -> str:
    """Return the Dockerfile of *service*.

    *copy* is what stands before the two dots of COPY ("" or "--from=source "), None without a source; *context* is
    named for the reader; *tcp* is the port that `slum-entry` serves on, "-" for none, PORT:GROUP for one process group.
    """
    lines = ["# syntax=docker/dockerfile:1"]
    if context is not None:
        lines.append(f"# context: {json.dumps(context)}")
    if image_of(service) is None:
        lines.append(GUESSED)
    lines += [f"FROM {base_image(service)}", "USER root"]
    if tcp != "-":
        packages = "apt-get install -y --no-install-recommends socat perl-base && rm -rf /var/lib/apt/lists/*"
        lines.append(f"RUN apt-get update && {packages}")
    lines += ["COPY --chmod=755 <<'SLUM_ENTRY' /usr/local/bin/slum-entry", ENTRY.rstrip("\n"), "SLUM_ENTRY"]
    lines += ["COPY --chmod=755 <<'SLUM_HEALTH' /usr/local/bin/slum-health", HEALTH.rstrip("\n"), "SLUM_HEALTH"]
    lines.append(
        f"RUN mkdir -p {APP} {DATA} {RUN} && chown {UID}:{UID} {APP} {DATA} {RUN} && chmod 1777 {RUN} && chmod 711 {DATA}"
    )
    lines += [f"ENV HOME={DATA}", f"WORKDIR {APP}", f"USER {UID}:{UID}"]
    if copy is not None:
        lines.append(f"COPY {copy}--chown={UID}:{UID} . .")
    if service.build is not None:
        lines.append(f"RUN {exec_form(('/bin/sh', '-c', service.build))}")
    lines.append(f"ENTRYPOINT {exec_form(('slum-entry', tcp))}")
    return "\n".join(lines) + "\n"


def exec_form(words: tuple[str, ...]) -> str:
    """Return *words* as a JSON array on one line: no shell, no line end, no variable inside it is looked at."""
    return json.dumps(list(words), ensure_ascii=True).replace("<", "\\u003c")


def read_dockerfile(text: str) -> Recipe | None:
    """Return what a Dockerfile that dockerfile() wrote says; None when it is somebody else's."""
    if "<<'SLUM_ENTRY' /usr/local/bin/slum-entry" not in text:
        return None
    bare = re.sub(r"<<'(SLUM_\w+)'.*?\n\1\n", "\n", text, flags=re.DOTALL)
    image = re.search(r"^FROM (\S+)$", bare, re.MULTILINE)
    build = re.search(r'^RUN (\["/bin/sh", "-c", .*\])$', bare, re.MULTILINE)
    context = re.search(r"^# context: (.*)$", bare, re.MULTILINE)
    return Recipe(
        image=None if GUESSED in text or image is None else image[1],
        build=None if build is None else str(json.loads(build[1])[2]),
        has_source=re.search(r"^COPY .*\. \.$", bare, re.MULTILINE) is not None,
        context=None if context is None else str(json.loads(context[1])),
    )


def shell_line(words: tuple[str, ...]) -> str:
    """Return *words* as one line that a POSIX shell, and every shlex, splits back into them."""
    return shlex.join(words)
