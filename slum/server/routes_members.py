"""The API's routes about the members: how they stand, who joins and leaves, and the errands of their servers."""

from __future__ import annotations

from slum.server import errands
from slum.server.route import Call


async def get_link(call: Call) -> None:
    await errands.serve(call.control, call.websocket)
