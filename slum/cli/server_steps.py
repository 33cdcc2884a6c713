"""What the commands of `slum server` share: the member's programs started, and who does it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

from slum.cli.base import Invocation

T = TypeVar("T")


def start(asked: Invocation, *, again: bool, wait: bool = True) -> None:
    """Have the member's programs run, those that must see a new identity anew; return when the API answers."""
    from slum.cli.prepare import passing
    from slum.server import boot

    with passing(asked, "starting the member"):
        if again:
            boot.shut_down_servers(asked.home)
        boot.up(asked.home, wait=wait)


def run_quietly(work: Coroutine[Any, Any, T]) -> T:
    """Return what *work* gives; what it would log as a part of a server is not for here."""
    import asyncio
    import logging

    from slum import log

    log.start("slum", logging.ERROR)
    return asyncio.run(work)


def machine_name() -> str:
    import socket

    return socket.gethostname().partition(".")[0].lower() or "m"


def actor() -> str:
    import getpass

    return f"{getpass.getuser()}@{machine_name()}"
