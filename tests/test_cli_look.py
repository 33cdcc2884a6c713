"""ps, status, events, explain, logs, stop: what people read, word for word, on fixed data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from datetime import UTC

import msgspec
import pytest
from cli_support import Desk, desk  # noqa: F401 - fixtures
from fakes.api import START, FakeFleet

from slum import api, render, wire
from slum.cli.progress import live_page
from slum.cli.story import explain_lines
from slum.cli.target import moment, span_s
from slum.cli.views import cluster_lines, event_lines, ps_lines, status_lines
from slum.errors import ConfigError
from slum.model import Fleet, Label, LocalOperator, Service, Tenement
from slum.render import plain

NOW = START + 3600


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def world() -> FakeFleet:
    fake = FakeFleet()
    notes = Service(name="notes", command=("python", "app.py"))
    services = (notes, Service(name="web", command=("x",), instances=("acme", "b"), isolation="process"))  # type: ignore[arg-type]  # a StrEnum's value

    def fleet(*services: Service) -> Fleet:
        tenement = Tenement(name="here", operator="local", services=services, labels=(Label(name="a", value="b"),))
        return Fleet(name="quickstart", operators=(LocalOperator(name="local"),), tenements=(tenement,))

    fake.set_fleet(fleet(*services))
    fake.event("service_added", "service:notes", seq=fake.event_list[-1].seq, after={"command": ["python", "app.py"]})
    fake.broken = {"notes"}
    bad = msgspec.structs.replace(notes, command=("python", "ap.py"))
    fake.set_fleet(fleet(bad, services[1]))
    fake.event(
        "service_changed",
        "service:notes",
        seq=fake.event_list[-1].seq,
        before={"tenement": "here", "command": ["python", "app.py"], "env": {"A": "sha256:1"}},
        after={"tenement": "here", "command": ["python", "ap.py"], "env": {"A": "sha256:2", "B": "sha256:3"}},
    )
    subject, generation = "instance:here/notes/main", {"generation": 2, "release": "ab" * 32}
    fake.event("generation_started", subject, why="pid 4121", after=generation)
    fake.event("instance_exited", subject, why="exit 2 after 0.2 s", after=generation)
    fake.event("instance_failed", subject, why="given up after 3 starts", after={"release": "ab" * 32})
    return fake


def test_ps() -> None:
    fake = world()
    assert "\n".join(ps_lines(tuple(fake.views.values()), NOW, plain)) == (
        "SERVICE  ID    TENEMENT  LEVEL      STATE    AGE     CPU    MEM      REQUESTS  RESTARTS  URL\n"
        "notes    main  here      namespace  failed   59 min  1.0 %  14.0 MB  7         2         http://notes.localhost:8080"
        "  exit 2, 3 times in 2.1 s; generation 1 of the release before serves\n"
        "web      acme  here      process    healthy  59 min  1.0 %  14.0 MB  7         0         http://web.localhost:8080\n"
        "web      b     here      process    healthy  59 min  1.0 %  14.0 MB  7         0         http://web.localhost:8080"
    )
    assert ps_lines((), NOW, plain) == ["nothing runs here: `slum apply` a slum.toml"]


def test_ps_fits_a_narrow_terminal_and_keeps_what_matters() -> None:
    views = tuple(world().views.values())
    wide = ps_lines(views, NOW, plain)
    assert ps_lines(views, NOW, plain, 400) == wide
    narrow = ps_lines(views[:1], NOW, plain, 100)
    assert narrow[0].split() == ["SERVICE", "ID", "STATE", "URL"]
    assert "failed" in narrow[1]
    assert "exit 2" in narrow[1]
    assert len(narrow[1]) < len(wide[1])


def test_ps_says_which_generation_serves_while_a_new_release_fails() -> None:
    view = world().views["here/notes/main"]
    report = msgspec.structs.replace(
        view.report, release="b" * 64, generation=4, serving=1, serving_release="a" * 64, detail="exit 2"
    )
    line = ps_lines((msgspec.structs.replace(view, report=report),), NOW, plain)[1]
    assert line.endswith("exit 2; generation 1 of the release before serves")


def test_ps_marks_what_is_not_known_now() -> None:
    view = msgspec.structs.replace(next(iter(world().views.values())), stale_s=90.0)
    line = ps_lines((view,), NOW, plain)[1]
    assert "unknown" in line
    assert line.endswith("failed when last seen 90 s ago")


def test_status() -> None:
    fake = world()
    status = fake.status()
    assert "\n".join(status_lines(status, tuple(fake.views.values()), plain)) == (
        "control plane  running for 60 min, version 0.1.0, pid 4242 (data /var/lib/slum)\n"
        "ledger         leader m1, epoch 4, sequence 107\n"
        "fleet          quickstart, revision 2, domain localhost\n"
        "instances      2 healthy, 1 failed\n"
        "\n"
        "TENEMENT  OPERATOR  STATE  HOST  CONTACT    LOAD  MEMORY FREE  INSTANCES\n"
        "here      local     ready  box   0.2 s ago  0.25  3.0 GB       3\n"
        "\n"
        "notes is not well: `slum explain notes`"
    )
    assert "\n".join(cluster_lines(fake.cluster(), plain)) == (
        "MEMBER  ROLE    EPOCH  SEQ  LAG  CONTACT  ADDRESS\n"
        "m1      leader  4      107  -    -        10.0.0.1:7444\n"
        "m2      down    -      -    35   14 s     10.0.0.2:7443  its API is not reached\n"
        "\n"
        "leader m1, term 2, generation 1; as m1 knows it"
    )
    hung = msgspec.structs.replace(status, ledger=msgspec.structs.replace(status.ledger, silent_s=75.0))
    lines = status_lines(hung, (), plain)
    assert lines[1] == "ledger         does not answer; what it last said 75 s ago: leader m1, epoch 4, sequence 107"
    assert lines[-1].startswith("nothing can be changed until the ledger answers")
    alone = msgspec.structs.replace(status, ledger=msgspec.structs.replace(status.ledger, majority=False, age_s=12.0))
    assert "cut off: no majority is in reach, what is shown is 12 s old or older" in status_lines(alone, (), plain)[1]
    empty = FakeFleet().status()
    assert status_lines(empty, (), plain)[-1] == "nothing is declared yet: `slum init`, then `slum apply`"


def test_events() -> None:
    assert event_lines(world().event_list, NOW, plain)[1:] == [
        "22:13:22       2  service_added           service:notes                 root@test           command python app.py",
        "22:13:23       3  fleet_applied           fleet:quickstart              root@test           revision 2",
        "22:13:24       4  service_changed         service:notes                 root@test"
        "           command python app.py -> python ap.py, env.A sha256:1 -> sha256:2, env.B none -> sha256:3",
        "22:13:25       5  generation_started      instance:here/notes/main      root@test"
        "           pid 4121, generation 2, release abababababab",
        "22:13:26       6  instance_exited         instance:here/notes/main      root@test"
        "           exit 2 after 0.2 s, generation 2, release abababababab",
        "22:13:27       7  instance_failed         instance:here/notes/main      root@test"
        "           given up after 3 starts, release abababababab",
    ]


def test_explain_a_service_that_failed() -> None:
    fake = world()
    told = api.Explanation(
        service="notes",
        instances=(fake.views["here/notes/main"],),
        events=tuple(fake.event_list),
        logs=tuple(line for line in fake.lines if line.service == "notes"),
        desired="revision 2, release ab12, by root@test",
    )
    assert "\n".join(explain_lines(told, NOW, plain)) == (
        "notes on here is serving generation 1; generation 2 is failed: exit 2, 3 times in 2.1 s\n"
        "  desired: revision 2, release ab12, by root@test\n"
        "  22:13:22  revision 1 applied by root@test: added\n"
        "  22:13:24  revision 2 applied by root@test: command python app.py -> python ap.py, env.A sha256:1 -> sha256:2,"
        " env.B none -> sha256:3\n"
        "  22:13:25  generation 2 started (pid 4121)  exit 2 after 0.2 s\n"
        "  22:13:27  failed: given up after 3 starts\n"
        "  22:13:41  generation 3 ended               exit 2 after 0.1 s\n"
        "  22:13:42  generation 4 ended               exit 2 after 0.1 s\n"
        "  last log lines:\n"
        "    no module named 'ap'\n"
        "  next: fix the cause and `slum apply`, or `slum rollback`; what serves goes on meanwhile"
    )


@pytest.mark.parametrize(
    ("phase", "serving", "starts", "next_step"),
    [
        ("healthy", 1, "notes on here is healthy for 59 min: generation 1 serves (pid 4121)", "nothing to do"),
        ("degraded", 1, "notes on here is degraded for 59 min: generation 1 serves", "three failed probes"),
        ("failed", None, "notes on here is failed for 59 min", "`slum restart notes` to try again"),
        ("stopped", None, "notes on here is stopped for 59 min", "`slum start notes`"),
        ("exited", None, "notes on here is exited for 59 min", "`slum restart notes` runs it again"),
        ("pending", None, "notes on here is pending for 59 min", "wait; `slum logs notes -f`"),
    ],
)
def test_explain_says_what_to_do_in_every_state(phase: str, serving: int | None, starts: str, next_step: str) -> None:
    view = world().views["here/web/b"]
    report = msgspec.structs.replace(
        view.report, service="notes", id="main", phase=wire.Phase(phase), serving=serving, detail=""
    )
    view = msgspec.structs.replace(view, report=report)
    lines = explain_lines(api.Explanation(service="notes", instances=(view,), events=(), logs=()), NOW, plain)
    assert lines[0].startswith(starts)
    assert next_step in lines[-1]


def test_a_live_page_that_does_not_fit_shows_what_is_not_there_yet() -> None:
    steps = [
        api.Progress(what="instance", name=f"here/s{n}/main", state="running", ok=True, final=True, took_s=1.0)
        for n in range(50)
    ]
    steps[20] = msgspec.structs.replace(steps[20], state="failed", ok=False, detail="exit 1")
    steps[40] = msgspec.structs.replace(steps[40], state="pending", final=False)
    lines = live_page(steps, 3.0, 5).plain.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["s40", "pending"], ["s20", "failed"], ["s0", "running"]]
    assert lines[4:] == ["  and 46 more; 48 of 50 arrived"]
    assert [len(live_page(steps, 3.0, most).plain.splitlines()) for most in (50, None)] == [50, 50]


def test_explain_of_one_that_waits_leads_to_what_it_waits_for() -> None:
    view = world().views["here/web/b"]
    for detail, next_step in (
        ("waits for db", "it starts when db is well: `slum explain db`"),
        ("waits for generation 3 to stop", "wait; `slum logs web/b -f` shows what it says"),
    ):
        report = msgspec.structs.replace(view.report, phase=wire.Phase.PENDING, serving=None, detail=detail)
        seen = msgspec.structs.replace(view, report=report)
        lines = explain_lines(api.Explanation(service="web", instances=(seen,), events=(), logs=()), NOW, plain)
        assert lines[-1] == f"  next: {next_step}"


def test_explain_of_one_of_several_instances_names_it_in_all_that_is_to_be_typed() -> None:
    view = world().views["here/web/b"]
    view = msgspec.structs.replace(view, report=msgspec.structs.replace(view.report, phase=wire.Phase.STOPPED))
    lines = explain_lines(api.Explanation(service="web", instances=(view,), events=(), logs=()), NOW, plain)
    assert lines[0].startswith("web/b on ")
    assert lines[-1] == "  next: `slum start web/b`"


def test_what_a_service_wrote_cannot_steer_the_terminal() -> None:
    assert render.clean("a\x1b[31mred\x1b[0m\x1b[2J\x1b]0;title\x07\r\tb\x9b1m") == "ared[2J]0;title\tb1m"
    assert render.clean("\x1b[31mred\x1b[2J", keep_color=True) == "\x1b[31mred[2J\x1b[0m"
    fake = world()
    evil = api.LogLine(tenement="here", service="notes", id="main", at=START, text="\x1b[2Jboom\x07")
    told = api.Explanation(service="notes", instances=tuple(fake.views.values()), events=(), logs=(evil,))
    assert not re.search(r"[\x00-\x08\x0a-\x1f]", "".join(explain_lines(told, NOW, plain)))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (14, "14 s"),
        (119.9, "119 s"),
        (300, "5 min"),
        (79_200, "22 h"),
        (260_000, "3 d"),
    ],
)
def test_spans_have_one_unit(value: float, text: str) -> None:
    assert render.seconds(value) == text


def test_sizes_and_times_and_ends() -> None:
    assert [render.size(n) for n in (0, 1023, 14 << 20, 150 << 20, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "14.0 MB",
        "150 MB",
        "3.0 GB",
        "5.0 TB",
    ]
    assert render.clock(START, NOW, UTC) == "22:13:20"
    assert render.clock(START, START + 86_400, UTC) == "2023-11-14 22:13:20"
    assert render.status_text(-9) == "killed by SIGKILL"
    assert render.status_text(-200) == "killed by signal 200"
    assert render.status_text(None) == "ended unseen"


def test_moments_are_spans_or_times() -> None:
    assert moment("10m", NOW) == NOW - 600
    assert moment("1h30m", NOW) == NOW - 5400
    assert moment("2023-11-14T22:13:20Z", NOW) == START
    assert moment("2023-11-14T22:13:20", NOW, UTC) == START
    assert span_s("250ms") == 0.25
    assert span_s("90") == 90
    for text in ("", "soon", "10 parsecs", "-5m", "5m-"):
        with pytest.raises(ConfigError, match="is neither a span nor a time"):
            moment(text, NOW)


def test_commands_print_what_the_views_say(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    assert desk.slum("ps").out.splitlines()[0].startswith("SERVICE  ID    TENEMENT  LEVEL")
    assert len(desk.slum("ps", "notes").out.splitlines()) == 2
    assert [row["report"]["service"] for row in desk.slum("ps", "--json").json] == ["notes", "ticker"]
    assert desk.slum("status", "--json").json["revision"] == 1
    assert desk.slum("status", "--cluster").out.startswith("MEMBER")
    assert desk.slum("status", "--cluster", "--json").json["leader"] == "m1"
    assert desk.slum("explain", "ticker").out.startswith("ticker on here is running")
    assert desk.slum("explain", "notes/main", "--json").json["service"] == "notes"


def test_logs_are_filtered_prefixed_and_followed(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")

    def line(n: int, instance: str = "main") -> api.LogLine:
        text = f"tick {n} \x1b[2J"
        return api.LogLine(tenement="here", service="ticker", id=instance, at=START + n, text=text)

    desk.fleet.lines += [line(n) for n in range(5)]
    assert desk.slum("logs", "ticker").out.splitlines() == [f"tick {n} \x1b[2J" for n in range(5)]
    assert len(desk.slum("logs", "ticker", "--tail", "2").out.splitlines()) == 2
    assert desk.slum("logs", "ticker", "--grep", "tick [13]").out.count("tick") == 2
    assert desk.slum("logs", "ticker", "--since", "2023-11-14T22:13:23+00:00").out.count("tick") == 2
    assert "no regular expression" in desk.slum("logs", "ticker", "--grep", "(", code=2).err
    assert desk.slum("logs", "ticker", "-t", "-n1").out.startswith("2023-11-14 22:13:24  tick 4")
    assert json.loads(desk.slum("logs", "ticker", "--json", "-n1").out)["text"].startswith("tick 4")
    words = [sys.executable, "-m", "slum.cli.main", "--run-dir", str(desk.home.run), "logs", "ticker", "-f", "-n", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline().startswith("tick 4")
        desk.fleet.lines.append(line(5))
        assert follower.stdout.readline().startswith("tick 5")
        follower.send_signal(2)
        assert follower.wait(20) == 130


def test_events_are_listed_filtered_and_verified(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    desk.slum("stop", "notes")
    assert [row["kind"] for row in desk.slum("events", "--json").json] == ["fleet_applied", "instance_stopped"]
    assert len(desk.slum("events", "-n", "1").out.splitlines()) == 1
    assert len(desk.slum("events", "--service", "notes").out.splitlines()) == 1
    assert len(desk.slum("events", "--since", "2023-11-14T22:13:22+00:00").out.splitlines()) == 1
    assert desk.slum("events", "--actor", "nobody").out == ""
    assert desk.slum("events", "--verify").out == "2 events up to sequence 102: the chain holds\n"


def test_no_event_is_said_and_a_mistyped_kind_corrected(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    assert desk.slum("events", "--kind", "fleet_aplied").err == "no event matches; did you mean `fleet_applied`?\n"
    assert desk.slum("events", "--service", "nobody").err == "no event matches\n"
    ran = desk.slum("events", "--service", "nobody", "--json")
    assert ran.json == []


def test_stop_start_restart(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    assert desk.slum("stop", "notes").out.endswith("stopped: notes\n")
    assert desk.fleet.views["here/notes/main"].report.phase == "stopped"
    assert desk.slum("explain", "notes").out.endswith("next: `slum start notes`\n")
    assert desk.slum("start", "notes/main", "--json").json["instances"] == ["here/notes/main"]
    desk.fleet.faults = [("POST /v1/actions", "cut after")]
    desk.slum("restart", "notes", "--tenement", "here")
    assert [event.kind for event in desk.fleet.event_list].count("instance_started") == 2
    assert "does not run on 'there'" in desk.slum("restart", "notes", "--tenement", "there", code=2).err
    assert "committed" in desk.slum("stop", "ticker", "--no-wait").out
    desk.fleet.stuck = True
    assert "not restarted within 0.2 s" in desk.slum("restart", "ticker", "--timeout", "200ms", code=8).err
    desk.fleet.stuck = False
