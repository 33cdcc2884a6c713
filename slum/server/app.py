"""The HTTP API: one table of routes, from which the Starlette application and the OpenAPI page are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager

from starlette.applications import Starlette

from slum import api
from slum.model import Fleet
from slum.server import (
    cluster,
    memberwire,
    routes_blobs,
    routes_fleet,
    routes_members,
    routes_pause,
    routes_read,
    routes_streams,
)
from slum.server.control import Control
from slum.server.openapi import openapi_document
from slum.server.peer import Access
from slum.server.problems import json_response
from slum.server.route import Call, Kind, Route, mount, not_found, wrong_method

BLOB_S = 900.0


async def get_openapi(call: Call) -> object:
    return json_response(openapi_document(ROUTES))


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET",
        path="/v1/health",
        handler=routes_read.get_health,
        access=Access.READ,
        response=routes_read.Health,
        summary="Whether the server runs, and whether it reaches the ledger",
    ),
    Route(
        method="GET",
        path="/v1/status",
        handler=routes_read.get_status,
        access=Access.READ,
        response=api.Status,
        summary="The control plane, its machines, and instances by phase",
    ),
    Route(
        method="GET",
        path="/v1/state",
        handler=routes_read.get_state,
        access=Access.READ,
        response=api.State,
        summary="What a plan is made from, in one consistent answer",
    ),
    Route(
        method="GET",
        path="/v1/fleet",
        handler=routes_fleet.get_fleet,
        access=Access.READ,
        query=routes_fleet.FleetQuery,
        response=api.FleetDoc,
        summary="The desired fleet, of the newest or a named revision",
    ),
    Route(
        method="PUT",
        path="/v1/fleet",
        handler=routes_fleet.put_fleet,
        access=Access.ADMIN,
        request=api.ApplyRequest,
        body_bytes_max=routes_fleet.FLEET_BYTES_MAX,
        response=api.Applied,
        summary="Commit a new desired fleet; 409 says what changed since base_revision",
    ),
    Route(
        method="GET",
        path="/v1/revisions",
        handler=routes_fleet.get_revisions,
        access=Access.READ,
        response=tuple[api.Revision, ...],
        summary="The kept revisions",
    ),
    Route(
        method="POST",
        path="/v1/fleet/check",
        handler=routes_fleet.post_check,
        access=Access.READ,
        request=Fleet,
        body_bytes_max=routes_fleet.FLEET_BYTES_MAX,
        response=api.FleetCheck,
        deadline_s=routes_fleet.CHECK_S + 5.0,
        summary="What the operators' providers would refuse in a fleet; commits nothing",
    ),
    Route(
        method="GET",
        path="/v1/machines",
        handler=routes_read.get_machines,
        access=Access.READ,
        response=tuple[api.MachineView, ...],
        summary="Machines as the operators see them, beside what the ledger says of them; strays too",
    ),
    Route(
        method="POST",
        path="/v1/actions",
        handler=routes_fleet.post_actions,
        access=Access.ADMIN,
        request=api.ActionRequest,
        response=api.Acted,
        summary="Stop, start or restart instances; drain or undrain a machine",
    ),
    Route(
        method="GET",
        path="/v1/pause",
        handler=routes_pause.get_pause,
        access=Access.READ,
        response=api.PauseView,
        summary="Whether a restore has paused what is done to machines, and what resuming would do",
    ),
    Route(
        method="POST",
        path="/v1/resume",
        handler=routes_pause.post_resume,
        access=Access.ADMIN,
        request=api.ResumeRequest,
        response=api.Resumed,
        summary="Go on after a restore: agents are told what to run, machines are made and destroyed again",
    ),
    Route(
        method="GET",
        path="/v1/instances",
        handler=routes_read.get_instances,
        access=Access.READ,
        response=tuple[api.InstanceView, ...],
        summary="Every instance, declared or reported",
    ),
    Route(
        method="GET",
        path="/v1/explain/{service}",
        handler=routes_read.get_explain,
        access=Access.READ,
        response=api.Explanation,
        summary="Everything known about one service: reports, events, last log lines",
    ),
    Route(
        method="GET",
        path="/v1/events",
        handler=routes_read.get_events,
        access=Access.READ,
        query=routes_read.EventsQuery,
        response=tuple[api.Event, ...],
        summary="The audit trail; with Accept: text/event-stream it is followed",
    ),
    Route(
        method="GET",
        path="/v1/events/verify",
        handler=routes_read.get_verified,
        access=Access.READ,
        response=api.Verified,
        summary="Whether the chain of event hashes holds",
    ),
    Route(
        method="GET",
        path="/v1/progress",
        handler=routes_streams.get_progress,
        access=Access.READ,
        query=routes_streams.ProgressQuery,
        response=api.Progress,
        kind=Kind.EVENTS,
        summary='Each step towards a revision until everything is settled; the last has what = "done"',
    ),
    Route(
        method="GET",
        path="/v1/logs",
        handler=routes_streams.get_logs,
        access=Access.READ,
        query=routes_streams.LogsQuery,
        response=api.LogLine,
        kind=Kind.EVENTS,
        summary="Log lines of a service; an event named error carries a Problem",
    ),
    Route(
        method="PUT",
        path="/v1/blobs/{digest}",
        handler=routes_blobs.put_blob,
        access=Access.ADMIN,
        kind=Kind.BYTES,
        deadline_s=BLOB_S,
        summary="Store a bundle under its sha256; answered when it is on disk",
    ),
    Route(
        method="HEAD",
        path="/v1/blobs/{digest}",
        handler=routes_blobs.get_blob,
        access=Access.READ,
        kind=Kind.BYTES,
        summary="Whether a bundle is here; if so it is kept for an hour at least",
    ),
    Route(
        method="GET",
        path="/v1/blobs/{digest}",
        handler=routes_blobs.get_blob,
        access=Access.READ | Access.NODE,
        kind=Kind.BYTES,
        deadline_s=BLOB_S,
        summary="A bundle's bytes",
    ),
    Route(
        method="GET",
        path="/v1/exec",
        handler=routes_streams.get_exec,
        access=Access.ADMIN,
        query=routes_streams.ShellQuery,
        kind=Kind.WEBSOCKET,
        summary="A command inside the wall of a running instance",
    ),
    Route(
        method="GET",
        path="/v1/run",
        handler=routes_streams.get_run,
        access=Access.ADMIN,
        query=routes_streams.ShellQuery,
        kind=Kind.WEBSOCKET,
        summary="A one-off command behind a new wall like the service's",
    ),
    Route(
        method="GET",
        path="/v1/agent",
        handler=routes_streams.get_agent,
        access=Access.NODE,
        kind=Kind.WEBSOCKET,
        summary="An agent's connection: slum.wire, msgpack",
    ),
    Route(
        method="GET",
        path="/v1/agent/streams/{id}",
        handler=routes_streams.get_agent_stream,
        access=Access.NODE,
        kind=Kind.WEBSOCKET,
        summary="An agent's end of a stream that it was asked for; an id is valid once",
    ),
    Route(
        method="GET",
        path="/v1/cluster",
        handler=routes_members.get_cluster,
        access=Access.READ,
        response=api.ClusterView,
        summary="The members of the control plane: roles, epoch, lag, contact, certificates, alarms",
    ),
    Route(
        method="POST",
        path="/v1/members",
        handler=routes_members.post_members,
        access=Access.ADMIN,
        request=api.MembersRequest,
        response=api.MembersChanged,
        deadline_s=cluster.CHANGE_S + 5.0,
        summary="Add or remove one member; answered when the new members have committed something",
    ),
    Route(
        method="GET",
        path=memberwire.PATH,
        handler=routes_members.get_link,
        access=Access.MEMBER,
        kind=Kind.WEBSOCKET,
        summary="An errand of another member's server: slum.server.memberwire, msgpack",
    ),
    Route(
        method="GET",
        path="/openapi.json",
        handler=get_openapi,
        access=Access.READ,
        summary="This API as OpenAPI 3.1",
        response=dict,
    ),
)


def make_app(
    control: Control, lifespan: Callable[[Starlette], AbstractAsyncContextManager[Mapping[str, object]]]
) -> Starlette:
    """Return the ASGI application that serves ROUTES with *control*."""
    return Starlette(
        routes=[mount(route, control) for route in ROUTES],
        lifespan=lifespan,
        exception_handlers={404: not_found, 405: wrong_method},
    )
