"""The ledger process: `python -m slum.ledger.process --data-dir D --run-dir R`.

A process of its own, so that no load on the API can stall a commit or an election. It owns the folder Home.state, talks to
the other members if that folder says who it is (identity.py), listens on Home.ledger_socket (0600, peer credentials checked), logs JSON lines to stderr, and ends with
status 0 after SIGTERM. When its files are damaged or its disk fails it ends with status 1, and its last line says what is
wrong and the way out; the keeper may start it again without harm.
"""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import shlex
import signal
import socket
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slum import log
from slum.errors import SlumError
from slum.ledger import identity, joiner
from slum.ledger.links import Links
from slum.ledger.member import Member
from slum.ledger.opening import opened
from slum.ledger.service import Service
from slum.ledger.world import Config, World, real_world
from slum.paths import Home, checked_home

WARNINGS = frozenset(
    {
        "ballast_is_missing",
        "ballast_not_made",
        "ballast_given_up",
        "disk_became_low",
        "torn_frame_was_cut",
        "peer_was_refused",
        "clocks_differ",
        "clock_wrong",
    }
)
JOIN_WAIT_S = 0.1
SWITCH_S = 0.0005
"""So long a thread beside the ledger's (a hash of all rows, a copy) keeps the interpreter when the ledger's wants it."""
OPTIONS = "SLUM_LEDGER_OPTIONS"
"""In the environment: options for when to seal, before those of the command line (tests have small epochs by it)."""
DISK_HINT = "look at its disk, then start again; nothing acknowledged is lost"


def main(arguments: Sequence[str]) -> int:
    """Run until SIGTERM or a failure; return the exit status."""
    home, config = _parse(arguments)
    os.umask(0o077)
    sys.setswitchinterval(SWITCH_S)
    logger = log.start("ledger")
    try:
        me = identity.load(home.state)
        world = real_world(Links(home.state, me, _note)) if me is not None else None
        if me is not None and world is not None:
            _join(home.state, me, config, world)
        with opened(home.state, config, run=secrets.token_hex(8), note=_note, world=world) as member:
            _serve(member, home)
    except (SlumError, OSError, sqlite3.Error) as error:
        hint = error.hint if isinstance(error, SlumError) else DISK_HINT
        logger.error("ledger_failed", error=str(error), hint=hint.replace("DIR", str(home.data)))
        return 1
    logger.info("ledger_stopped")
    return 0


def _join(home: Path, me: identity.Me, config: Config, world: World) -> None:
    """Get the ledger from the members, when this folder was told to join them and has none."""
    wanted = joiner.pending(home)
    if wanted is None:
        return
    joining = joiner.Joiner(home, me, wanted, config, world.net, world.clock)
    _note("joining", cluster=wanted.cluster, members=[member.id for member in wanted.members])
    try:
        while not joining.step(JOIN_WAIT_S):
            pass
    finally:
        joining.close()
    _note("joined", cluster=wanted.cluster)


def _serve(member: Member, home: Home) -> None:
    with _listen(home.ledger_socket) as listening:
        service = Service(member, listening)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        at = member.position
        log.get().info("ledger_started", cluster=at.cluster_id, generation=at.generation, epoch=at.epoch, seq=at.seq)
        # What there is by now stays: the collector need not look at it again and again.
        gc.freeze()
        try:
            service.run()
        finally:
            home.ledger_socket.unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    """Return a listening socket at *path*; bound under another name and renamed, so that it answers once it is there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(fresh))
        os.chmod(fresh, 0o600)
        listening.listen(128)
        listening.setblocking(False)
        fresh.rename(path)
    except OSError:
        listening.close()
        raise
    return listening


def _note(event: str, **fields: Any) -> None:
    (log.get().warning if event in WARNINGS else log.get().info)(event, **fields)


def _parse(arguments: Sequence[str]) -> tuple[Home, Config]:
    default = Config()
    parser = argparse.ArgumentParser(prog="python -m slum.ledger.process", description="The ledger of one member.")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--epoch-entries", type=int, default=default.epoch_entries, help="seal after so many entries")
    parser.add_argument("--epoch-bytes", type=int, default=default.epoch_bytes, help="or so many bytes of journal")
    parser.add_argument("--ballast-bytes", type=int, default=default.ballast_bytes, help="held back for a full disk")
    parser.add_argument("--upgrade-s", type=float, default=default.upgrade_s, help="before a newer protocol is raised")
    given = parser.parse_args([*shlex.split(os.environ.get(OPTIONS, "")), *arguments])
    config = Config(
        epoch_entries=given.epoch_entries,
        epoch_bytes=given.epoch_bytes,
        ballast_bytes=given.ballast_bytes,
        upgrade_s=given.upgrade_s,
    )
    return checked_home(given.data_dir, given.run_dir), config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
