"""Following a change until it has arrived: live on a terminal, plain lines in a pipe, JSON lines on stderr with --json.

Input is the API's progress stream; the answer is an Outcome. It changes nothing, and being interrupted changes nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from slum import api
from slum.cli.base import Invocation
from slum.client import Client
from slum.render import PHASE_STYLE, clean, instance_name, seconds

if TYPE_CHECKING:
    from rich.text import Text

Show = Callable[[api.Progress], None]
TELLING = frozenset({"building", "waiting", "creating", "refused", "failed", "backoff", "unhealthy", "degraded"})


class Outcome(NamedTuple):
    """How a change ended: the last step of each machine ("here") and instance ("here/notes/main") that is concerned."""

    failed: tuple[api.Progress, ...]
    waiting: tuple[api.Progress, ...]
    """What had not arrived when the time was up; empty otherwise."""
    in_time: bool
    replaced: str = ""
    """Said when somebody committed another revision meanwhile."""


def follow(
    asked: Invocation,
    client: Client,
    revision: int,
    *,
    timeout_s: float | None,
    only: frozenset[str] | None = None,
) -> Outcome:
    """Show what happens towards *revision* until all of it (or of the instances in *only*) has arrived."""
    latest: dict[str, api.Progress] = {}
    replaced, in_time = "", True
    with _shown(asked) as show:
        try:
            for step in client.progress(revision, timeout_s=timeout_s):
                if step.what == "done":
                    replaced = "" if step.ok or step.failed else step.detail
                    break
                if only is not None and step.name not in only:
                    continue
                if latest.get(step.name) != step:
                    latest[step.name] = step
                    show(step)
                if only is not None and len(latest) == len(only) and all(s.final for s in latest.values()):
                    break
        except TimeoutError:
            in_time = False
    steps = [latest[name] for name in sorted(latest)]
    return Outcome(
        failed=tuple(step for step in steps if step.final and not step.ok),
        waiting=() if in_time else tuple(step for step in steps if not step.final),
        in_time=in_time,
        replaced=replaced,
    )


@contextmanager
def _shown(asked: Invocation) -> Iterator[Show]:
    if asked.json:
        yield lambda step: None if asked.quiet else asked.emit_line(step, err=True)
    elif asked.quiet:
        yield lambda step: None
    elif asked.color and sys.stdout.isatty():
        with _live() as show:
            yield show
    else:
        yield _plain(asked)


def _plain(asked: Invocation) -> Show:
    """One line for each thing that arrived, and one for each state on the way that makes the reader wait."""
    said: set[tuple[str, str, str]] = set()
    started = time.monotonic()

    def show(step: api.Progress) -> None:
        if step.final or step.state in TELLING or step.detail:
            now = (step.name, step.state, step.detail if step.final else "")
            if now not in said:
                said.add(now)
                name, state, took = _words(step, time.monotonic() - started)
                asked.say(f"  {name:<20}  {state:<36}  {took}".rstrip())

    return show


@contextmanager
def _live() -> Iterator[Show]:
    """A page redrawn in place, seconds running: what does not fit is counted, and at the end all of it is printed."""
    from rich.console import Console
    from rich.live import Live

    latest: dict[str, api.Progress] = {}
    started = time.monotonic()
    ended = False
    console = Console(highlight=False)

    def page() -> Text:
        # A copy: the page is drawn by a thread of its own.
        return live_page(list(latest.values()), time.monotonic() - started, None if ended else console.height - 1)

    def show(step: api.Progress) -> None:
        latest[step.name] = step

    with Live(get_renderable=page, console=console, refresh_per_second=8):
        yield show
        ended = True


def live_page(steps: Sequence[api.Progress], elapsed_s: float, lines_max: int | None = None) -> Text:
    """Return *steps* one a line; of more than *lines_max* those that are on their way or failed, and how many others."""
    from rich.text import Text

    styles = {"good": "green", "bad": "red", "warn": "yellow", "dim": "dim"}
    shown, rest = list(steps), ""
    if lines_max is not None and len(steps) > lines_max:
        shown = sorted(steps, key=lambda step: (step.final, step.final and step.ok))[: lines_max - 1]
        arrived = sum(step.final and step.ok for step in steps)
        rest = f"\n  and {len(steps) - len(shown)} more; {arrived} of {len(steps)} arrived"
    rows = [(step, *_words(step, elapsed_s)) for step in shown]
    width = max((len(name) for _, name, _, _ in rows), default=0)
    page = Text(no_wrap=lines_max is not None, overflow="ellipsis" if lines_max is not None else "fold")
    for n, (step, name, state, took) in enumerate(rows):
        style = "bad" if step.final and not step.ok else "good" if step.final else PHASE_STYLE.get(step.state, "warn")
        page.append(f"{'' if n == 0 else chr(10)}  {name:<{width}}  ")
        page.append(f"{state:<32}", styles.get(style, ""))
        page.append(f"  {took}", "dim")
    return page.append(rest, "dim")


def _words(step: api.Progress, elapsed_s: float) -> tuple[str, str, str]:
    """Return (name, state, time) of *step* as people read them."""
    state = step.state + (f"  {clean(step.detail)}" if step.detail else "")
    if step.final and not step.ok and step.serving is not None:
        state += f"; generation {step.serving} still serves"
    return label(step.name), state, seconds(step.took_s if step.final else elapsed_s)


def label(name: str) -> str:
    """Return "notes" for here/notes/main, "notes/acme" for here/notes/acme, a machine's name as it is."""
    parts = name.split("/")
    if len(parts) != 3:
        return name
    return instance_name(parts[1], parts[2], alone=parts[2] == "main")
