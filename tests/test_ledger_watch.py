"""Single situations in the simulation's world: clocks that are a year off, a member that is cut off from the leader alone, or from all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN = """
import sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests")
from simulation.schedule import Schedule, YEAR_S
from slum.errors import QuorumLost
from slum.ledger.commands import Barrier, Proposal
with tempfile.TemporaryDirectory() as folder:
    place = Path(folder) / "s"
    place.mkdir()
    made = Schedule(place, 14, members=3, troubles=0)
    made.switch.strays = made.nodes.stalls = 0.0
    made.switch.delay_s = 0.002
    assert not made.hurries and not made.changing and made.clocks_agree, "take another seed"
    made.go_on(4.0)
    while len(made.nodes.leading) != 1:
        made.go_on(0.1)
    (leader,) = made.nodes.leading
"""
END = """\
    made.heal()
    made.clients.calm = True
    made.settle()
    made.check()
    for node in made.nodes.all.values():
        made.nodes.stop(node)
"""
CLOCKS = """\
    wrong = leader.name if sys.argv[1] == "leader" else next(n for n in made.nodes.names if n != leader.name)
    made.nodes.all[wrong].clock_off_s = YEAR_S
    made.go_on(5.0)
    while len(made.nodes.leading) != 1:
        made.go_on(0.1)
    (after,) = made.nodes.leading
    assert after.name != wrong, "who has a wrong clock does not lead"
    assert sys.argv[1] == "leader" or after.name == leader.name, "nobody else is deposed"
    for node in made.nodes.alive:
        alarms = {(alarm.kind, alarm.member) for alarm in node.member.status().alarms}
        assert alarms == {("clock_wrong", wrong)}, (node.name, alarms)
    made.nodes.all[wrong].clock_off_s = 0.0
    made.go_on(4.0)
    assert all(node.member.status().alarms == () for node in made.nodes.alive)
    rows = after.member.state._db.execute("SELECT subject FROM events WHERE kind = 'clock_wrong'").fetchall()
    assert set(rows) == {(f"member:{wrong}",)}, rows
"""
CUT = """\
    cut = made.chance.choice([node for node in made.nodes.alive if node is not leader])
    made.cut(leader.name, cut.name)
    made.go_on(3.0)
    assert [node.name for node in made.nodes.leading] == [leader.name]
    answers = []
    made.clients.calm = True
    cut.member.proposer.submit(Proposal(command=Barrier(), request_id="", actor="t"), answers.append, seq=1)
    made.go_on(2.5)
    assert isinstance(answers[0], QuorumLost) and "has heard no leader" in answers[0].message, answers
"""
AGE = """\
    away = next(node for node in made.nodes.alive if node is not leader)
    made.isolate(away.name)
    since = made.clock.at
    for _ in range(5):
        made.write_much(leader)
        made.go_on(0.6)
    newest = leader.member.position.seq
    assert away.member.position.seq < newest, "take another seed"
    made.heal_net()
    while away.member.position.seq < newest:
        age_s = away.member.status().age_s
        assert age_s >= made.clock.at - since, (age_s, made.clock.at - since)
        made.go_on(0.001)
    made.go_on(0.5)
    assert away.member.status().age_s < 0.5
    assert leader.member.status().age_s == 0.0
    made.nodes.stop(away)
    away.up_at = made.clock.at + 3.0
    made.go_on(2.9)
    while away.member is None:
        made.go_on(0.001)
    assert away.member.status().age_s > 2.0, "who has just started knows what it knew, and not more"
    made.go_on(1.0)
    assert away.member.status().age_s < 0.5
"""


def run(what: str, whose: str = "") -> None:
    """In a process of its own, because the simulation takes the engine's clock and dice."""
    command = [sys.executable, "-c", BEGIN + what + END, whose]
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_leader_whose_clock_is_a_year_off_gives_the_lead_up() -> None:
    run(CLOCKS, "leader")


def test_a_followers_clock_that_is_a_year_off_harms_nobody() -> None:
    run(CLOCKS, "follower")


def test_who_is_cut_off_from_the_leader_alone_refuses_instead_of_hanging() -> None:
    run(CUT)


def test_what_is_shown_is_as_old_as_what_was_last_applied_of_a_leader() -> None:
    run(AGE)
