"""The control plane as Python calls: a synchronous client of the HTTP API, of this machine or of one elsewhere.

Inputs are a Home or another Reach and the types of slum.api; answers are those types, errors the classes of slum.errors that the server
named. A server or ledger that restarts is waited for: connections refused or cut, and 503, are tried again until the
deadline, mutations always with the same request id, so that they happen once. It never starts anything, never prints,
and never changes what it was given.
"""

from __future__ import annotations

import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from slum import api
from slum.answers import decode, parse_events, problem_of, raised
from slum.errors import QuorumLost, SlumError, Unreachable
from slum.ledger.commands import new_request_id
from slum.model import Fleet
from slum.paths import Home
from slum.reach import DEADLINE_S, Here, Reach

SILENCE_S = 20.0
"""A stream that says nothing for so long is opened anew."""
RETRY_MS = (50, 100, 200, 400, 800)
CHUNK_BYTES = 256 << 10
LOG_OVERLAP_S = 2.0
RECENT_LINES = 10_000
"""What a cut log stream asks for again, and how many lines it can recognise as printed already."""

T = TypeVar("T")


class Client:
    """One connection to the control plane that *at* leads to. Not for several threads."""

    def __init__(self, at: Home | Reach, *, deadline_s: float = DEADLINE_S) -> None:
        self.at: Reach = Here(at) if isinstance(at, Home) else at
        self.deadline_s = deadline_s
        self.seq: int | None = None
        """The newest ledger sequence that an answer named; part of the next request id."""
        self._answered = False
        self._http = httpx.Client(transport=self.at.transport(), base_url="http://slum/v1/", timeout=60.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # --- reading ------------------------------------------------------------------------------------------------------
    def present(self) -> bool:
        """Tell whether there is a control plane; one that restarts is waited for. Unreachable when we may not ask it."""
        self.at.check()
        try:
            self._send(lambda: self._http.get("health"))
        except Unreachable:
            if self._answered or not self.at.is_here:
                raise
            return False
        return True

    def status(self) -> api.Status:
        """Return what `slum status` shows: ledger, machines, counts."""
        found = self._call("GET", "status", api.Status)
        self._saw(found.ledger.seq)
        return found

    def state(self) -> api.State:
        """Return what a plan is made from, as one consistent answer."""
        found = self._call("GET", "state", api.State)
        self._saw(found.seq)
        return found

    def cluster(self) -> api.ClusterView:
        """Return how the members stand, as the one that answers knows."""
        found = self._call("GET", "cluster", api.ClusterView)
        self._saw(found.seq)
        return found

    def change_members(self, *, remove: str) -> api.MembersChanged:
        """Remove a member for good; returns when the others have committed something without it. May be repeated."""
        body = api.MembersRequest(remove=remove, host=socket.gethostname())
        return self._call("POST", "members", api.MembersChanged, body=body)

    def fleet(self, revision: int | None = None) -> api.FleetDoc:
        """Return the fleet of *revision*, None for the newest; ConfigError when it is not kept."""
        return self._call("GET", "fleet", api.FleetDoc, revision=revision)

    def revisions(self) -> tuple[api.Revision, ...]:
        """Return the revisions that are kept."""
        return self._call("GET", "revisions", tuple[api.Revision, ...])

    def instances(self) -> tuple[api.InstanceView, ...]:
        """Return every instance that is declared or reported."""
        return self._call("GET", "instances", tuple[api.InstanceView, ...])

    def machines(self) -> tuple[api.MachineView, ...]:
        """Return the machines that operators have or should have, strays too."""
        return self._call("GET", "machines", tuple[api.MachineView, ...])

    def explain(self, service: str) -> api.Explanation:
        """Return all that is known of *service*; ConfigError with the nearest name when nothing is."""
        return self._call("GET", f"explain/{service}", api.Explanation)

    def events(
        self,
        *,
        after: int = 0,
        limit: int = 100,
        kind: str | None = None,
        service: str | None = None,
        actor: str | None = None,
        newest: bool = False,
    ) -> tuple[api.Event, ...]:
        """Return at most *limit* events with numbers above *after*, oldest first; the last ones when *newest*."""
        query = {"after": after, "limit": limit, "kind": kind, "service": service, "actor": actor}
        return self._call("GET", "events", tuple[api.Event, ...], **query, newest=1 if newest else None)

    def verify(self) -> api.Verified:
        """Check the hash chain of all events."""
        return self._call("GET", "events/verify", api.Verified)

    # --- changing -----------------------------------------------------------------------------------------------------
    def apply(self, fleet: Fleet, *, base_revision: int, why: str) -> api.Applied:
        """Commit *fleet* if the revision is still *base_revision*; Conflict otherwise. Happens once, however often sent."""
        body = api.ApplyRequest(
            fleet=fleet,
            base_revision=base_revision,
            request_id=self._request_id(),
            why=why,
            host=socket.gethostname(),
        )
        done = self._commit("PUT", "fleet", api.Applied, body)
        self._saw(done.seq)
        return done

    def act(self, verb: str, service: str, *, instance: str | None = None, tenement: str | None = None) -> api.Acted:
        """Stop, start or restart, drain or undrain; happens once, however often sent."""
        body = api.ActionRequest(
            verb=verb,
            service=service,
            request_id=self._request_id(),
            id=instance,
            tenement=tenement,
            host=socket.gethostname(),
        )
        done = self._commit("POST", "actions", api.Acted, body)
        self._saw(done.seq)
        return done

    def check(self, fleet: Fleet) -> api.FleetCheck:
        """Return what the operators' providers would refuse in *fleet*; changes nothing."""
        return self._call("POST", "fleet/check", api.FleetCheck, body=fleet)

    def pause(self) -> api.PauseView:
        """Return whether a restore has paused the control plane, and what resuming would do."""
        return self._call("GET", "pause", api.PauseView)

    def resume(self) -> api.Resumed:
        """Go on after a restore; may be repeated."""
        body = api.ResumeRequest(request_id=self._request_id(), host=socket.gethostname())
        done = self._commit("POST", "resume", api.Resumed, body)
        self._saw(done.seq)
        return done

    # --- who may come in ----------------------------------------------------------------------------------------------
    def add_token(self, kind: str, subject: str = "", *, role: str = "", ttl_s: float = 3600.0) -> api.NewToken:
        """Make a join token. Sent again it makes another; the one that nobody heard of expires."""
        body = api.TokenRequest(kind=kind, subject=subject, role=role, ttl_s=ttl_s, host=socket.gethostname())
        return self._call("POST", "tokens", api.NewToken, body=body)

    def tokens(self) -> tuple[api.TokenView, ...]:
        return self._call("GET", "tokens", tuple[api.TokenView, ...])

    def remove_token(self, id: str) -> api.Revoked:
        """Remove a token; ConfigError when there is none of that id."""
        return self._call("DELETE", f"tokens/{id}", api.Revoked, host=socket.gethostname())

    def host_keys(self) -> tuple[api.HostKey, ...]:
        """Return the keys that hosts with SSH are known by."""
        return self._call("GET", "hostkeys", tuple[api.HostKey, ...])

    def forget_host_key(self, host: str) -> api.Forgotten:
        """Let the next key that *host* shows be believed; ConfigError when no such host is known. May be repeated."""
        return self._call("DELETE", f"hostkeys/{quote(host, safe='')}", api.Forgotten, host=socket.gethostname())

    def users(self) -> tuple[api.UserView, ...]:
        return self._call("GET", "users", tuple[api.UserView, ...])

    def remove_user(self, name: str) -> api.Revoked:
        """Revoke all that *name* has; ConfigError when that is nothing."""
        return self._call("DELETE", f"users/{name}", api.Revoked, host=socket.gethostname())

    def certificates(self) -> tuple[api.CertificateView, ...]:
        return self._call("GET", "certificates", tuple[api.CertificateView, ...])

    def revoke(self, *, subject: str = "", serial: str = "", why: str = "") -> api.Revoked:
        """Revoke one certificate or all of a subject; ConfigError when nothing of the sort holds."""
        body = api.RevokeRequest(subject=subject, serial=serial, why=why, host=socket.gethostname())
        return self._call("POST", "revoke", api.Revoked, body=body)

    def has_blob(self, digest: str) -> bool:
        """Tell whether the control plane holds the blob."""
        answer = self._send(lambda: self._http.head(f"blobs/{digest}"), accept=(404,))
        return answer.status_code != 404

    def put_blob(self, digest: str, path: Path, *, sent: Callable[[int], None] = lambda _: None) -> None:
        """Upload *path*; returns when the server has it on disk. *sent* is told each amount of bytes as it goes."""
        headers = {"content-length": str(path.stat().st_size), "content-type": "application/octet-stream"}
        self._send(lambda: self._http.put(f"blobs/{digest}", content=_chunks(path, sent), headers=headers))

    # --- following ----------------------------------------------------------------------------------------------------
    def progress(self, revision: int, *, timeout_s: float | None) -> Iterator[api.Progress]:
        """Yield what happens towards *revision*, up to and with the "done"; TimeoutError when that takes too long."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def silence() -> float:
            left = SILENCE_S if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            return min(left, SILENCE_S)

        while True:
            for step in self._stream("progress", api.Progress, {"revision": revision}, silence):
                yield step
                if step.what == "done":
                    return
            time.sleep(RETRY_MS[2] / 1000)

    def follow_events(
        self, *, after: int, kind: str | None = None, service: str | None = None, actor: str | None = None
    ) -> Iterator[api.Event]:
        """Yield events with numbers above *after* for ever, each once, across restarts of the server."""
        while True:
            query = {"after": after, "kind": kind, "service": service, "actor": actor}
            for event in self._stream("events", api.Event, query, lambda: None):
                if event.number > after:
                    after = event.number
                    yield event
            time.sleep(RETRY_MS[2] / 1000)

    def logs(
        self,
        service: str,
        *,
        instance: str | None = None,
        tenement: str | None = None,
        since: float | None = None,
        tail: int | None = None,
        grep: str | None = None,
        follow: bool = False,
    ) -> Iterator[api.LogLine]:
        """Yield log lines; with *follow* for ever, across restarts of the server, each once."""
        query: dict[str, Any] = {"service": service, "id": instance, "tenement": tenement, "grep": grep}
        recent: deque[api.LogLine] = deque(maxlen=RECENT_LINES)
        while True:
            seen = Counter(recent)
            extra = {"since": since, "tail": tail, "follow": 1 if follow else None}
            for line in self._stream("logs", api.LogLine, {**query, **extra}, lambda: None):
                if seen[line] > 0:
                    seen[line] -= 1
                    continue
                recent.append(line)
                yield line
            if not follow:
                return
            if recent:
                since, tail = recent[-1].at - LOG_OVERLAP_S, None
            time.sleep(RETRY_MS[2] / 1000)

    # --- the wire -----------------------------------------------------------------------------------------------------
    def _call(self, method: str, path: str, answer: type[T], /, *, body: object = None, **query: object) -> T:
        params = _present(query)
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"content-type": "application/json"}
        got = self._send(lambda: self._http.request(method, path, params=params, content=content, headers=headers))
        return decode(got.content, answer)

    def _commit(self, method: str, path: str, answer: type[T], body: object) -> T:
        try:
            return self._call(method, path, answer, body=body)
        except QuorumLost as error:
            if error.lasting:
                raise
            hint = f"{error.hint}. It may be committed all the same: look at `slum status` before you do it again"
            raise QuorumLost(error.message, hint=hint.removeprefix(". ")) from error

    def _send(self, send: Callable[[], httpx.Response], *, accept: tuple[int, ...] = ()) -> httpx.Response:
        """Send until there is an answer; what *send* does must be safe to repeat."""
        self.at.check()
        started = time.monotonic()
        deadline = started + self.deadline_s
        others = self.at.members - 1
        for attempt in range(1_000_000):
            try:
                self.at.knock()
                self._answered = self._answered or self.at.is_here
                answer = send()
                self._answered = True
            except httpx.TransportError as error:
                failed: SlumError = self.at.lost(error, self._answered)
                retry = others > 0 or self._answered or time.monotonic() - started < self.at.patience_s()
            else:
                if answer.status_code < 400 or answer.status_code in accept:
                    return answer
                failed = problem_of(answer.status_code, answer.content)
                retry = isinstance(failed, QuorumLost) and (others > 0 or not failed.lasting)
            # Another member may be well, or lead: each is asked once before anybody is given up.
            self.at.next()
            pause = 0.0 if others > 0 else RETRY_MS[min(attempt, len(RETRY_MS) - 1)] / 1000
            others -= 1
            if not retry or time.monotonic() + pause > deadline:
                raise failed
            time.sleep(pause)
        raise AssertionError("unreachable: the deadline ends the loop")

    def _stream(
        self, path: str, kind: type[T], query: dict[str, Any], silence: Callable[[], float | None]
    ) -> Iterator[T]:
        """Yield the documents of one event stream; returns when it ends, is cut, or is silent too long."""
        headers = {"accept": "text/event-stream"}
        request = self._http.build_request("GET", path, params=_present(query), headers=headers)
        request.extensions["timeout"] = {"connect": 5.0, "write": 5.0, "pool": 5.0, "read": silence()}
        answer = self._send(lambda: self._open(request))
        try:
            for event, data in parse_events(_watched(answer.iter_bytes(), silence)):
                if event == "error":
                    raise raised(decode(data, api.Problem))
                yield decode(data, kind)
        except httpx.TransportError:
            return
        finally:
            answer.close()

    def _open(self, request: httpx.Request) -> httpx.Response:
        answer = self._http.send(request, stream=True)
        if answer.status_code >= 400:
            answer.read()
        return answer

    def _request_id(self) -> str:
        return new_request_id(self.seq if self.seq is not None else self.status().ledger.seq)

    def _saw(self, seq: int) -> None:
        self.seq = max(self.seq or 0, seq)


def _watched(chunks: Iterable[bytes], silence: Callable[[], float | None]) -> Iterator[bytes]:
    """Pass *chunks* on; *silence* raises when the time is up, also while only keep-alives come."""
    for chunk in chunks:
        silence()
        yield chunk


def _chunks(path: Path, sent: Callable[[int], None]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            sent(len(chunk))


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
