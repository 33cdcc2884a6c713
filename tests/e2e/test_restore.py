"""The control plane's disk is gone, services live on: restored from the backup, seen first, and the same processes again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from e2e_site import Ran, Site, until
from test_apply import echo

SERVICES = (
    echo("one")
    + """
[S.two]
command = "sleep 7772"
listen = "none"
"""
)
NEWER = """
[S.three]
command = "sleep 7773"
listen = "none"
"""


def configure(site: Site, store: Path) -> None:
    site.data.mkdir(parents=True, exist_ok=True)
    (site.data / "server.toml").write_text(f'[backup]\nurl = "file://{store}"\ninterval_ms = 100\n')


def sent(site: Site) -> int:
    """Return the ledger's sequence once the backup has all of it."""

    def done() -> int:
        found = json.loads(site.slum("backup", "status", "--json", check=False).out)
        process, head = found["process"], found["head"]
        return head["seq"] if head and process and process["seq"] == process["ledger_seq"] == head["seq"] else 0

    return int(until(done, 30, "the backup has caught up"))


def services(site: Site) -> dict[str, tuple[int, int]]:
    """(pid, start time) of each instance's process, by the child's name."""
    return {n: (row["pid"], row["start_time"]) for n, row in site.children().items() if n.startswith("i/")}


def lose_the_control_plane(site: Site) -> None:
    site.slum("down")
    shutil.rmtree(site.data / "state")
    shutil.rmtree(site.data / "backup")


def test_total_loss_of_the_control_plane_changes_no_process(site: Site, tmp_path: Path) -> None:
    store = tmp_path / "store"
    configure(site, store)
    site.apply(SERVICES)
    before = services(site)
    assert len(before) == 2
    seq = sent(site)
    busy = site.slum("restore", "--from", f"file://{store}", check=False)
    assert busy.code == 2
    assert "slum down" in busy.err
    lose_the_control_plane(site)
    assert services(site) == before

    head = json.loads((store / "HEAD.json").read_text())
    restored = site.slum("restore", "--from", f"file://{store}", "--json").json
    assert head["seq"] >= seq
    assert (restored["seq"], restored["chain"], restored["missing"]) == (head["seq"], head["chain"], [])
    site.slum("up")
    shown = site.slum("resume", "--json").json
    assert (shown["paused"], shown["resumed"], shown["steps"]) == (True, False, [])
    assert "slum resume" in site.slum("status").out
    site.slum("resume", "--yes")
    until(lambda: {row["report"]["phase"] for row in site.ps().values()} == {"healthy", "running"}, 20)
    assert site.slum("plan", check=False).code == 0
    assert site.slum("events", "--verify").code == 0
    site.slum("restart", "one")
    after = services(site)
    assert set(before.values()) & set(after.values()), "the other one still is the same process"
    assert sent(site) > seq, "the backup goes on, in a claim of the new generation"


def test_an_old_state_touches_nothing_that_is_newer_until_it_is_told_to(site: Site, tmp_path: Path) -> None:
    store = tmp_path / "store"
    configure(site, store)
    site.apply(SERVICES)
    old = sent(site)
    site.apply(SERVICES + NEWER)
    sent(site)
    assert "three" in site.slum("at", "--time", "0s").out
    was = site.slum("at", "--seq", str(old)).out
    assert "one" in was
    assert "three" not in was
    assert "+ service three" in site.slum("diff", str(old), "now").out
    before = services(site)
    assert len(before) == 3
    lose_the_control_plane(site)

    site.slum("restore", "--from", f"file://{store}", "--seq", str(old))
    site.slum("up")
    steps = until(lambda: site.slum("resume", "--json").json["steps"], 20)
    assert [(step["what"], step["service"]) for step in steps] == [("stop", "three")]
    refused: Ran = site.apply(SERVICES + NEWER, check=False)
    assert refused.code == 4, refused
    assert "slum resume" in refused.err
    assert site.slum("stop", "one", check=False).code == 4
    assert services(site) == before, "nothing was touched"
    no = site.slum("resume", check=False)
    assert no.code == 2, "consent is needed"
    assert "- stop" in no.out
    site.slum("resume", "--yes")
    until(lambda: len(services(site)) == 2, 30, "the newer service is stopped")
    assert set(services(site).items()) <= set(before.items())
    assert site.slum("resume").out == "nothing is paused\n"
    applied = site.apply(SERVICES + NEWER)
    assert "applied" in applied.out
