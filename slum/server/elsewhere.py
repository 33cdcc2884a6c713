"""The agents that dialled other members, as this member knows them: what the others tell, merged into the hub's picture.

Every member so knows of every agent, whichever it dialled. Where two members claim one machine the connection that the agent
made last counts, by the agent's own clock. A member that falls silent takes its machines' sessions with it: what they run stays
known, with its age. Never acts on anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import msgspec

from slum import log, wire
from slum.node.websocket import WebSocket
from slum.server.agents import Hub, Seen, merge, merge_figures
from slum.server.memberwire import Open, Told

Opener = Callable[[str, Open], AbstractAsyncContextManager[WebSocket]]
"""Gives a connection to a member on which that Ask was answered well."""


@dataclass(slots=True, kw_only=True)
class Away:
    """The session of an agent at another member: it is pushed its config there, and asked for streams through there."""

    member: str
    machine: str
    opener: Opener
    is_open: bool = True

    def offer(self, desired: bytes) -> None:
        """Do nothing: the member that it dialled pushes."""

    def end(self, why: str) -> None:
        self.is_open = False


class Elsewhere:
    def __init__(self, hub: Hub, opener: Opener) -> None:
        self._hub = hub
        self._opener = opener
        self._troubles: dict[str, dict[str, str]] = {}

    def take(self, member: str, told: Told) -> None:
        """Merge what *member* told. Everybody who watches looks again, unless it was figures and signs of life alone."""
        is_news = bool(told.whole or told.lost or told.restarted)
        if told.whole:
            self._lose(member)
        for machine, data in told.heard:
            try:
                message = wire.from_agent.decode(data)
            except msgspec.DecodeError as error:
                log.get().warning("member_told_nonsense", member=member, machine=machine, error=str(error))
                continue
            is_news = is_news or isinstance(message, wire.Hello | wire.Report)
            if isinstance(message, wire.Hello):
                self._adopt(member, machine, message)
            else:
                self._merge(member, machine, message)
        for machine in told.lost:
            self._leave(member, machine)
        for machine, service, instance, number in told.restarted:
            seen = self._of(member, machine)
            if seen is not None:
                seen.restarted[service, instance] = number
        if not told.whole and told.at.seq:
            behind = set(told.behind)
            for machine, seen in self._all_of(member):
                if machine not in behind and seen.as_of != told.at:
                    seen.as_of, is_news = told.at, True
            if self._troubles.get(member, {}) != told.troubles:
                self._troubles[member], is_news = told.troubles, True
        if is_news:
            self._hub.changed.beat()

    def gone(self, member: str) -> None:
        """The line to *member* broke: what its agents do is not known any more."""
        self._lose(member)
        self._troubles.pop(member, None)
        self._hub.changed.beat()

    @property
    def troubles(self) -> dict[str, str]:
        """What operators did not do, by what the other members say."""
        return {machine: why for found in self._troubles.values() for machine, why in found.items()}

    def _adopt(self, member: str, machine: str, hello: wire.Hello) -> None:
        before = self._hub.seen.get(machine)
        if before is not None and before.session is not None:
            is_same = isinstance(before.session, Away) and before.session.member == member
            if not is_same and before.hello.dialled_at >= hello.dialled_at:
                return
            before.session.end(f"the agent has dialled {member} since")
        session = Away(member=member, machine=machine, opener=self._opener)
        self._hub.adopt(Seen(hello=hello, session=session, contact=time.monotonic()), machine)

    def _merge(self, member: str, machine: str, message: wire.Report | wire.Heartbeat | wire.Note) -> None:
        seen = self._of(member, machine)
        if seen is None:
            return
        seen.contact = time.monotonic()
        match message:
            case wire.Report():
                merge(seen, message)
            case wire.Heartbeat():
                merge_figures(seen, message)
            case wire.Note():
                return  # whoever hears a note commits it

    def _leave(self, member: str, machine: str) -> None:
        seen = self._of(member, machine)
        if seen is not None:
            seen.session = None

    def _lose(self, member: str) -> None:
        for machine, _ in self._all_of(member):
            self._leave(member, machine)

    def _of(self, member: str, machine: str) -> Seen | None:
        seen = self._hub.seen.get(machine)
        if seen is None or not isinstance(seen.session, Away) or seen.session.member != member:
            return None
        return seen

    def _all_of(self, member: str) -> list[tuple[str, Seen]]:
        return [(machine, seen) for machine in self._hub.seen if (seen := self._of(member, machine)) is not None]
