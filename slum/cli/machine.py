"""What concerns this machine: `slum up`, `down`, `doctor`, `version`, `completion`."""

from __future__ import annotations

import click

from slum.cli.base import Invocation, command
from slum.errors import SlumError, Unhealthy

NEEDED = frozenset({"machine", "process", "namespace", "router"})
"""The doctor's checks without which slum cannot run services here at all."""
SHELLS = ("bash", "zsh", "fish")


@command(
    "up",
    examples="""
    slum up
    slum --data-dir /srv/slum --run-dir /run/slum2 up
    """,
)
def up(asked: Invocation) -> None:
    """Start keeper, ledger, server and agent on this machine, or find them running.

    They restart each other from then on. Services that were declared come back with them. On a node (`slum join`) these are
    the keeper and the agent.
    """
    from slum.cli.join import up_node
    from slum.node.home import has_joined

    if has_joined(asked.home):
        up_node(asked)
        return
    new = start(asked, quiet=True)
    if asked.json:
        asked.emit({"started": new, "data_dir": str(asked.home.data), "run_dir": str(asked.home.run)})
    elif new:
        asked.say(f"control plane started (data {asked.home.data}); stop it with `slum down`")
    else:
        asked.say(f"control plane already runs (data {asked.home.data}); `slum status`")


@command(
    "down",
    examples="""
    slum down
    slum down --services --yes
    """,
)
@click.option("--services", is_flag=True, help="Stop all services too, and the keeper.")
def down(asked: Invocation, services: bool) -> None:
    """Stop server, ledger and agent on this machine. Services run on, untouched, unless --services.

    Nothing is forgotten: `slum up` goes on where this stopped, and starts the services again that --services stopped.
    """
    from slum.node.home import has_joined
    from slum.render import quantity
    from slum.server import boot

    done = boot.down(asked.home, services=services)
    what = "the agent" if has_joined(asked.home) else "control plane and agent"
    if asked.json:
        asked.emit(done)
    elif not done.stopped:
        asked.say("nothing runs here")
    elif services:
        asked.say(f"stopped {what}, and all services; `slum up` brings them back")
    else:
        on = f"{quantity(done.left, 'other process', 'other processes')} (services, router) run on, untouched"
        asked.say(f"stopped {what}; {on if done.left else 'nothing else ran'}. `slum up` brings them back")


@command(
    "doctor",
    examples="""
    slum doctor
    slum doctor --json | jq '.[] | select(.ok == "no")'
    """,
)
def doctor(asked: Invocation) -> int | None:
    """Prove, by doing it, which isolation levels, limits and tools work on this machine, and what to do about the rest.

    Ends with 8 when slum cannot run services here at all.
    """
    from slum.node.doctor import examine
    from slum.render import clean

    checks = examine(asked.home)
    broken = any(check.ok == "no" and check.what in NEEDED for check in checks)
    if asked.json:
        asked.emit(checks)
        return Unhealthy.exit_code if broken else None
    width = max(len(check.what) for check in checks)
    style = {"ok": "good", "warn": "warn", "no": "bad"}
    for check in checks:
        fix = f"; {check.fix}" if check.fix else ""
        asked.say(
            f"{asked.paint(check.ok.ljust(4), style[check.ok])}  {check.what:<{width}}  {clean(check.detail + fix)}"
        )
    if broken:
        asked.say("slum cannot run services here yet: see the lines marked `no`")
    return Unhealthy.exit_code if broken else None


@command(
    "version",
    examples="""
    slum version
    slum version --json
    """,
)
def version(asked: Invocation) -> None:
    """Print the version of this program, and of the control plane if one runs here."""
    import platform

    from slum import __version__

    running = None
    with asked.client() as client:
        try:
            running = client.status().version if client.present() else None
        except SlumError as error:
            asked.note(f"the control plane does not tell: {error.message}")
    if asked.json:
        asked.emit({"slum": __version__, "python": platform.python_version(), "control_plane": running})
        return
    asked.say(f"slum {__version__}, python {platform.python_version()}")
    asked.say(f"control plane {running}" if running else "no control plane runs here")


@command(
    "completion",
    examples="""
    slum completion bash > /etc/bash_completion.d/slum
    slum completion zsh > ~/.zfunc/_slum
    slum completion fish > ~/.config/fish/completions/slum.fish
    """,
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(asked: Invocation, shell: str) -> None:
    """Print the script that completes commands, options and service names in SHELL."""
    from click.shell_completion import get_completion_class

    from slum.cli.main import COMPLETE_VARIABLE, slum

    kind = get_completion_class(shell)
    if kind is None:
        raise SlumError(f"click knows no completion for {shell}")
    asked.say(kind(slum, {}, "slum", COMPLETE_VARIABLE).source())


def start(asked: Invocation, *, quiet: bool = False) -> bool:
    """Start the control plane here unless it runs; says so unless *quiet*. True when it was started now.

    ConfigError on a node of another control plane.
    """
    from slum.cli.prepare import passing
    from slum.node.home import refuse_node
    from slum.server import boot

    refuse_node(asked.home)
    with passing(asked, "starting a control plane"):
        new = bool(boot.up(asked.home))
    if new and not quiet and not asked.json:
        asked.say(f"no control plane on this machine: started one (data {asked.home.data}, stop it with `slum down`)\n")
    return new
