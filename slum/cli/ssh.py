"""`slum ssh`: a shell on a tenement's host, by way of its operator's data: user, key, jump host, and the key it is known by."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import termios
import threading
import tty as tty_modes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from slum.cli.base import Invocation, TrailingCommand, command
from slum.errors import ConfigError

if TYPE_CHECKING:
    import asyncssh

    from slum.operators.ssh import Ssh

READ_BYTES = 1 << 16


@command(
    "ssh",
    examples="""
    slum ssh workers-1
    slum ssh workers-1 -- journalctl -u slum -n 50
    slum ssh workers-1 -- tar cz /var/lib/slum/services > services.tar.gz
    """,
    cls=TrailingCommand,
)
@click.argument("tenement")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def ssh(asked: Invocation, tenement: str, command: tuple[str, ...]) -> int:
    """Open a shell on the host of TENEMENT, or run COMMAND there, through the jump host if it has one.

    For machines of an operator of type ssh. It is a shell on the host, outside of every wall; `slum exec` goes inside.
    Ends with the command's exit status.
    """
    import shlex

    operator, host = _place(asked, tenement)
    # One word is a line for the shell there, as with ssh; more are taken as they stand.
    line = command[0] if len(command) == 1 else shlex.join(command)
    return asyncio.run(_talk(operator, host, line))


def _place(asked: Invocation, tenement: str) -> tuple[Ssh, str]:
    """Return the operator of *tenement*'s machine and its host; ConfigError when it has none that is reached by SSH."""
    import msgspec

    from slum.cli.bootstrap import declared, operator_of
    from slum.operators.ssh_hosts import host_in

    with asked.client() as client:
        machines = client.machines()
    found = [one for one in machines if one.name == tenement] or [one for one in machines if one.tenement == tenement]
    if not found:
        names = ", ".join(sorted(one.name for one in machines)) or "none"
        raise ConfigError(f"there is no tenement {tenement!r}", hint=f"there are: {names}")
    if len(found) > 1:
        raise ConfigError(f"{tenement} is several machines", hint=f"one of {', '.join(one.name for one in found)}")
    place = host_in(found[0].id)
    if place is None:
        raise ConfigError(
            f"{found[0].name} is no machine that slum reaches by SSH",
            hint="its operator is of another type, or it was not made yet; see `slum machines`",
        )
    definition = declared(asked, found[0].operator)
    if definition.key is not None and not os.path.exists(definition.key):
        # The path is one of the control plane's machine; here an agent or the usual keys may do.
        definition = msgspec.structs.replace(definition, key=None)
    operator = operator_of(asked, definition)
    if place[0] not in operator.hosts:
        raise ConfigError(f"{place[0]} is no host of operators.{definition.name} any more")
    return operator, place[0]


async def _talk(operator: Ssh, host: str, command: str) -> int:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not command
    loop = asyncio.get_running_loop()
    async with operator.shell(host) as connection:
        process = await connection.create_process(
            command or None,
            encoding=None,
            term_type=os.environ.get("TERM", "xterm") if is_terminal else None,
            term_size=tuple(os.get_terminal_size(0)) if is_terminal else (),
        )
        async with process:
            with _raw(is_terminal):
                if is_terminal:
                    loop.add_signal_handler(
                        signal.SIGWINCH, lambda: process.change_terminal_size(*os.get_terminal_size(0))
                    )
                threading.Thread(target=_feed, args=(loop, process), daemon=True).start()
                async with asyncio.TaskGroup() as group:
                    group.create_task(_carry(process.stdout, 1), name="stdout")
                    group.create_task(_carry(process.stderr, 2), name="stderr")
                done = await process.wait()
    if done.exit_signal is not None:
        return 128 + getattr(signal, f"SIG{done.exit_signal[0]}", 0)
    return done.exit_status or 0


async def _carry(source: asyncssh.SSHReader[bytes], target: int) -> None:
    while data := await source.read(READ_BYTES):
        while data:
            data = data[os.write(target, data) :]


def _feed(loop: asyncio.AbstractEventLoop, process: asyncssh.SSHClientProcess[bytes]) -> None:
    """Give the far side what comes on stdin. In a thread that ends with us: a read cannot be taken back."""

    async def give(data: bytes) -> None:
        try:
            if data:
                process.stdin.write(data)
                await process.stdin.drain()
            else:
                process.stdin.write_eof()
        except OSError:
            return  # it has ended and takes no more; its status is still to come

    while True:
        data = os.read(0, READ_BYTES)
        try:
            asyncio.run_coroutine_threadsafe(give(data), loop).result()
        except RuntimeError:
            return
        if not data:
            return


@contextmanager
def _raw(is_terminal: bool) -> Iterator[None]:
    if not is_terminal:
        yield
        return
    before = termios.tcgetattr(0)
    try:
        tty_modes.setraw(0, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
