"""What is known of other people's files: well-known images, Dockerfiles, sizes and durations as Docker writes them. Pure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping

import msgspec

COMMANDS: Mapping[str, tuple[str, ...]] = {
    "postgres": ("docker-entrypoint.sh", "postgres"),
    "redis": ("docker-entrypoint.sh", "redis-server"),
    "valkey/valkey": ("docker-entrypoint.sh", "valkey-server"),
    "mysql": ("docker-entrypoint.sh", "mysqld"),
    "mariadb": ("docker-entrypoint.sh", "mariadbd"),
    "mongo": ("docker-entrypoint.sh", "mongod"),
    "rabbitmq": ("docker-entrypoint.sh", "rabbitmq-server"),
    "memcached": ("docker-entrypoint.sh", "memcached"),
    "nginx": ("nginx", "-g", "daemon off;"),
    "caddy": ("caddy", "run", "--config", "/etc/caddy/Caddyfile"),
    "minio/minio": ("minio", "server", "/data"),
    "getmeili/meilisearch": ("/bin/meilisearch",),
}
"""What the image runs by itself, from its page in the registry."""
PORTS: Mapping[str, int] = {
    "postgres": 5432,
    "redis": 6379,
    "valkey/valkey": 6379,
    "mysql": 3306,
    "mariadb": 3306,
    "mongo": 27017,
    "rabbitmq": 5672,
    "memcached": 11211,
    "nginx": 80,
    "caddy": 80,
    "minio/minio": 9000,
    "getmeili/meilisearch": 7700,
}
IGNORED = frozenset(
    [
        "build",
        "image",
        "command",
        "entrypoint",
        "environment",
        "working_dir",
        "runtime",
        "ports",
        "expose",
        "volumes",
        "tmpfs",
        "mem_limit",
        "pids_limit",
        "cpus",
        "cpu_shares",
        "restart",
        "stop_grace_period",
        "healthcheck",
        "secrets",
        "labels",
        "depends_on",
        "read_only",
        "cap_drop",
        "security_opt",
        "init",
        "network_mode",
        "platform",
        "pull_policy",
        "container_name",
        "hostname",
        "networks",
        "tty",
        "stdin_open",
        "deploy",
        "scale",
    ]
)
"""Keys that are read, or that a level of isolation answers for."""
WHY: Mapping[str, str] = {
    "env_file": "the file was not read",
    "privileged": "no level of isolation gives it",
    "cap_add": "no level of isolation gives it",
    "devices": "a service sees no devices",
    "user": "every service has a user of its own",
    "logging": "slum keeps the logs itself",
    "profiles": "a fleet has no profiles; the service was taken",
    "extends": "what it extends was not read",
    "configs": "put the file into `source`",
    "ulimits": "limits are memory_limit_mb, cpu_shares and pids_limit",
    "extra_hosts": "a service uses its machine's names",
    "dns": "a service uses its machine's names",
    "links": "services of a tenement share its loopback",
    "stop_signal": "services are stopped by SIGTERM",
}
_BUILDS = re.compile(r"\b(pip|uv|poetry|npm|pnpm|yarn|bundle|composer|make|go build|cargo build|mix|gradlew?|mvnw?)\b")


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What can be known from somebody's Dockerfile, of its last stage."""

    image: str = ""
    command: tuple[str, ...] = ()
    build: str = ""
    port: int | None = None


def read_foreign_dockerfile(text: str) -> Told:
    """Return the last stage's image, its command, the commands that build the program, and the port it exposes."""
    joined = re.sub(r"\\[ \t]*\r?\n", " ", re.sub(r"^[ \t]*#.*\n?", "", text, flags=re.MULTILINE))
    image, port = "", None
    entry: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    builds: list[str] = []
    stages: dict[str, tuple[str, list[str]]] = {}
    for line in joined.splitlines():
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        match word.upper():
            case "FROM":
                parts = [part for part in rest.split() if not part.startswith("--")] or [""]
                image, before = stages.get(parts[0], (parts[0], []))
                entry, command, builds, port = (), (), list(before), None
                if len(parts) == 3:
                    stages[parts[2]] = (image, builds)
            case "RUN" if _BUILDS.search(rest) and "apt-get" not in rest and "<<" not in rest:
                builds.append(" ".join(part for part in rest.split(" ") if part and not part.startswith("--mount=")))
            case "CMD":
                command = _words(rest)
            case "ENTRYPOINT":
                entry = _words(rest)
            case "EXPOSE" if (found := re.match(r"\d{1,5}", rest)) and 0 < int(found[0]) <= 65535:
                port = int(found[0])
    return Told(image=image, command=(*entry, *command), build=" && ".join(builds)[:4000], port=port)


def _words(text: str) -> tuple[str, ...]:
    if text.startswith("["):
        try:
            return tuple(str(word) for word in json.loads(text))
        except ValueError:
            return ()
    try:
        words = tuple(shlex.split(text))
    except ValueError:
        words = ()
    return ("/bin/sh", "-c", text) if not words or re.search(r"[$&|;<>`]", text) else words


def repository(image: str) -> str:
    """Return the name of *image* without registry of the default hub, tag and digest: "postgres"."""
    name = image.partition("@")[0]
    head, slash, tail = name.rpartition("/")
    name = head + slash + tail.partition(":")[0]
    return name.removeprefix("docker.io/").removeprefix("library/")


def bytes_of(text: str) -> int:
    """Return a size as Docker writes it ("256m", "1.5gb", "1073741824") in bytes; 0 when it is none."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)i?b?", text.strip().lower())
    if found is None:
        return 0
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2] or " "))


def seconds_of(text: str) -> float:
    """Return a duration as Go writes it ("1m30s", "1.5s", "500ms") in seconds; a bare number is seconds."""
    text = text.strip()
    if re.fullmatch(r"[0-9]+(?:\.[0-9]+)?", text):
        return float(text)
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)(h|ms|us|µs|ns|m|s)", text)
    return sum((float(number) * units[unit] for number, unit in parts), 0.0)
