"""Clients of the API: each a thread that writes and reads, insists under the same request id, and writes down what it was told.

The register is a whole fleet that is swapped for another on a named revision, its value unique; counters are restarts that
were asked of instances that never run. A fresh read shows all of them at once.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from cluster_site import Host

from chaos.history import Asked, History
from chaos.site import KEYS, REGISTER, Line, Site, at_socket, enter_netns
from slum import api
from slum.ledger.commands import new_request_id
from slum.model import Fleet, SshHost, SshOperator

ANSWER_S = 8.0
PATIENCE_S = (3.0, 45.0, 45.0, 45.0, 45.0, 45.0)
"""For how long a client insists: some give up early, and never learn what came of it."""
AGAIN_S = 0.05
ROAM = 0.5
"""How often a client that is not answered tries another member."""


class Client(threading.Thread):
    """Works at *home* through its socket, or, where *inside* is a host, from there through the fronts."""

    def __init__(
        self,
        site: Site,
        history: History,
        name: str,
        home: Host,
        seed: int,
        *,
        inside: Host | None = None,
        pace_s: float,
    ) -> None:
        super().__init__(name=f"client {name}", daemon=True)
        self._site, self._history, self._me, self._home = site, history, name, home
        self._chance = random.Random(f"{seed}/{name}")
        self._inside = inside
        self._pace_s = pace_s
        self._numbers = itertools.count(1)
        self._ended = threading.Event()
        self._lines: dict[str, Line] = {}
        self._dials: dict[str, Callable[[], socket.socket]] = {}
        if inside is not None:
            self._dials = {member: site.front(site.hosts[member]) for member in site.members}
        self.failed: BaseException | None = None

    def stop(self) -> None:
        """Let what is under way be answered, within its patience, and begin nothing more."""
        self._ended.set()

    def run(self) -> None:
        try:
            if self._inside is not None:
                enter_netns(self._inside)
            while not self._ended.wait(self._pace_s * self._chance.uniform(0.3, 1.7)):
                self._one()
        except Exception as error:  # noqa: BLE001  the run reports it: a client that is gone would prove nothing
            self.failed = error
        finally:
            for line in self._lines.values():
                line.close()

    def _one(self) -> None:
        kind = self._chance.choices(("add", "swap", "fresh", "seen"), (50, 15, 25, 10))[0]
        asked = Asked(id=f"{self._me}-{next(self._numbers)}", kind=kind, member=self._home.name)
        if kind == "add":
            asked.key = self._chance.choice(KEYS)
            self._write(asked, "POST", "/v1/actions", self._restart(asked))
        elif kind == "swap":
            body = self._swap(asked)
            if body is not None:
                self._write(asked, "PUT", "/v1/fleet", body)
        else:
            self._read(asked)

    def _restart(self, asked: Asked) -> bytes:
        return msgspec.json.encode(
            api.ActionRequest(
                verb="restart",
                service="counters",
                id=asked.key,
                tenement="m1",
                request_id=self._request_id(),
                host=asked.id,
            )
        )

    def _swap(self, asked: Asked) -> bytes | None:
        """Return a swap of the fleet that this member shows, which may be an old one; None when it shows none."""
        answer = self._ask(self._home, "GET", "/v1/fleet")
        if answer is None or answer[0] != 200:
            return None
        shown = msgspec.json.decode(answer[1], type=api.FleetDoc)
        asked.expected = register_of(shown.fleet)
        new = SshOperator(name=REGISTER, hosts=(SshHost(host=asked.id),))
        operators = tuple(new if operator.name == REGISTER else operator for operator in shown.fleet.operators)
        return msgspec.json.encode(
            api.ApplyRequest(
                fleet=msgspec.structs.replace(shown.fleet, operators=operators),
                base_revision=shown.revision,
                request_id=self._request_id(),
                host=asked.id,
            )
        )

    def _write(self, asked: Asked, method: str, path: str, body: bytes) -> None:
        """Send the same request until it is answered for good, here or at another member, or patience is gone."""
        at = self._home
        end = time.monotonic() + self._chance.choice(PATIENCE_S)
        self._history.begin(asked)
        while True:
            asked.tries += 1
            answer = self._ask(at, method, path, body)
            if answer is not None:
                status, text = answer
                if status in (200, 409):
                    self._history.end(asked, "done" if status == 200 else "conflict", json.loads(text).get("seq", 0))
                    return
                asked.why = text[:300]
                if status not in (500, 502, 503, 504):
                    self._history.end(asked, "refused")
                    return
            if time.monotonic() > end:
                return
            if self._chance.random() < ROAM:
                at = self._chance.choice(self._members())
            time.sleep(AGAIN_S * self._chance.uniform(0.5, 2))

    def _read(self, asked: Asked) -> None:
        """A read that nobody answers is none."""
        self._history.begin(asked)
        answer = self._ask(self._home, "GET", "/v1/state?fresh=1" if asked.kind == "fresh" else "/v1/state")
        if answer is None or answer[0] != 200:
            return
        shown = json.loads(answer[1])
        asked.register = shown_register(shown)
        asked.counters = {
            row["id"]: row.get("restarts", 0) for row in shown["overrides"].get("m1", ()) if row["service"]
        }
        self._history.end(asked, "done", shown["seq"])

    def _ask(self, at: Host, method: str, path: str, body: bytes | None = None) -> tuple[int, str] | None:
        """Return status and text, or None when there was no whole answer: nobody knows what happened then."""
        line = self._lines.get(at.name)
        if line is None:
            dial = self._dials.get(at.name) or (lambda: at_socket(at, ANSWER_S))
            line = self._lines[at.name] = Line(dial)
        headers = {"content-type": "application/json"} if body else {}
        try:
            answer = line.ask(method, path, body, headers)
        except (OSError, http.client.HTTPException):
            return None
        return answer.status, answer.text

    def _members(self) -> Sequence[Host]:
        names = self._dials or self._site.members
        return [self._site.hosts[name] for name in list(names)]

    def _request_id(self) -> str:
        return new_request_id(self._history.newest_seq)


def register_of(fleet: Fleet) -> str:
    found = next(operator for operator in fleet.operators if operator.name == REGISTER)
    return found.hosts[0].host if isinstance(found, SshOperator) else ""


def shown_register(state: Mapping[str, Any]) -> str:
    found = next(operator for operator in state["fleet"]["operators"] if operator["name"] == REGISTER)
    return str(found["hosts"][0]["host"])


@dataclass
class Sight:
    at: float
    text: str


class Prober(threading.Thread):
    """Asks the service *hello* of a tenement all the time, from the tenement itself, and remembers what was not as it should be."""

    def __init__(self, host: Host, pace_s: float = 0.2) -> None:
        super().__init__(name=f"prober {host.name}", daemon=True)
        self._host, self._pace_s = host, pace_s
        self._ended = threading.Event()
        self.answers = 0
        self.words: set[str] = set()
        """What it answered: the tenement and its pid."""
        self.bad: list[Sight] = []

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        enter_netns(self._host)
        line = Line(lambda: socket.create_connection(("127.0.0.1", 8080), 10.0))
        while not self._ended.wait(self._pace_s):
            try:
                answer = line.ask("GET", "/", headers={"Host": "hello.localhost"})
            except (OSError, http.client.HTTPException) as error:
                self.bad.append(Sight(time.monotonic(), repr(error)))
                continue
            if answer.status == 200:
                self.answers += 1
                self.words.add(answer.text)
            else:
                self.bad.append(Sight(time.monotonic(), f"{answer.status} {answer.text[:200]}"))
        line.close()
