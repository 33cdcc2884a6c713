"""What the fake providers share: a real HTTP server on loopback, a clock that a test may own, and a liar.

The liar is seeded and judges each request by its method, path and count alone, so concurrency changes nothing: it refuses
for a while with 429, fails before or after the work was done, drops the connection, cuts the answer off, sends it twice,
does the work long after the caller gave up, is slow, forgets labels, and shows lists as they were some seconds ago.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import uvicorn

from slum.operators.account import Clock

JSON = "application/json"
AT_A_TIME = 4
logging.getLogger("uvicorn.error").disabled = True  # a dropped connection is meant, and told as an error


class Killed(BaseException):
    """The process ends here; like SIGKILL nothing of it may catch this."""


class SimClock:
    """Time that passes only when somebody sleeps. *fuse*, when set, burns down with each look at it and then kills."""

    def __init__(self, at: float = 0.0) -> None:
        self.at = at
        self.fuse: int | None = None
        self.deadline: float | None = None

    def now(self) -> float:
        self._burn()
        return self.at

    def wall(self) -> float:
        self._burn()
        return 1_800_000_000.0 + self.at

    async def sleep(self, seconds: float) -> None:
        self._burn()
        self.at += seconds
        if self.deadline is not None and self.at > self.deadline:
            raise TimeoutError
        await asyncio.sleep(0)

    def _burn(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                self.fuse = None
                raise Killed


class QuickClock:
    """Real time for what is counted, no time for what is waited: contract tests against a fake that is not slow."""

    def __init__(self) -> None:
        self.passed = 0.0

    def now(self) -> float:
        return time.monotonic() + self.passed

    def wall(self) -> float:
        return time.time() + self.passed

    async def sleep(self, seconds: float) -> None:
        self.passed += seconds
        await asyncio.sleep(0)


@dataclass
class Answer:
    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Call:
    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    headers: Mapping[str, str]
    life: int = 0
    """Which of the caller's processes it comes from: a dead one's requests may still arrive."""


class Refused(Exception):
    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass
class Liar:
    """How often, of a hundred, it lies in each way; all zero is an honest service without delays."""

    seed: int = 0
    storm: float = 0
    refuse: float = 0
    drop: float = 0
    fail_after: float = 0
    drop_after: float = 0
    cut: float = 0
    twice: float = 0
    again: float = 0
    late: float = 0
    slow: float = 0
    forget_labels: float = 0
    lag_s: float = 0.0
    """The most that a list is behind."""
    short_of: float = 0
    """No room for a machine now."""

    def random(self, *about: object) -> Random:
        return Random(f"{self.seed}/{'/'.join(map(str, about))}")

    def says(self, percent: float, *about: object) -> bool:
        return self.random(*about).uniform(0, 100) < percent

    def lag(self, *about: object) -> float:
        return self.random("lag", *about).uniform(0, self.lag_s)


def a_liar(seed: int) -> Liar:
    """Return a thorough liar, of a temper that the seed decides."""
    random = Random(f"temper/{seed}")
    names = ("refuse", "drop", "fail_after", "drop_after", "cut", "twice", "again", "late", "short_of")
    rates = {name: random.choice((0, 1, 4, 12)) for name in names}
    return Liar(
        seed=seed,
        storm=random.choice((0, 0.5, 2)),
        slow=random.choice((0, 10, 30)),
        forget_labels=random.choice((0, 20, 50)),
        lag_s=random.choice((0, 3, 8)),
        **rates,
    )


class Cloud:
    """A fake provider. *handle* of a subclass does the work, at once; what is lied about it is decided here."""

    provider = ""
    never_again = ()
    """Paths whose creations have no unique name: delivered twice they make two, which no caller could mend at once."""

    def __init__(self, token: str, liar: Liar | None = None, clock: Clock | None = None) -> None:
        self.token = token
        self.liar = liar or Liar()
        self.clock = clock or QuickClock()
        self.calls: list[tuple[str, str, int]] = []
        """(method, path, status), newest last; status 0 when no answer was sent."""
        self.impatient = 0
        """Calls that came although a 429 had asked to stay away."""
        self.scheme = "Bearer "
        self.planned: list[Answer | None] = []
        """Answered instead of doing the next calls, first one first; None lets one pass."""
        self.on_boot: Callable[[str, Any], None] = lambda name, given: None
        """Called with the name of a machine that was made and what it was given to start with."""
        self.on_end: Callable[[str], None] = lambda name: None
        self._counts: Counter[str] = Counter()
        self._away_until = 0.0
        self._sent_away_at = -1.0
        self._crowd = 0
        """Calls in the very moment of a 429: they were on their way already, if they are few."""
        self._storm_until = 0.0
        self._late: list[tuple[float, Call]] = []
        self._lock = threading.Lock()
        self._life = 0
        self.url = ""
        """Where the caller's process of now finds it."""

    def at(self) -> float:
        """Return the time without burning a caller's fuse."""
        at = getattr(self.clock, "at", None)
        return self.clock.now() if at is None else at

    def handle(self, call: Call) -> Answer:
        raise AssertionError("a subclass answers")

    def limits(self, at: float) -> dict[str, str]:
        """Return the headers about limits, after counting one call; raise Refused when there is nothing left."""
        return {}

    def error(self, status: int, code: str, message: str) -> Answer:
        raise AssertionError("a subclass says what its errors look like")

    def mutations(self) -> int:
        return sum(method != "GET" for method, _, _ in self.calls)

    def forget_caller(self) -> None:
        """The caller's process ended: the next one, which finds us at the new *url*, cannot know what it was asked for."""
        with self._lock:
            self._away_until, self._sent_away_at = 0.0, -1.0
            self._life += 1
            self.url = f"{self.url.partition('/life/')[0]}/life/{self._life}"

    def settle(self) -> None:
        """Do whatever is still on its way."""
        with self._lock:
            for _, call in self._late:
                self._do(call)
            self._late.clear()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve in a thread of its own until left; yields the address."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            config = uvicorn.Config(
                self, log_config=None, lifespan="off", access_log=False, timeout_graceful_shutdown=1
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name=f"fake {self.provider}")
            thread.start()
            try:
                yield self.url
            finally:
                server.should_exit = True
                thread.join()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        pairs = [part.partition("=") for part in scope["query_string"].decode().split("&") if part]
        call = Call(
            method=scope["method"],
            path=scope["path"],
            query={name: _unquoted(value) for name, _, value in pairs},
            body=json.loads(raw) if raw else None,
            headers={name.decode().lower(): value.decode() for name, value in scope["headers"]},
        )
        if lived := re.fullmatch(r"/life/(\d+)(/.*)", call.path):
            call.life, call.path = int(lived[1]), lived[2]
        transport = send.__self__.transport
        with self._lock:
            answer, how = self._answer(call)
            self.calls.append((call.method, call.path, answer.status if answer else 0))
        if answer is None:
            transport.close()
            return
        body = b"" if answer.body is None else json.dumps(answer.body).encode()
        headers = {"content-length": str(len(body)), **({"content-type": JSON} if body else {}), **answer.headers}
        if answer.status == 204:
            headers.pop("content-length")
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": encoded})
        if how == "cut" and len(body) > 1:
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            transport.close()
            return
        await send({"type": "http.response.body", "body": body})
        if how == "twice":
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            transport.write(f"HTTP/1.1 {answer.status} Again\r\n{head}\r\n".encode() + body)

    def _answer(self, call: Call) -> tuple[Answer | None, str]:
        """Return the answer (None: the connection drops) and how it is sent."""
        at = self.at()
        for due, waiting in sorted(self._late, key=lambda entry: entry[0]):
            if due <= at:
                self._late.remove((due, waiting))
                self._do(waiting)
        self._crowd = self._crowd + 1 if at == self._sent_away_at else 0
        if call.life == self._life and at < self._away_until and (self._crowd == 0 or self._crowd >= AT_A_TIME):
            self.impatient += 1
        about = f"{call.method} {call.path}"
        self._counts[about] += 1
        about += f" {self._counts[about]}"
        refused = self._refused(call, about, at)
        if refused is not None:
            return refused, ""
        liar, is_mutation = self.liar, call.method != "GET"
        if liar.says(liar.drop, "drop", about):
            return None, ""
        if is_mutation and liar.says(liar.late, "late", about):
            longest = 3.0 if self._is_nameless(call) else 60.0
            self._late.append((at + liar.random("delay", about).uniform(0, longest), call))
            return None, ""
        answer = self._do(call)
        if is_mutation and not self._is_nameless(call) and liar.says(liar.again, "again", about):
            answer = self._do(call)
        if is_mutation and liar.says(liar.fail_after, "fail", about):
            return self.error(500, "server_error", "An error occurred"), ""
        if liar.says(liar.drop_after, "after", about):
            return None, ""
        if liar.says(liar.cut, "cut", about):
            return answer, "cut"
        return answer, "twice" if liar.says(liar.twice, "twice", about) else ""

    def _refused(self, call: Call, about: str, at: float) -> Answer | None:
        if call.headers.get("authorization") != self.scheme + self.token:
            return self.error(401, "unauthorized", "unable to authenticate")
        if self.planned and (planned := self.planned.pop(0)) is not None:
            return self._sent_away(planned, at, call) if planned.status == 429 else planned
        try:
            limits = self.limits(at)
        except Refused as refused:
            return self._sent_away(refused.answer, at, call)
        if at >= self._storm_until and self.liar.says(self.liar.storm, "storm", about):
            self._storm_until = at + self.liar.random("long", about).uniform(5, 60)
        if at < self._storm_until:
            answer = self.error(429, "rate_limit_exceeded", "limit reached")
            answer.headers |= {**limits, "Retry-After": str(int(self._storm_until - at) + 1)}
            return self._sent_away(answer, at, call)
        if self.liar.says(self.liar.refuse, "refuse", about):
            return self.error(503, "unavailable", "try again later")
        return None

    def _sent_away(self, answer: Answer, at: float, call: Call) -> Answer:
        if call.life != self._life:
            return answer  # nobody hears it
        self._sent_away_at, self._crowd = at, 0
        self._away_until = max(self._away_until, at + float(answer.headers.get("Retry-After", 1)))
        return answer

    def _do(self, call: Call) -> Answer:
        try:
            return self.handle(call)
        except Refused as refused:
            return refused.answer

    def _is_nameless(self, call: Call) -> bool:
        return call.method == "POST" and any(re.search(pattern, call.path) for pattern in self.never_again)


@dataclass
class Seen:
    """When a thing came and went, and how late a list learns either."""

    born: float
    lag: float = 0.0
    died: float | None = None

    def is_there(self, at: float) -> bool:
        return self.died is None or at < self.died

    def is_listed(self, at: float) -> bool:
        return self.born + self.lag <= at and (self.died is None or at < self.died + self.lag)


Route = tuple[str, re.Pattern[str], Callable[..., Answer]]


def _unquoted(value: str) -> str:
    from urllib.parse import unquote_plus

    return unquote_plus(value)
