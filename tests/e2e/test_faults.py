"""What may die, and what must not notice: kill -9 of every program of slum, a reboot, a crash loop, a hostile service."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from e2e_site import Site, until
from test_apply import echo

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]
PROGRAMS = ("agent", "server", "ledger", "router")
KILLS_S = 15.0
"""So long an apply is disturbed; then it must come to its end."""


def kill(site: Site, name: str) -> int:
    pid = site.keeper_pid() if name == "keeper" else site.pid(name)
    os.kill(pid, signal.SIGKILL)
    return pid


def service_pids(site: Site) -> dict[str, int]:
    return {
        name: row["pid"] for name, row in site.children().items() if name.startswith("i/") and row["state"] == "running"
    }


def all_back(site: Site, names: tuple[str, ...], old: dict[str, int]) -> bool:
    alive = all(Path(f"/proc/{site.pid(name)}").exists() and site.pid(name) != old[name] for name in names)
    return alive and site.get("web")[0] == 200 and site.ps()["web/main"]["report"]["phase"] == "healthy"


@pytest.mark.parametrize("names", [*((name,) for name in PROGRAMS), PROGRAMS], ids=lambda names: "+".join(names))
def test_kill_9_of_a_program_is_not_noticed_by_services(site: Site, names: tuple[str, ...]) -> None:
    site.apply(echo() + echo("door", more='listen = "fd"'))
    services = service_pids(site)
    assert len(services) == 2
    answer = site.get("web")
    old = {name: kill(site, name) for name in names}
    until(lambda: site.get("web") == answer, 15, "web answers again, with the same pid")
    until(lambda: all_back(site, names, old), 30, "all programs are back")
    assert service_pids(site) == services
    site.apply(echo(version="v2") + echo("door", more='listen = "fd"'))
    assert site.get("web")[1].startswith("v2")


def test_programs_that_hang_are_started_again_and_services_do_not_notice(site: Site) -> None:
    site.env["SLUM_SILENT_MS"] = "3000"
    site.data.mkdir()
    (site.data / "server.toml").write_text(f'[backup]\nurl = "file://{site.folder}/store"\ninterval_ms = 100\n')
    site.apply(echo() + echo("door", more='listen = "fd"'))
    services, answer = service_pids(site), site.get("web")
    telling = {"agent", "server", "ledger", "backup"}
    until(lambda: {file.name for file in (site.run / "p" / "w").iterdir()} == telling, 15, "they tell that they live")
    until(lambda: site.slum("backup", "status", check=False).code == 0, 15, "the backup works")
    litestream = site.slum("backup", "status", "--json").json["process"]["child_pid"]
    old = {name: site.pid(name) for name in (*PROGRAMS, "backup")}
    for pid in old.values():
        os.kill(pid, signal.SIGSTOP)
    until(lambda: all_back(site, (*PROGRAMS, "backup"), old), 60, "all programs are back")
    assert site.get("web") == answer
    assert service_pids(site) == services
    assert not Path(f"/proc/{litestream}").exists(), "no two write below one claim"
    until(lambda: site.slum("backup", "status", "--json", check=False).json["process"]["pid"] != old["backup"], 20)
    until(lambda: site.slum("backup", "status", check=False).code == 0, 20, "the backup goes on")


def test_kill_9_of_the_keeper_services_live_log_on_and_are_adopted(site: Site) -> None:
    tick = (
        '[S.tick]\ncommand = "sh -c \'i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done\'"\nlisten = "none"\n'
    )
    site.apply(echo() + tick)
    services = service_pids(site)
    old = kill(site, "keeper")
    assert site.get("web")[0] == 200
    until(lambda: site.keeper_pid() != old, 15, "the agent starts the next keeper")
    until(lambda: site.ps()["web/main"]["report"]["phase"] == "healthy", 20)
    assert service_pids(site) == services
    mark = len(site.slum("logs", "tick").out.splitlines())
    until(lambda: len(site.slum("logs", "tick").out.splitlines()) > mark, 10, "logs go on")
    numbers = [int(line.split()[-1]) for line in site.slum("logs", "tick").out.splitlines()]
    assert numbers == list(range(1, len(numbers) + 1)), "a line was lost"
    os.kill(services[next(name for name in services)], 0)
    site.apply(echo(version="v2") + tick)
    assert site.get("web")[1].startswith("v2")


def test_kill_9_of_everything_but_the_services(site: Site) -> None:
    site.apply(echo())
    services, answer = service_pids(site), site.get("web")
    for name in ("keeper", *PROGRAMS):
        kill(site, name)
    site.slum("up")
    until(lambda: site.get("web") == answer, 20)
    until(lambda: site.ps()["web/main"]["report"]["phase"] == "healthy", 20)
    assert service_pids(site) == services


def test_random_kills_during_applies_start_nothing_twice(site: Site, seed: int) -> None:
    chance = random.Random(seed)
    site.apply(echo())
    stop = threading.Event()
    began = time.monotonic()

    def chaos() -> None:
        while not stop.wait(chance.uniform(0.1, 0.6)):
            if time.monotonic() > began + KILLS_S:
                continue  # programs that are killed again and again are started ever later
            try:
                kill(site, chance.choice(PROGRAMS))
            except (LookupError, ProcessLookupError):
                continue

    thread = threading.Thread(target=chaos)
    thread.start()
    try:
        for number in range(2, 6):
            began = time.monotonic()
            site.apply(echo(version=f"v{number}"), check=False)
    finally:
        stop.set()
        thread.join()
    until(lambda: site.slum("apply", "--yes", check=False).code == 0, 60, "apply settles")
    until(lambda: site.get("web")[1].startswith("v5"), 20)
    until(lambda: len(service_pids(site)) == 1, 40, "one generation is left")
    assert site.slum("events", "--verify").code == 0


def reboot(site: Site) -> None:
    for name in ("keeper", *PROGRAMS):
        kill(site, name)
    until(lambda: kill_all(site) == 0, 10, "all processes are dead")
    shutil.rmtree(site.run)


def kill_all(site: Site) -> int:
    rest = site.processes()
    for pid, _command in rest:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return len(rest)


def test_a_reboot_restores_the_services(site: Site) -> None:
    site.apply(echo() + echo("door", more='listen = "fd"'))
    reboot(site)
    site.slum("up")
    until(lambda: site.get("web")[0] == 200 and site.get("door")[0] == 200, 30)
    assert site.slum("plan", check=False).code == 0


def test_sigterm_of_everything_then_the_boot_command_restores_the_desired_services(site: Site) -> None:
    once = '[S.once]\ncommand = "true"\nlisten = "none"\nrestart = "never"\n'
    site.apply(echo(more='restart = "on-failure"') + once)
    runs = len(site.slum("events", "--kind", "generation_started", "--service", "once", "--json").json)
    for pid, _command in site.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until(lambda: kill_all(site) == 0, 20, "all processes are gone")
    shutil.rmtree(site.run)
    site.slum("up")
    until(lambda: site.get("web")[0] == 200, 30)
    until(lambda: site.ps()["once/main"]["report"]["phase"] == "exited", 10)
    again = len(site.slum("events", "--kind", "generation_started", "--service", "once", "--json").json)
    assert again == runs, "what had ended for good was run again"


def test_a_reboot_restores_the_services_without_a_control_plane(site: Site) -> None:
    site.apply(echo())
    reboot(site)
    for database in (site.data / "state").rglob("*"):
        if database.is_file():
            database.write_bytes(b"not a database")
    site.slum("up", check=False, timeout=60)
    until(lambda: site.get("web")[0] == 200, 30, "the service is back although the ledger refuses to start")


def test_a_crash_loop_backs_off_fails_stays_visible_and_a_new_release_tries_again(site: Site) -> None:
    settings = "max_restarts = 3\nbackoff_base_ms = 20\nbackoff_max_ms = 100"
    ran = site.apply(echo(env='FAIL_START = "broken"'), check=False, settings=settings)
    assert ran.code == 8, ran
    assert site.ps()["web/main"]["report"]["phase"] == "failed"
    time.sleep(0.5)  # nothing shall happen: there is no condition to wait for
    exits = site.ps()["web/main"]["report"]["restarts"]
    assert exits == site.ps()["web/main"]["report"]["restarts"]
    site.apply(echo(version="v2"), settings=settings)
    assert site.get("web")[1].startswith("v2")


def test_a_crash_is_restarted_and_requests_wait_at_a_kept_listener(site: Site) -> None:
    site.apply(echo(more='listen = "fd"'), settings="backoff_base_ms = 10")
    first = site.get("web")[1].split()[1]
    with pytest.raises(AssertionError):
        assert site.get("web", "/crash")[0] == 200
    status, body = until(lambda: site.get("web", timeout=10), 10)
    assert status == 200
    assert body.split()[0] == "v1"
    assert first
    assert "exit 3" in until(lambda: site.slum("explain", "web").out, 5)


def test_unhealthy_is_restarted(site: Site) -> None:
    services = echo(env='SICK = "{data_dir}/sick"')
    site.apply(services, settings="health_check_interval = 0.2\nbackoff_base_ms = 10")
    sick = next((site.data / "services" / "web").rglob("main")) / "sick"
    before = service_pids(site)
    sick.write_text("")
    until(lambda: service_pids(site) != before, 20, "it is restarted")
    sick.unlink()
    until(lambda: site.ps()["web/main"]["report"]["phase"] == "healthy", 20)


def test_a_greedy_service_hurts_only_itself(site: Site) -> None:
    more = "memory_limit_mb = 64\npids_limit = 30"
    site.apply(echo("good") + echo("web", more=more), settings="backoff_base_ms = 10")
    good = site.get("good")
    assert int(site.get("web", "/fork", timeout=30)[1]) < 30
    assert site.get("web", "/eat", timeout=30)[0] >= 500
    until(lambda: site.get("web")[0] == 200, 20, "it is back after its out of memory")
    assert "memory" in site.slum("explain", "web").out
    assert site.get("good") == good


def test_a_gigabyte_of_logs_is_bounded_and_stalls_nobody(site: Site) -> None:
    site.apply(echo("good") + echo())
    begun = time.monotonic()
    noisy = threading.Thread(target=lambda: site.get("web", "/spam?16384", timeout=120))
    noisy.start()
    slowest = 0.0
    while noisy.is_alive():
        at = time.monotonic()
        assert site.get("good", timeout=10)[0] == 200
        slowest = max(slowest, time.monotonic() - at)
    noisy.join()
    size = sum(file.stat().st_size for file in (site.data / "logs" / "web").rglob("*"))
    assert size < 64 << 20, f"{size} bytes of logs after {time.monotonic() - begun:.1f} s"
    assert "dropped" in site.slum("logs", "web", "--grep", "dropped").out
    assert slowest < 10


def test_a_planted_symlink_reaches_nothing_of_slum(site: Site) -> None:
    site.apply(echo(more='isolation = "process"'))
    planted = site.get("web", f"/plant?{site.run}/p/api.sock")
    assert planted[0] == 200
    status, body = site.get("web", "/v1/status")
    assert status in (502, 503), body
    assert "revision" not in body


def test_down_leaves_services_and_up_finds_them(site: Site) -> None:
    site.apply(echo())
    services = service_pids(site)
    site.slum("down")
    assert site.get("web")[0] == 200
    assert service_pids(site) == services
    assert site.slum("status", check=False).code == 6
    site.slum("up")
    second = site.slum("up")
    assert "already" in second.out + second.err
    assert service_pids(site) == services
    site.slum("down", "--services")
    until(lambda: not site.processes(), 20, "nothing is left")


def test_ctrl_c_on_apply_after_the_commit_loses_nothing(site: Site) -> None:
    site.apply(echo())
    site.fleet(echo(version="v2", env='X = "1"', more="startup_timeout = 30"))
    process = site.popen("apply", "--yes")
    until(lambda: site.slum("status", "--json").json["revision"] == 2, 20)
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=20)[0]
    assert process.returncode in (0, 130), out
    until(lambda: site.get("web")[1].startswith("v2"), 20)


def test_500_restarts_leak_nothing(site: Site) -> None:
    site.apply(
        echo("keep") + '[S.flap]\ncommand = "true"\nlisten = "none"\n',
        settings="max_restarts = 1000\nbackoff_base_ms = 1\nbackoff_max_ms = 1",
        check=False,
    )

    def restarts() -> int:
        return int(site.ps()["flap/main"]["report"]["restarts"])

    def figures() -> dict[str, int]:
        return {
            "keeper fds": len(os.listdir(f"/proc/{site.keeper_pid()}/fd")),
            "agent fds": len(os.listdir(f"/proc/{site.pid('agent')}/fd")),
            "fifos": len(list((site.run / "p" / "f").iterdir())),
            "table": len(list((site.run / "p" / "k").iterdir())),
            "mounts": len(Path("/proc/self/mountinfo").read_text().splitlines()),
            "sockets": len(list((site.run / "i").rglob("*.sock"))),
        }

    until(lambda: restarts() > 20, 30)
    before = figures()
    until(lambda: restarts() > 520, 150, "500 more restarts")
    after = figures()
    for name, count in after.items():
        assert count <= before[name] + 6, (name, before, after)
    zombies = [pid for pid, _ in site.processes() if Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"]
    assert zombies == []
    assert site.get("keep")[0] == 200
