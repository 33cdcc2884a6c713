"""What the API's answers mean: JSON documents, problems as the errors they stand for, streams of events. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from slum import api
from slum.errors import BY_CODE, ConfigError, Conflict, QuorumLost, SlumError

T = TypeVar("T")


def decode(data: bytes, kind: type[T]) -> T:
    """Return the document in *data*; SlumError when it is none of *kind*."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise SlumError(
            f"the control plane's answer is not understood: {error}",
            hint="client and server may be of different versions: `slum version`",
        ) from error


def problem_of(status: int, body: bytes) -> SlumError:
    """Return the error that an HTTP answer stands for."""
    try:
        return raised(msgspec.json.decode(body, type=dict[str, api.Problem])["error"])
    except (msgspec.DecodeError, KeyError):
        text = body[:200].decode("utf-8", "replace").strip()
        return (
            QuorumLost(f"the control plane is busy: {text}")
            if status == 503
            else SlumError(f"the control plane answered {status}: {text or 'nothing'}")
        )


def raised(problem: api.Problem) -> SlumError:
    """Return the error of the class that the server named."""
    kind = BY_CODE.get(problem.code, SlumError)
    if kind is ConfigError:
        return ConfigError(problem.message, hint=problem.hint, problems=problem.details)
    if kind is Conflict:
        return Conflict(problem.message, hint=problem.hint, changes=problem.details)
    if kind is QuorumLost:
        return QuorumLost(problem.message, hint=problem.hint, lasting=problem.lasting)
    return kind(problem.message, hint=problem.hint)


def parse_events(chunks: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield (event, data) of a text/event-stream; comments and other fields are skipped, an unfinished event is dropped.

    Lines end at LF or CRLF only: httpx's own iter_lines also splits at U+2028 and U+0085, which JSON may hold unescaped.
    See https://html.spec.whatwg.org/multipage/server-sent-events.html (9.2.6).
    """
    event, rest = "message", b""
    data: list[bytes] = []
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if not line:
                if data:
                    yield event, b"\n".join(data)
                event, data = "message", []
                continue
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                data.append(value)
            elif field == b"event":
                event = value.decode("utf-8", "replace")
