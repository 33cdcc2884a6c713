"""How the members of a group reach each other. A group of one has nobody to reach.

PySyncObj takes any object of its Transport class; it calls ``send`` from inside a tick and is told of messages and
connections through the callbacks that it sets. A transport with peers must sync the journal before each message.
"""

from __future__ import annotations

from typing import Any

from slum.errors import invariant
from slum.ledger.group import Transport


class NoPeers(Transport):  # type: ignore[misc]  # PySyncObj has no types
    """The transport of a group of one: always ready, and never asked to send."""

    def __init__(self) -> None:
        super().__init__(None, None, ())

    def send(self, node: Any, message: Any) -> bool:
        invariant(False, f"a group of one sends nothing, but had {message.get('type')!r} for {node}")
        return False
