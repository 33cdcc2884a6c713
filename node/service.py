"""Making a machine's keeper run, now and after a reboot: a systemd unit where systemd is the init, else in the background.

``start`` is what `slum join` and `slum up` on a node do. Without systemd, or not as root, nothing here starts slum after a
reboot, and ``Started`` says so: units.init_script is the text for an init of another kind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from slum import units
from slum.errors import SlumError, Unreachable
from slum.frozen import Frozen
from slum.node import boot
from slum.node.keeperclient import call, keeper_command
from slum.node.types import Spawn
from slum.paths import Home

SYSTEMD = Path("/run/systemd/system")
UNITS = Path("/etc/systemd/system")
SYSTEMCTL_S = 60.0
START_S = 20.0
POLL_S = 0.05


class Started(Frozen):
    """How a machine's programs run."""

    started: tuple[str, ...]
    """Those that this call started."""
    unit: str = ""
    """The systemd unit that keeps them, also after a reboot; empty when nothing does."""


def start(home: Home, programs: Sequence[Spawn], *, installing: bool) -> Started:
    """Make a keeper run that keeps *programs* alive, by its unit if there is one; finds what runs. May be repeated.

    With *installing* the unit is made where systemd is ours to command.
    """
    boot.check_keeper(home)
    boot.write_boot(home, programs)
    unit = install(home) if can_install() and (installing or is_installed(home)) else ""
    if not unit:
        _, started, _ = boot.start(home, programs)
        return Started(started=started)
    before = boot.running(home, {one.name for one in programs})
    _systemctl("start", unit)
    _hand_over(home, unit)
    for one in programs:
        boot.spawn(home, one)
    return Started(started=tuple(one.name for one in programs if one.name not in before), unit=unit)


def can_install() -> bool:
    """Tell whether systemd is this machine's init, and ours to command."""
    return SYSTEMD.is_dir() and os.geteuid() == 0


def is_installed(home: Home) -> bool:
    return (UNITS / units.unit_name(home)).exists()


def install(home: Home) -> str:
    """Have the keeper's unit in place and enabled, and return its name."""
    name = units.unit_name(home)
    keeper, env = keeper_command(home)
    text = units.keeper_unit(home, keeper=keeper, env=env, slum=slum_command())
    file = UNITS / name
    try:
        if not file.exists() or file.read_text() != text:
            unfinished = file.with_name(f".{name}.new")
            unfinished.write_text(text)
            unfinished.chmod(0o644)
            unfinished.rename(file)
            _systemctl("daemon-reload")
    except OSError as error:
        raise SlumError(f"the unit {file} cannot be written: {error.strerror}") from error
    _systemctl("enable", "--quiet", name)
    return name


def retire(home: Home) -> None:
    """Have nothing of slum started here after a reboot any more, where a unit does that; what runs goes on."""
    if can_install() and is_installed(home):
        _systemctl("disable", "--quiet", units.unit_name(home))


def slum_command() -> tuple[str, ...]:
    """Return the command that is this slum, whatever PATH says."""
    return (sys.executable, "-P", "-m", "slum.cli.main")


def _hand_over(home: Home, unit: str) -> None:
    """Let the unit's keeper take over from one that runs already, outside of it; children and sockets stay."""
    end = time.monotonic() + START_S
    while True:
        wanted = int(_systemctl("show", "--property=MainPID", "--value", unit).strip() or 0)
        try:
            pid = int(call(home, "hello")["pid"])
        except Unreachable:
            pid = 0
        if pid and pid == wanted:
            return
        if time.monotonic() > end:
            raise SlumError(f"the keeper of {unit} does not come up", hint=f"journalctl -u {unit}")
        if pid and wanted:
            os.kill(pid, signal.SIGTERM)
        time.sleep(POLL_S)


def _systemctl(*words: str) -> str:
    try:
        done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=SYSTEMCTL_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise SlumError(f"systemctl {words[0]} does not work: {error}") from error
    if done.returncode:
        raise SlumError(f"systemctl {' '.join(words)}: {done.stderr.strip() or f'exit {done.returncode}'}")
    return done.stdout
