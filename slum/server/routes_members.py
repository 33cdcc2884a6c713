"""The API's routes about the members: how they stand, who joins and leaves, and the errands of their servers."""

from __future__ import annotations

from slum import api
from slum.errors import ConfigError
from slum.server import cluster, errands
from slum.server.route import Call


async def get_link(call: Call) -> None:
    await errands.serve(call.control, call.websocket)


async def get_cluster(call: Call) -> api.ClusterView:
    return await cluster.cluster_view(call.control)


async def post_members(call: Call) -> api.MembersChanged:
    asked: api.MembersRequest = call.body
    if (asked.add is None) == (asked.remove is None):
        raise ConfigError("a change adds one member or removes one")
    add = None
    if asked.add is not None:
        add = cluster.row_of(asked.add)
    if asked.remove is not None:
        cluster.checked_removal(call.control, asked.remove, by_itself=asked.remove == call.control.me)
    members = await cluster.change(call.control, add, asked.remove)
    return api.MembersChanged(members=tuple(member.id for member in members))
