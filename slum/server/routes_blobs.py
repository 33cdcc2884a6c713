"""The API's routes for bundles. A blob never changes, so its digest is its ETag."""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, Response

from slum.errors import ConfigError
from slum.server.blobs import BLOB_BYTES_MAX
from slum.server.peer import Guest
from slum.server.problems import Missing, TooLarge
from slum.server.route import Call


async def put_blob(call: Call) -> Response:
    digest = call.connection.path_params["digest"]
    length = call.connection.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:19]) > BLOB_BYTES_MAX:
        raise TooLarge(f"the bundle is larger than {BLOB_BYTES_MAX >> 20} MiB")
    try:
        is_new = await call.control.copies.put(digest, call.request.stream())
    except ClientDisconnect:
        raise ConfigError("the upload was cut short") from None
    return Response(status_code=201 if is_new else 200, headers={"etag": f'"{digest}"'})


async def get_blob(call: Call) -> Response:
    """Answer GET and HEAD; to a node only for bundles that its own config names."""
    digest = call.connection.path_params["digest"]
    peer = call.peer
    if isinstance(peer, Guest) and peer.kind == "node":
        call.control.world()
        if not call.control.hub.names_bundle(peer, digest):
            raise Missing(f"no blob {digest}")
    if not await call.control.copies.touch(digest):
        raise Missing(f"no blob {digest}")
    headers = {"etag": f'"{digest}"', "cache-control": "max-age=31536000, immutable"}
    if call.connection.headers.get("if-none-match") == f'"{digest}"':
        return Response(status_code=304, headers=headers)
    path = call.control.blobs.path(digest)
    return FileResponse(path, media_type="application/octet-stream", headers=headers)
