"""The texts that make a machine's init keep slum's keeper alive: a systemd unit, and a script for inits of the older kind.

Pure: folders and the interpreter go in, text comes out; slum.node.service puts it in place. The keeper is the one unit:
whatever else slum runs are its children. KillMode=process and ExecStop say the same as `slum down`: services live on.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence

from slum.node.keeper_start import LEFT
from slum.paths import Home

USUAL = ("/var/lib/slum", "/run/slum")
"""Root's data and run folder: the slum that has the plain name."""

_UNIT = """\
[Unit]
Description=slum: keeps the services of this machine ({data})
Wants=network-online.target
After=network-online.target local-fs.target
StartLimitIntervalSec=0

[Service]
Type=exec
{environment}
ExecStart={start}
ExecStop={stop}
# The keeper alone is signalled: its children go on, and the next keeper adopts them.
KillMode=process
# It ends by itself, with 0, when `slum down --services` has ended all that it kept. Whoever else ends it gets another one.
Restart=on-failure
SuccessExitStatus={left}
RestartForceExitStatus={left}
RestartSec=300ms
Delegate=yes
DelegateSubgroup=keeper
OOMScoreAdjust=-900
OOMPolicy=continue
LimitNOFILE=524288
TasksMax=infinity
TimeoutStopSec=90

[Install]
WantedBy=multi-user.target
"""

_SCRIPT = """\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          {name}
# Required-Start:    $local_fs $network
# Required-Stop:     $local_fs $network
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: slum: keeps the services of this machine
### END INIT INFO
# Stopping leaves the services running; when the machine goes down, its init ends them.
case "${{1:-}}" in
  start) exec {slum} up ;;
  stop) exec {slum} down ;;
  restart | force-reload) "$0" stop && exec "$0" start ;;
  status) exec {slum} status ;;
  *) echo "usage: $0 start|stop|restart|status" >&2; exit 2 ;;
esac
"""


def unit_name(home: Home) -> str:
    """Return "slum.service", or for other folders than root's usual ones a name that is theirs alone."""
    return f"{_name(home)}.service"


def keeper_unit(home: Home, *, keeper: Sequence[str], env: dict[str, str], slum: Sequence[str]) -> str:
    """Return the unit of *home*'s keeper: *keeper* and *env* are its command (keeperclient.keeper_command), *slum* ours."""
    return _UNIT.format(
        data=home.data,
        environment="\n".join(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(env.items())),
        start=_systemd_line([*keeper, "--wait"]),
        stop=_systemd_line([*slum, *_folders(home), "down"]),
        left=LEFT,
    )


def init_script(home: Home, *, slum: Sequence[str]) -> str:
    """Return a script in the form of /etc/init.d (LSB) that does the same."""
    return _SCRIPT.format(name=_name(home), slum=shlex.join([*slum, *_folders(home)]))


def _name(home: Home) -> str:
    folders = (str(home.data), str(home.run))
    return "slum" if folders == USUAL else f"slum-{hashlib.sha256(' '.join(folders).encode()).hexdigest()[:8]}"


def _folders(home: Home) -> tuple[str, ...]:
    return ("--data-dir", str(home.data), "--run-dir", str(home.run))


def _systemd_line(words: Sequence[str]) -> str:
    """Return a command line; % and $ are special there (systemd.service(5))."""
    return " ".join(_quoted(word).replace("$", "$$") for word in words)


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if not word or any(c in " \t'\"\\;" for c in word) else escaped
