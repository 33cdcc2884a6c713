"""Where slum keeps things on a machine: one data folder, one run folder, and the names inside them.

As root: /var/lib/slum and /run/slum; else the XDG folders. ``SLUM_DATA_DIR`` and ``SLUM_RUN_DIR`` override both. A unix
socket path holds at most 107 bytes, so the run folder may have at most RUN_DIR_BYTES_MAX. Pure: touches no disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slum.errors import ConfigError

RUN_DIR_BYTES_MAX = 26
"""107 less the longest name inside: ``/r/`` + 32 (service) + ``/`` + 40 (id) + ``.sock``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """The two folders of one slum on one machine. *data* survives a reboot, *run* need not.

    *run* and *data* are passable by every uid when root (0711), so that services reach their own folders; whatever is
    private lies in 0700 folders: ``run/p``, ``data/state``, ``data/agent``, ``data/logs``.
    """

    data: Path
    run: Path

    # --- run: sockets and everything that a reboot may forget -------------------------------------------------------
    @property
    def private(self) -> Path:
        return self.run / "p"

    @property
    def api_socket(self) -> Path:
        return self.private / "api.sock"

    @property
    def keeper_socket(self) -> Path:
        return self.private / "keeper.sock"

    @property
    def ledger_socket(self) -> Path:
        return self.private / "ledger.sock"

    @property
    def front_run(self) -> Path:
        """Folder that only the front's own uid may enter, for the one socket that it passes requests on to."""
        return self.run / "a"

    @property
    def front_socket(self) -> Path:
        """Where the server believes what the front says of a client."""
        return self.front_run / "front.sock"

    @property
    def keeper_table(self) -> Path:
        """Folder of one JSON file a child or listener; what the next keeper adopts from."""
        return self.private / "k"

    @property
    def fifos(self) -> Path:
        """Folder of the FIFOs that children write their output to."""
        return self.private / "f"

    @property
    def routes(self) -> Path:
        """Symlinks SERVICE.sock and SERVICE/ID.sock: the only thing the router may see."""
        return self.run / "r"

    @property
    def router(self) -> Path:
        """Folder of the router's own uid: its admin socket, access log and configuration."""
        return self.run / "c"

    def instance_run(self, key: str) -> Path:
        """The folder that holds the sockets of the instance named *key* (see instance_key)."""
        return self.run / "i" / short_key(key)

    def generation_socket(self, key: str, generation: int) -> Path:
        return self.instance_run(key) / f"g{generation}.sock"

    # --- data: survives a reboot ------------------------------------------------------------------------------------
    @property
    def state(self) -> Path:
        """The ledger's folder: state.db, journals, identity; 0700."""
        return self.data / "state"

    @property
    def blobs(self) -> Path:
        return self.state / "blobs"

    @property
    def member_age(self) -> Path:
        """This member's age identity, which opens the authority's key."""
        return self.state / "member.age"

    @property
    def front_key(self) -> Path:
        return self.state / "front.key"

    @property
    def front_certificate(self) -> Path:
        return self.state / "front.crt"

    @property
    def authority_certificate(self) -> Path:
        return self.state / "ca.crt"

    @property
    def front(self) -> Path:
        """The front's own folder: where it listens, its configuration, and copies of what it shows."""
        return self.data / "front"

    @property
    def agent(self) -> Path:
        """The agent's own folder: identity.json, desired.json, uids.json, history; 0700."""
        return self.data / "agent"

    @property
    def identity(self) -> Path:
        return self.agent / "identity.json"

    @property
    def boot(self) -> Path:
        """The children that the keeper starts by itself: boot.json."""
        return self.data / "boot.json"

    @property
    def server_config(self) -> Path:
        """What the control plane here is told beside the fleet: server.toml (docs/backup.md)."""
        return self.data / "server.toml"

    @property
    def backup(self) -> Path:
        """The backup process's own folder: mirror.db, its claim, status.json; 0700."""
        return self.data / "backup"

    @property
    def bundles(self) -> Path:
        return self.data / "bundles"

    @property
    def services(self) -> Path:
        """The default data_dir: SERVICE/ID below it is an instance's own folder."""
        return self.data / "services"

    @property
    def logs(self) -> Path:
        """Folder of SERVICE/ID/current and rotated files, and of _slum/{keeper,agent,server,ledger,router}/current."""
        return self.data / "logs"

    def instance_log(self, service: str, instance: str) -> Path:
        return self.logs / service / instance / "current"

    def own_log(self, program: str) -> Path:
        return self.logs / "_slum" / program / "current"


def short_key(key: str) -> str:
    """Return 12 hex digits that stand for *key* in socket paths."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def find_home(env: Mapping[str, str], uid: int, home: str) -> Home:
    """Return the Home for *uid* with environment *env* and home folder *home*; ConfigError when unusable."""
    if uid == 0:
        data, run = Path("/var/lib/slum"), Path("/run/slum")
    else:
        data = Path(env.get("XDG_DATA_HOME") or f"{home}/.local/share") / "slum"
        runtime = env.get("XDG_RUNTIME_DIR")
        run = Path(runtime) / "slum" if runtime else Path(f"/tmp/slum-{uid}")
        if len(str(run).encode()) > RUN_DIR_BYTES_MAX:
            run = Path(f"/tmp/slum-{uid}")
    return checked_home(Path(env.get("SLUM_DATA_DIR") or data), Path(env.get("SLUM_RUN_DIR") or run))


def checked_home(data: Path, run: Path) -> Home:
    """Return Home(data, run), or raise ConfigError when one is relative or the run folder's name is too long."""
    for what, path in (("data", data), ("run", run)):
        if not path.is_absolute():
            raise ConfigError(f"the {what} folder {str(path)!r} is not an absolute path")
    if len(str(run).encode()) > RUN_DIR_BYTES_MAX:
        raise ConfigError(
            f"the run folder {str(run)!r} is longer than {RUN_DIR_BYTES_MAX} bytes, so socket paths would not fit",
            hint="choose a shorter one with --run-dir or SLUM_RUN_DIR",
        )
    return Home(data=data, run=run)
