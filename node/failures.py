"""How often a release failed, when it is due again, and when its policy says that it is done. Pure.

A failure is an end that nobody asked for and that the restart policy does not accept, or a stop for being unhealthy or too
slow to start. Only healthy time counts against restart_window: a release that never gets healthy has all its failures
counted, however long its start-up and its back-off take.
"""

from __future__ import annotations

from slum.frozen import Frozen
from slum.model import Restart, Service, Settings
from slum.node.actions import Preparation
from slum.node.observed import Generation, Mark, Observed, Past


class Goal(Frozen):
    """The release that an instance is to run now: the wanted one, or the last healthy one in its place."""

    release: str
    restarts: int
    service: Service
    preparation: Preparation

    def matches(self, generation: Generation | Past | Mark) -> bool:
        return generation.release == self.release and generation.restarts >= self.restarts


class Failures(Frozen):
    """How often a release failed lately; *newest* and *oldest* are the first and the last of those still known."""

    count: int
    newest: Past
    oldest: Past


def failures(goal: Goal, seen: Observed, settings: Settings) -> Failures | None:
    """Return the failures of *goal*'s release that count, those within restart_window of healthy time; None: none."""
    found: list[Past] = []
    healthy_s, older = 0.0, 0
    for past in reversed(seen.past):
        if past.at < seen.since or healthy_s > settings.restart_window_s:
            older = 0
            break
        older = past.ordinal - 1
        if goal.matches(past) and _failed(past, goal.service.restart):
            found.append(past)
            healthy_s += past.ready_s
    return Failures(count=len(found) + older, newest=found[0], oldest=found[-1]) if found else None


def retry_at(failed: Failures | None, settings: Settings, now: float) -> float:
    """Return when the next start is due: the last failure plus base * 2^(n-1), capped; *now* after none."""
    if failed is None:
        return now
    delay_ms = min(settings.backoff_base_ms << min(failed.count - 1, 30), settings.backoff_max_ms)
    return min(failed.newest.at, now) + delay_ms / 1000


def finished(goal: Goal, seen: Observed) -> Past | None:
    """Return the newest exit after which *goal* is not to be started again by its restart policy."""
    policy = goal.service.restart
    for past in reversed(seen.past):
        if past.at < seen.since:
            return None
        if goal.matches(past) and (not past.asked or past.why):
            done = policy is Restart.NEVER or (policy is Restart.ON_FAILURE and not past.why and past.status == 0)
            return past if done else None
    return None


def marked(goal: Goal, seen: Observed) -> Mark | None:
    return next((m for m in seen.marks if goal.matches(m)), None)


def summary(failed: Failures) -> str:
    """Return "exit 2, 3 times in 2.1 s"."""
    if failed.count == 1:
        return f"{cause(failed.newest)} after {failed.newest.ran_s:.1f} s"
    span_s = failed.newest.at - failed.oldest.at + failed.oldest.ran_s
    return f"{cause(failed.newest)}, {failed.count} times in {span_s:.1f} s"


def cause(past: Past) -> str:
    """Return why *past* ended: "exit 2", "signal 9", "out of memory", "unhealthy: 3 probes failed"."""
    if past.why:
        return past.why
    return "out of memory" if past.oom else exit_words(past.status)


def exit_words(status: int | None) -> str:
    if status is None:
        return "ended unseen"
    return f"exit {status}" if status >= 0 else f"signal {-status}"


def _failed(past: Past, policy: Restart) -> bool:
    if past.why:
        return policy is not Restart.NEVER
    if past.asked or policy is Restart.NEVER:
        return False
    return policy is Restart.ALWAYS or past.status != 0
