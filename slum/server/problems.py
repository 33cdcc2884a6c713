"""Errors as the API says them: ``{"error": Problem}`` with the HTTP status of api.STATUS."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

from slum import api
from slum.errors import ConfigError, Conflict, QuorumLost, SlumError

BUG = api.Problem(
    code="internal",
    message="the server met a bug; its log has the traceback",
    hint="`slum doctor` names the log's file; please report it",
)


def problem_of(error: SlumError) -> api.Problem:
    details = error.problems if isinstance(error, ConfigError) else error.changes if isinstance(error, Conflict) else ()
    lasting = isinstance(error, QuorumLost) and error.lasting
    return api.Problem(code=error.code, message=error.message, hint=error.hint, details=details, lasting=lasting)


def problem_response(error: SlumError, status: int | None = None) -> Response:
    """Return the answer for *error*; *status* overrides the one of its class or code."""
    headers = {"retry-after": "1"} if isinstance(error, QuorumLost) and not error.lasting else {}
    return json_response({"error": problem_of(error)}, status or status_of(error), headers)


def json_response(document: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, "application/json")


class Missing(ConfigError):
    """What the request names is not there: 404, code "bad_input"."""


class Unknown(ConfigError):
    """No certificate, or none that opens anything: 401, code "bad_input"."""


class Forbidden(ConfigError):
    """A certificate that does not open this: 403, code "bad_input"."""


class TooMany(QuorumLost):
    """More attempts than are taken now: 429 with Retry-After, code "no_quorum"; the client tries again."""


class TooLarge(ConfigError):
    """The body is over its cap: 413, code "bad_input"."""


_STATUS: tuple[tuple[type[SlumError], int], ...] = (
    (Missing, 404),
    (TooLarge, 413),
    (Unknown, 401),
    (Forbidden, 403),
    (TooMany, 429),
)


def status_of(error: SlumError) -> int:
    """Return the HTTP status of *error*: its class's, else its code's."""
    by_class = next((status for kind, status in _STATUS if isinstance(error, kind)), None)
    return by_class or api.STATUS.get(error.code, 500)
