"""From a plan to a fleet that has arrived: consent, upload, commit, follow, report. Shared by apply, rollback, destroy.

Interrupted before the commit, nothing was changed; after it, the revision stays and goes on without us. Both are said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from slum import api
from slum.cli.base import Invocation, consent, print_error
from slum.cli.planview import plan_lines
from slum.cli.prepare import passing
from slum.cli.progress import Outcome, follow, label
from slum.client import Client
from slum.drift import CONVERGING
from slum.errors import EXIT_INTERRUPTED, Conflict, Unhealthy
from slum.model import Fleet
from slum.plan import Plan
from slum.render import clean, quantity, seconds, size

NAMES_MAX = 5
"""So many names an error lists; `slum ps` has the rest."""
LAST_WORDS_MAX = 3
"""So many services' last log lines are shown: the first ones tell the cause, forty would hide it."""


class Stage:
    """How far we are: what an interrupted user must know."""

    text = "interrupted; nothing was changed"


@contextmanager
def stages(asked: Invocation) -> Iterator[Stage]:
    """Give a Stage; on ctrl-C its text is the last word, and the exit code 130."""
    stage = Stage()
    try:
        yield stage
    except (KeyboardInterrupt, click.Abort):
        click.echo(err=True)
        print_error(stage.text, {"json": asked.json, "no_color": not asked.color}, exit_code=EXIT_INTERRUPTED)
        raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def deploy(
    asked: Invocation,
    client: Client,
    state: api.State,
    made: Plan,
    fleet: Fleet,
    stage: Stage,
    *,
    why: str,
    question: str = "Apply?",
    typed: str | None = None,
    bundles: Mapping[str, Path] | None = None,
    wait_s: float | None,
) -> int | None:
    """Carry out *made*, which turns *state* into *fleet*; *wait_s* None returns after the commit.

    Raises Unhealthy when something does not run as asked in the end, Conflict when somebody was faster.
    """
    show(asked, made)
    if not made.actions:
        return _without_commit(asked, client, state, made, wait_s)
    if not consent(asked, question, typed=typed):
        asked.note("nothing was changed")
        return 2
    started = time.monotonic()
    _upload(asked, client, bundles or {})
    stage.text = "interrupted while it was being committed: `slum status` tells the revision"
    done = client.apply(fleet, base_revision=state.revision, why=why)
    stage.text = f"interrupted; revision {done.revision} stays committed and goes on. `slum ps` shows it, `slum rollback` undoes it"
    if wait_s is None:
        _emit(asked, made, done.revision, None, started)
        asked.say(f"committed revision {done.revision}; `slum ps` shows how it arrives")
        return None
    asked.say()
    outcome = follow(asked, client, done.revision, timeout_s=wait_s)
    _emit(asked, made, done.revision, outcome, started)
    judge(asked, outcome, done.revision, wait_s)
    asked.say(f"applied revision {done.revision} in {seconds(time.monotonic() - started)}; `slum ps` lists what runs")
    return None


def show(asked: Invocation, made: Plan) -> None:
    for line in plan_lines(made, asked.paint):
        asked.say(line)


def nothing_to_do(asked: Invocation, made: Plan) -> None:
    """Say so of a plan without actions, on a machine whose control plane need not be started for that."""
    show(asked, made)
    _emit(asked, made, made.revision_from, None, time.monotonic())


def judge(asked: Invocation, outcome: Outcome, revision: int, wait_s: float) -> None:
    """Show the last words of what failed; raise Unhealthy or Conflict unless all has arrived."""
    if outcome.replaced:
        raise Conflict(outcome.replaced, hint="`slum status` shows what holds now")
    told = [step.name for step in outcome.failed if step.logs][:LAST_WORDS_MAX]
    for step in outcome.failed:
        if step.name in told:
            asked.say(f"  last words of {label(step.name)}:")
            for line in step.logs:
                asked.say(f"    {clean(line)}".rstrip())
        elif asked.quiet:
            asked.say(f"  {label(step.name)}: {step.state}  {clean(step.detail)}".rstrip())
    if not outcome.failed and outcome.in_time:
        return
    services = list(dict.fromkeys(step.service for step in (*outcome.failed, *outcome.waiting) if step.service))
    names = _named([label(step.name) for step in outcome.failed or outcome.waiting])
    what = "not well" if outcome.failed else f"not there after {seconds(wait_s)}; it goes on"
    machine = any(step.what == "tenement" for step in outcome.failed or outcome.waiting)
    look = f"`slum explain {services[0]}`" if services and not machine else "`slum status`"
    raise Unhealthy(
        f"revision {revision} is committed, but {names} {'are' if ',' in names or ' and ' in names else 'is'} {what}",
        hint=f"{look}, or `slum rollback`" if revision > 1 else look,
    )


def _named(names: list[str]) -> str:
    """Return "a, b, c" with at most NAMES_MAX of them and how many more there are."""
    unique = list(dict.fromkeys(names))
    more = len(unique) - NAMES_MAX
    shown = ", ".join(unique[:NAMES_MAX])
    return f"{shown} and {more} more" if more > 0 else shown or "the fleet"


def _without_commit(
    asked: Invocation, client: Client, state: api.State, made: Plan, wait_s: float | None
) -> int | None:
    """Nothing to commit: the fleet is declared so already; but it may not have arrived yet."""
    settled = not made.drift and all(view.report.phase not in CONVERGING for view in state.instances)
    started = time.monotonic()
    if settled or wait_s is None:
        _emit(asked, made, state.revision, None, started)
        return None
    asked.say("nothing to commit; following what has not arrived yet")
    outcome = follow(asked, client, state.revision, timeout_s=wait_s)
    _emit(asked, made, state.revision, outcome, started)
    judge(asked, outcome, state.revision, wait_s)
    return None


def _upload(asked: Invocation, client: Client, bundles: Mapping[str, Path]) -> None:
    """Send each bundle that the control plane lacks."""
    absent = {digest: path for digest, path in bundles.items() if not client.has_blob(digest)}
    for digest, path in absent.items():
        with passing(asked, f"uploading {size(path.stat().st_size)}") as say:
            total, sent = path.stat().st_size, 0

            def moved(amount: int, total: int = total) -> None:
                nonlocal sent
                sent += amount
                say(f"uploading {size(min(sent, total))} of {size(total)}")

            client.put_blob(digest, path, sent=moved)
    if absent and not asked.json:
        total = sum(path.stat().st_size for path in absent.values())
        asked.note(f"  uploaded {quantity(len(absent), 'bundle')}, {size(total)}")


def _emit(asked: Invocation, made: Plan, revision: int, outcome: Outcome | None, started: float) -> None:
    """With --json: the one document of apply, rollback and destroy."""
    if asked.json:
        asked.emit(
            {
                "revision": revision,
                "changed": bool(made.actions),
                "waited": outcome is not None,
                "ok": outcome is None or (outcome.in_time and not outcome.failed and not outcome.replaced),
                "failed": [step.name for step in outcome.failed] if outcome else [],
                "waiting": [step.name for step in outcome.waiting] if outcome else [],
                "took_s": round(time.monotonic() - started, 3),
                "plan": made,
            }
        )
