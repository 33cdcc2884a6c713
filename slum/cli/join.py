"""`slum join`: make this machine a node of a control plane elsewhere; and what the other commands say on such a machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slum.cli.base import Invocation, command
from slum.errors import ConfigError, Unhealthy
from slum.frozen import Frozen

if TYPE_CHECKING:
    from slum.paths import Home

TOKEN_BYTES_MAX = 4096
CONNECT_S = 60.0
POLL_S = 0.05
ENV_SERVER, ENV_MACHINE, ENV_TOKEN, ENV_TOKEN_FILE = (
    "SLUM_SERVER",
    "SLUM_MACHINE",
    "SLUM_JOIN_TOKEN",
    "SLUM_JOIN_TOKEN_FILE",
)


class NodeView(Frozen):
    """What `slum status --json` says on a node."""

    node: str
    """The machine's name in the fleet."""
    fleet: str
    cluster: str
    servers: tuple[str, ...]
    connected: str
    """The member that the agent is connected to, empty while it is to none."""
    why: str
    """Why it is to none."""
    since: float | None
    """Unix seconds of the last change; None when no agent runs."""
    certificate_began: float
    certificate_ends: float
    data_dir: str
    run_dir: str


@command(
    "join",
    examples="""
    slum join https://cp.example.com --tenement workers-1 --token-file token
    slum join https://cp.example.com --token-file - < token
    slum join https://m1.example.com https://m2.example.com --tenement workers-1 --token-file token
    """,
)
@click.argument("url", nargs=-1)
@click.option("--tenement", "machine", metavar="NAME", default="", help="The machine that the token must be for.")
@click.option("--token-file", metavar="FILE", help="Where the join token is; - is standard input.")
@click.option("--wait", "wait_s", metavar="SECONDS", type=click.FloatRange(0), default=60.0, show_default=True,
              help="How long a control plane that does not answer is tried.")  # fmt: skip
@click.option("--no-start", is_flag=True, help="Only write what joining gives; start nothing.")
@click.option("--foreground", is_flag=True, help="Then be the keeper's parent: for containers.")
def join(
    asked: Invocation,
    url: tuple[str, ...],
    machine: str,
    token_file: str | None,
    wait_s: float,
    no_start: bool,
    foreground: bool,
) -> int | None:
    """Make this machine a node of the control plane at URL, and start its keeper and agent.

    Several URLs are several members of it. The token is read from a file, from standard input or from SLUM_JOIN_TOKEN, never
    from an argument; SLUM_SERVER and SLUM_MACHINE stand for URL and --tenement. May be repeated: a token that was used here
    is used up for others, not for this machine, and a machine that has joined needs none.
    """
    from slum.node.home import has_joined
    from slum.node.join import join as join_fleet

    urls = tuple((" ".join(url) or os.environ.get(ENV_SERVER, "")).replace(",", " ").split())
    token = token_from(token_file, os.environ)
    new = False
    if token is not None or not has_joined(asked.home):
        if not urls:
            raise ConfigError("where is the control plane?", hint="slum join https://HOST --token-file FILE")
        if token is None:
            raise ConfigError(
                "no join token was given",
                hint=f"--token-file FILE (- is standard input), or {ENV_TOKEN_FILE}; `slum token new node NAME` makes one",
            )
        new = join_fleet(
            asked.home,
            urls=urls,
            machine=machine or os.environ.get(ENV_MACHINE, ""),
            token=token,
            wait_s=wait_s,
            say=asked.note,
        )
    if foreground:
        from slum.node.container import become

        become(asked.home)
    unit = _only_write(asked.home) if no_start else _start(asked, new=new)
    view = view_of(asked.home)
    if asked.json:
        asked.emit(view)
    else:
        asked.say(f"{'joined' if new else 'has joined already'}: this machine is {view.node} of fleet {view.fleet}")
        for line in () if no_start else _running_lines(asked, view, unit):
            asked.say(line)
    return None if no_start or view.connected else Unhealthy.exit_code


def token_from(file: str | None, env: Mapping[str, str]) -> str | None:
    """Return the token from *file* (- is standard input), else from what *env* names; None where nothing does."""
    name = file or env.get(ENV_TOKEN_FILE)
    if not name:
        return env.get(ENV_TOKEN) or None
    try:
        if name == "-":
            return sys.stdin.read(TOKEN_BYTES_MAX)
        with Path(name).open(encoding="utf-8") as given:
            return given.read(TOKEN_BYTES_MAX)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token file {name} cannot be read: {error}") from error


def up_node(asked: Invocation) -> None:
    """`slum up` on a node: keeper and agent run, and whoever keeps them goes on doing so."""
    started, _ = start_node(asked.home, installing=False)
    if asked.json:
        asked.emit({"started": bool(started), "data_dir": str(asked.home.data), "run_dir": str(asked.home.run)})
    elif started:
        asked.say(f"agent started (data {asked.home.data}); `slum status` tells whether it is connected")
    else:
        asked.say(f"the agent already runs (data {asked.home.data}); `slum status`")


def status_of_node(asked: Invocation) -> None:
    """`slum status` on a node."""
    view = view_of(asked.home)
    if asked.json:
        asked.emit(view)
        return
    for line in node_lines(asked, view, time.time()):
        asked.say(line)


def view_of(home: Home) -> NodeView:
    """Return what this machine is as a node; ConfigError when it is none."""
    from slum.node import home as homes

    told, identity, line = homes.read_home(home), homes.read_identity(home), homes.read_line(home)
    if told is None or identity is None:
        raise ConfigError("this machine is no node of a control plane elsewhere", hint="slum join --help")
    return NodeView(
        node=identity.tenement,
        fleet=told.fleet,
        cluster=told.cluster,
        servers=tuple(dict.fromkeys((*told.servers, *told.joined))),
        connected=line.server if line else "",
        why=(line.why or "it is dialling") if line and not line.server else "" if line else "no agent runs: `slum up`",
        since=line.at if line else None,
        certificate_began=told.not_before,
        certificate_ends=told.not_after,
        data_dir=str(home.data),
        run_dir=str(home.run),
    )


def node_lines(asked: Invocation, view: NodeView, now: float) -> list[str]:
    """Return what `slum status` says on a node, for people."""
    from slum.render import clean, seconds

    line = (
        asked.paint(f"connected to {view.connected}", "good")
        + (f" for {seconds(now - view.since)}" if view.since else "")
        if view.connected
        else asked.paint("not connected", "warn") + f": {clean(view.why)}; services go on meanwhile"
    )
    left_s = view.certificate_ends - now
    certificate = f"{seconds(max(0.0, now - view.certificate_began))} old, valid for {seconds(left_s)} more"
    if left_s < 0:
        certificate = asked.paint("expired", "warn") + f" {seconds(-left_s)} ago; renewed as soon as a member answers"
    return [
        f"node         {view.node} of fleet {view.fleet or '(not named yet)'}",
        f"line         {line}",
        f"members      {', '.join(view.servers)}",
        f"certificate  {certificate}",
        f"data         {view.data_dir}",
    ]


def _only_write(home: Home) -> str:
    """Have on disk what a keeper starts here; no unit keeps it."""
    from slum.node import boot

    boot.write_boot(home, (boot.agent_program(home),))
    return ""


def start_node(home: Home, *, installing: bool) -> tuple[tuple[str, ...], str]:
    """Make keeper and agent of this node run; return what was started now, and the unit that keeps it."""
    from slum.node import boot, service

    done = service.start(home, (boot.agent_program(home),), installing=installing)
    return done.started, done.unit


def _start(asked: Invocation, *, new: bool) -> str:
    """Start keeper and agent, wait for the line, and return the unit that keeps them."""
    from slum.cli.prepare import passing
    from slum.node import boot
    from slum.node import home as homes

    if new:
        homes.forget_line(asked.home)
        boot.restart(asked.home, boot.AGENT)
    _, unit = start_node(asked.home, installing=True)
    end = time.monotonic() + CONNECT_S
    with passing(asked, "waiting for the agent's line"):
        while (line := homes.read_line(asked.home)) is None or not line.server:
            if time.monotonic() > end:
                break
            time.sleep(POLL_S)
    return unit


def _running_lines(asked: Invocation, view: NodeView, unit: str) -> list[str]:
    log = asked.home.own_log("agent")
    lines = [f"the agent is connected to {view.connected}; its log is {log}"]
    if not view.connected:
        lines = [f"the agent runs, but is not connected: {view.why}", f"it goes on trying; its log is {log}"]
    if unit:
        lines.append(f"{unit} starts it after a reboot")
    else:
        lines.append("nothing starts it after a reboot: have this machine's init run `slum up` (docs/joining.md)")
    return lines
