"""slum apply on a bare folder: services run, are isolated, routed, changed under traffic, and taken away again."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from e2e_site import Site, until

ECHO = Path(__file__).parent / "apps" / "echo"
pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


def echo(name: str = "web", *, version: str = "v1", more: str = "", env: str = "") -> str:
    return f'''
[S.{name}]
source = "{ECHO}"
command = "python3 app.py"
health = "/healthz"
env = {{ VERSION = "{version}"{", " + env if env else ""} }}
{more}
'''


def service_pid(site: Site) -> int:
    return next(
        int(row["pid"]) for name, row in site.children().items() if name.startswith("i/") and row["state"] == "running"
    )


def test_a_fleet_is_applied_and_answers_and_a_second_apply_touches_nothing(site: Site) -> None:
    worker = (
        '[S.tick]\ncommand = "sh -c \'while :; do echo tick; sleep 1; done\'"\nlisten = "none"\nisolation = "process"\n'
    )
    services = echo() + echo("door", more='listen = "fd"') + echo("bare", more='isolation = "process"') + worker
    first = site.apply(services)
    assert "no control plane on this machine" in first.out + first.err
    for service in ("web", "door", "bare"):
        status, body = site.get(service)
        assert (status, body.split()[0]) == (200, "v1"), service
    rows = site.ps()
    assert {key: row["report"]["phase"] for key, row in rows.items()} == {
        "web/main": "healthy",
        "door/main": "healthy",
        "bare/main": "healthy",
        "tick/main": "running",
    }
    before = site.children()
    events = site.slum("events", "--json").json
    second = site.slum("apply", "--yes")
    assert "nothing to do" in second.out
    assert site.children() == before
    assert site.slum("events", "--json").json == events
    assert site.slum("plan", check=False).code == 0
    assert site.slum("events", "--verify").code == 0


def test_plan_says_what_would_change_and_exits_10(site: Site) -> None:
    site.apply(echo())
    site.fleet(echo(version="v2"))
    ran = site.slum("plan", check=False)
    assert ran.code == 10
    assert "VERSION" in ran.out
    assert "v1" in ran.out
    document = site.slum("plan", "--json", check=False)
    assert document.code == 10
    assert document.json["summary"]["services"]["change"] == 1
    assert site.get("web")[1].startswith("v1")


@pytest.mark.parametrize("listen", ["socket", "fd"])
def test_a_changed_release_fails_no_request_under_traffic(site: Site, listen: str) -> None:
    more = f'listen = "{listen}"'
    site.apply(echo(more=more))
    stop = threading.Event()
    seen: list[str] = []
    failures: list[str] = []

    def load() -> None:
        while not stop.is_set():
            try:
                status, body = site.get("web")
            except OSError as error:
                failures.append(repr(error))
                continue
            (seen if status == 200 else failures).append(body.split()[0] if status == 200 else f"{status} {body}")

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for version in ("v2", "v3"):
            site.apply(echo(version=version, more=more))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert {"v1", "v2", "v3"} <= set(seen)
    assert site.get("web")[1].startswith("v3")


def test_a_failing_release_leaves_the_old_one_serving_and_shows_why(site: Site) -> None:
    site.apply(echo())
    settings = "max_restarts = 2\nbackoff_base_ms = 50"
    bad = site.apply(echo(version="v2", env='FAIL_START = "no such table: users"'), check=False, settings=settings)
    assert bad.code == 8, bad
    assert "no such table: users" in bad.out + bad.err
    assert "slum explain web" in bad.out + bad.err
    for number in range(20):
        assert site.get("web", f"/say?{number}")[1].startswith("v1")
    story = site.slum("explain", "web").out
    assert "exit 2" in story
    assert "no such table: users" in story
    back = site.slum("rollback", "--yes")
    assert back.code == 0
    assert site.ps()["web/main"]["report"]["phase"] == "healthy"
    fixed = site.apply(echo(version="v3"), settings=settings)
    assert fixed.code == 0
    assert site.get("web")[1].startswith("v3")


def test_instances_share_a_service_and_have_their_own_names_and_data(site: Site) -> None:
    site.apply(echo(more="memory_limit_mb = 64") + '\n[tenement.here.instances]\nweb = ["a", "b"]\n')
    env = {name: site.get(f"{name}.web", "/env")[1] for name in ("a", "b")}
    assert "SLUM_INSTANCE=a" in env["a"]
    assert "SLUM_INSTANCE=b" in env["b"]
    assert site.get("web", "/env")[1] == env["a"]
    assert site.get("c.web")[0] in (404, 503)


def test_removed_services_stop_and_destroy_takes_all(site: Site) -> None:
    site.apply(echo() + echo("other"))
    site.apply(echo())
    until(lambda: set(site.ps()) == {"web/main"}, 20, "other is gone")
    assert site.get("other")[0] in (404, 503)
    gone = site.slum("destroy", "--yes")
    assert gone.code == 0
    until(lambda: not [name for name in site.children() if name.startswith("i/")], 20, "no instance is left")


def test_stop_start_restart_one_service(site: Site) -> None:
    site.apply(echo())
    first = service_pid(site)
    site.slum("restart", "web")
    assert site.get("web")[0] == 200
    assert service_pid(site) != first
    site.slum("stop", "web")
    assert site.ps()["web/main"]["report"]["phase"] == "stopped"
    assert site.get("web")[0] == 503
    assert site.slum("plan", check=False).code == 0
    site.slum("start", "web")
    assert site.get("web")[0] == 200


def test_pre_deploy_build_secrets_and_run(site: Site) -> None:
    secret = site.folder / "secret"
    secret.write_text("hush-canary-5521\n")
    services = echo(
        more=f"""
pre_deploy = "sh -c 'echo migrated >> $DATA/migrations'"
build = "sh -c 'echo built > built.txt'"
secrets = {{ TOKEN = "file:{secret}", KEY = "env:API_KEY" }}
""",
        env='DATA = "{data_dir}"',
    )
    (site.data / "agent").mkdir(parents=True)
    site.data.chmod(0o711)
    (site.data / "agent").chmod(0o700)
    variables = site.data / "agent" / "env"
    variables.write_text("API_KEY=from-the-file\n")
    variables.chmod(0o600)
    site.apply(services)
    env = site.get("web", "/env")[1]
    assert "TOKEN=hush-canary-5521" in env
    assert "KEY=from-the-file" in env
    ran = site.slum("run", "web", "--", "sh", "-c", "cat $DATA/migrations; cat built.txt; exit 7", check=False)
    assert ran.code == 7, ran
    assert ran.out.split() == ["migrated", "built"]
    done = site.slum("exec", "web", "--", "sh", "-c", "echo $SLUM_SERVICE")
    assert done.out.strip() == "web"
    site.apply(services.replace('"v1"', '"v2"'))
    again = site.slum("run", "web", "--", "sh", "-c", "cat $DATA/migrations")
    assert again.out.split() == ["migrated", "migrated"]
    for folder in (site.data / "state", site.data / "agent", site.data / "logs", site.run):
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                assert b"hush-canary" not in file.read_bytes(), file
    for _pid, command in site.processes():
        assert "hush-canary" not in command


def test_logs_are_read_filtered_and_followed(site: Site) -> None:
    site.apply(
        '[S.tick]\ncommand = "sh -c \'i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.1; done\'"\nlisten = "none"\n'
    )
    until(lambda: "tick 5" in site.slum("logs", "tick").out, 10)
    assert "tick 1\n" in site.slum("logs", "tick", "--grep", "tick 1$").out
    assert len(site.slum("logs", "tick", "--tail", "3").out.splitlines()) == 3
    follower = site.popen("logs", "tick", "-f", "--tail", "1")
    assert follower.stdout is not None
    lines = [follower.stdout.readline() for _ in range(5)]
    follower.terminate()
    follower.wait(10)
    follower.stdout.close()
    numbers = [int(line.split()[-1]) for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + 5))


def test_of_two_concurrent_applies_one_wins_and_the_other_learns_what_changed(site: Site) -> None:
    site.apply(echo())
    site.fleet(echo(version="v2"))
    ours, theirs = pty.openpty()
    slow = subprocess.Popen(
        [sys.executable, "-m", "slum.cli.main", "apply"],
        env=site.env,
        cwd=site.folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    said = b""
    while b"[y/N]" not in said:  # planned on revision 1, and waiting for consent
        said += os.read(ours, 4096)
    other = site.folder / "other"
    other.mkdir()
    site.fleet(echo(version="v3")).rename(other / "slum.toml")
    site.slum("apply", str(other / "slum.toml"), "--yes")
    os.write(ours, b"y\n")
    with contextlib.suppress(OSError):  # the terminal's end, once nobody holds its other side
        while more := os.read(ours, 4096):
            said += more
    os.close(ours)
    assert slow.wait(30) == 4, said
    assert b"conflict" in said
    assert b"VERSION" in said
    assert site.get("web")[1].startswith("v3")


def test_json_shapes(site: Site) -> None:
    site.apply(echo())
    for words in (
        ["status", "--json"],
        ["ps", "--json"],
        ["events", "--json"],
        ["explain", "web", "--json"],
        ["version", "--json"],
    ):
        json.loads(site.slum(*words).out)
