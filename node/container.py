"""The first process of a node's container: ``python -m slum.node.container``. It joins once, then minds the keeper.

Where to join is said by the environment (SLUM_SERVER, SLUM_MACHINE, and the token by SLUM_JOIN_TOKEN or SLUM_JOIN_TOKEN_FILE).
Joining is the command's, which then becomes this module's second half (``become``): started without any of that, so that no
process of the machine shows the token, and without the megabytes that joining took. That half starts the keeper, again if
it ends, reaps what is orphaned, and at SIGTERM ends services before itself: nothing lives on in a container that stops.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import Any

    from slum.paths import Home

WAIT_S = 30 * 86400.0
"""A machine that cannot join yet is of no other use."""
GRACE_S = 25.0
"""Before services are killed; Fly waits as long as its kill_timeout says, docker stop 10 s by default."""
AGENT_S = 5.0
AGAIN_S, POLL_S, ANSWER_S = 0.3, 0.05, 10.0
PACKET_BYTES_MAX = 128 << 10


def main(arguments: Sequence[str]) -> int:
    """Join, which becomes the second half when it is done; with --keep DATA RUN be that."""
    if arguments[:1] != ["--keep"]:
        command = [sys.executable, "-P", "-m", "slum.cli.main", "join", "--foreground", "--wait", str(WAIT_S)]
        os.execv(command[0], [*command, *arguments])
    return keep(arguments[1], arguments[2])


def become(home: Home) -> None:
    """Replace this process by its second half; everything that joining needed must be on disk."""
    from slum.node import boot
    from slum.node.keeperclient import keeper_command

    boot.check_keeper(home)
    boot.write_boot(home, (boot.agent_program(home),))
    keeper, env = keeper_command(home)
    python = keeper[: keeper.index("-m")]
    sys.stdout.flush()
    os.execve(python[0], [*python, "-m", __name__, "--keep", str(home.data), str(home.run)], env)


class Asked(Exception):
    """SIGTERM has come."""


def keep(data: str, run: str) -> int:
    """Keep a keeper running until SIGTERM or SIGINT; return 0 once everything has ended.

    Standard library only, as the keeper itself. The agent starts a keeper too when it misses one for a second: then ours waits
    for that one's end.
    """
    from slum.node.keeper_proc import PR_SET_CHILD_SUBREAPER, prctl

    prctl(PR_SET_CHILD_SUBREAPER, 1)
    argv = [sys.executable, "-S", "-P", "-m", "slum.node.keeper", "--data-dir", data, "--run-dir", run, "--wait"]
    keeper = 0
    try:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, _asked)
        while True:
            keeper = os.posix_spawn(argv[0], argv, os.environ)
            while os.waitpid(-1, 0)[0] != keeper:
                pass
            time.sleep(AGAIN_S)
    except Asked:
        _end(keeper, f"{run}/p/keeper.sock")
    return 0


def _asked(_signum: int, _frame: FrameType | None) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    raise Asked


def _end(keeper: int, path: str) -> None:
    """End the agent, which would start services again, then everything else; the keeper ends with the last of them."""
    try:
        if _call(path, "hello")["pid"] != keeper:
            os.kill(keeper, signal.SIGTERM)
        _shut_down(path, ["agent"], AGENT_S)
        _shut_down(path, [child["name"] for child in _running(path)], GRACE_S)
    except OSError as gone:
        sys.stderr.write(f"slum: the keeper is gone: {gone}\n")


def _shut_down(path: str, names: list[str], grace_s: float) -> None:
    _call(path, "shutdown", names=names, grace_s=grace_s)
    end = time.monotonic() + grace_s + POLL_S * 20
    while time.monotonic() < end and {child["name"] for child in _running(path)} & set(names):
        _reap()
        time.sleep(POLL_S)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _running(path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    more = True
    while more:
        try:
            answer = _call(path, "list", after=found[-1]["name"] if found else None)
        except OSError:
            return []
        found += answer["children"]
        more = answer["more"]
    return [child for child in found if child["state"] == "running"]


def _call(path: str, op: str, **arguments: Any) -> dict[str, Any]:
    """Do one request of the keeper's protocol (docs/node.md); OSError when it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(ANSWER_S)
        sock.connect(path)
        sock.send(json.dumps({"id": 1, "op": op, **arguments}).encode())
        answer: dict[str, Any] = json.loads(sock.recv(PACKET_BYTES_MAX) or b"{}")
    if not answer.get("ok"):
        raise OSError(f"the keeper refused {op}: {answer.get('error')}")
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
