"""A short run of what `make chaos` does for longer: faults at three members under load, and at the end everything is accounted for.

The tests of this file share one control plane and one history, and run in their order; the last one checks all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from chaos.history import History
from chaos.run import Driver, Plan, Report, finish, workload
from chaos.schedule import Fault, Step
from chaos.site import Site
from chaos.workload import Client, Prober
from cluster_site import Host, missing_tools, until

pytestmark = [
    pytest.mark.root,
    pytest.mark.timeout(300),
    pytest.mark.xdist_group("chaos"),
    pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}"),
]
WRITES = 100


@dataclass
class Scene:
    plan: Plan
    site: Site
    history: History
    workers: list[Client | Prober]
    driver: Driver
    report: Report

    def step(self, *faults: Fault, work: str = "nothing") -> None:
        self.driver.step(Step(0, work, faults))

    def write_on(self, count: int = WRITES) -> None:
        """Return when so many more writes were answered."""
        goal = self.history.writes_done() + count
        until(lambda: self.history.writes_done() >= goal, 60, f"{count} writes")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    plan = Plan(seed=1, seconds=0, tenements=0, epoch_entries=300, pace_s=0.05)
    history, report = History(), Report(plan.seed)
    with Site(epoch_entries=plan.epoch_entries) as site:
        with site.begin(plan.members):
            site.populate(0)
            with workload(plan, site, history) as workers:
                yield Scene(plan, site, history, workers, Driver(plan, site, history, report, print), report)


def elections(site: Site, after: int) -> int:
    """Return how often a leader began since event *after*, beside going on in the next epoch."""
    kinds = ("leader_started", "epoch_sealed")
    page = f"&after={after}&limit=1000"
    started, sealed = (len(site.ask(site.hosts["m2"], f"/v1/events?kind={kind}{page}")) for kind in kinds)
    return started - sealed


def newest_event(site: Site) -> int:
    (event,) = site.ask(site.hosts["m2"], "/v1/events?newest=1&limit=1")
    return int(event["number"])


def pairs(site: Site) -> dict[str, tuple[Host, Host]]:
    leader = until(site.leads, 20, "a leader")
    first, second = (site.hosts[name] for name in site.members if name != leader.name)
    return {"leader and follower": (leader, first), "two followers": (first, second)}


@pytest.mark.parametrize("which", ["leader and follower", "two followers"])
def test_two_that_do_not_reach_each_other_do_not_depose_the_leader_in_turns(scene: Scene, which: str) -> None:
    one, other = pairs(scene.site)[which]
    leader_is_cut = which == "leader and follower"
    before = newest_event(scene.site)
    scene.site.cut(one, other)
    try:
        # Some seconds, many times what an election takes, where somebody has no leader.
        scene.write_on(4 * WRITES if leader_is_cut else WRITES)
    finally:
        scene.site.heal(one)
    scene.site.until_whole(60)
    # A machine that stands still for a second may cost one.
    assert elections(scene.site, before) <= 1


def test_a_leader_that_is_cut_off_refuses_and_says_its_age_and_then_a_majority_is_killed(scene: Scene) -> None:
    scene.step(Fault("cut", "leader", 0, 0.0, 3.5))
    assert scene.report.problems == []
    scene.step(Fault("kill", "majority", 3, 0.0, 0.0), Fault("mute", "leader", 0, 0.1, 1.0))
    scene.write_on()


def test_all_disks_are_full_and_all_machines_lose_power(scene: Scene) -> None:
    scene.step(Fault("brim", "all", 0, 0.0, 2.0))
    scene.step(Fault("off", "all", 0, 0.0, 0.2))
    scene.write_on()


def test_what_was_answered_happened_once_in_one_order_on_all_members(scene: Scene) -> None:
    for worker in scene.workers:
        worker.stop()
    for worker in scene.workers:
        worker.join(90)
    assert scene.history.writes_done() > 3 * WRITES
    finish(scene.plan, scene.site, scene.history, scene.workers, scene.report)
    assert scene.report.problems == [], scene.report
