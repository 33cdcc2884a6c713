"""plan, apply, rollback, destroy, validate, init: what they say, what they change, and how they end."""

from __future__ import annotations

import io
import json
import re
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from cli_support import FILE, Desk, desk, lonely  # noqa: F401 - fixtures

from slum.cli import deploy
from slum.cli.planview import plan_lines
from slum.fleetfile import load
from slum.model import Fleet
from slum.plan import plan
from slum.render import plain

GOLDEN_FIRST = """\
fleet quickstart, revision 0 -> 1
  + tenement here      local
    + service notes    process   http://notes.localhost:8080
    + service ticker   process   no route
  2 services to start, 0 to change, 0 to remove
"""


def changed(old: str, new: str) -> str:
    assert old in FILE
    return FILE.replace(old, new)


def test_plan_on_a_bare_machine_starts_nothing(lonely: Desk) -> None:  # noqa: F811
    ran = lonely.slum("plan", code=10)
    assert ran.out == GOLDEN_FIRST
    assert "no control plane on this machine yet" in ran.err
    assert not lonely.home.run.exists()


def test_apply_without_consent_changes_nothing(lonely: Desk) -> None:  # noqa: F811
    ran = lonely.slum("apply", code=2)
    assert ran.out == GOLDEN_FIRST
    assert ran.err == (
        "error: this needs consent, and there is no terminal to ask on; nothing was changed (exit 2)\n  next: add --yes\n"
    )
    assert not lonely.home.data.exists()


def test_an_empty_file_on_a_bare_machine_is_nothing_to_do_and_asks_nothing(lonely: Desk) -> None:  # noqa: F811
    lonely.write("")
    assert lonely.slum("apply").out == "fleet default, revision 0: nothing to do\n"
    assert lonely.slum("apply", "--yes", "--json").json["changed"] is False
    assert not lonely.home.data.exists()


def test_a_file_from_standard_input_is_read_from_the_working_folder(
    lonely: Desk,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (lonely.folder / "slum.toml").read_bytes()
    (lonely.folder / "slum.toml").unlink()
    for words, code in (("plan", "-"), 10), (("plan", "-f", "-"), 10), (("apply", "-"), 2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        assert lonely.slum(*words, code=code).out == GOLDEN_FIRST
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"[fleet]\nnane = 1\n")))
    assert "-:2: fleet.nane: unknown key; did you mean `name`?" in lonely.slum("validate", "-", code=2).err
    assert "`-` reads standard input" in lonely.slum("plan", "/dev/null", code=2).err
    assert lonely.slum("init", "-").out.startswith("#")


def test_apply_then_nothing_to_do(desk: Desk) -> None:  # noqa: F811
    first = desk.slum("apply", "--yes", "--why", "the first")
    assert first.out.startswith(GOLDEN_FIRST)
    lines = first.out.removeprefix(GOLDEN_FIRST).splitlines()
    assert [line.split() for line in lines[1:-1]] == [
        ["here", "agent", "ready", "0.4", "s"],
        ["notes", "healthy", "0.3", "s"],
        ["ticker", "running", "0.3", "s"],
    ]
    assert re.fullmatch(r"applied revision 1 in \d\.\d s; `slum ps` lists what runs", lines[-1])
    assert "uploaded 1 bundle" in first.err
    assert len(desk.fleet.blobs) == 1
    desk.fleet.requests.clear()
    second = desk.slum("apply", "--yes")
    assert second.out == "fleet quickstart, revision 1: nothing to do\n"
    assert {line.split()[0] for line in desk.fleet.requests} == {"GET"}
    assert desk.slum("plan").out == second.out


def test_a_changed_fleet_is_planned_field_by_field(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    desk.write(
        changed(
            'command = "sleep 1000"', 'command = "sleep 2000"\nmemory_limit_mb = 64\nenv = { TOKEN = "hunter2hunter2" }'
        )
    )
    ran = desk.slum("plan", code=10)
    assert ran.out == (
        "fleet quickstart, revision 1 -> 2\n"
        "    tenement here\n"
        '    ~ service ticker   command  "sleep 1000" -> "sleep 2000"\n'
        "                       env.TOKEN  none -> (hidden)\n"
        "                       memory_limit_mb  none -> 64\n"
        "  0 services to start, 1 to change, 0 to remove\n"
    )
    assert "TOKEN" in ran.err
    assert "hunter2" not in ran.out + ran.err
    document = desk.slum("plan", "--json", code=10).json
    assert document["summary"]["services"]["change"] == 1


def test_a_removed_service_and_drift_are_shown(desk: Desk) -> None:  # noqa: F811
    desk.fleet.broken = {"notes"}
    desk.slum("apply", "--yes", code=8)
    ran = desk.slum("plan", code=10)
    assert ran.out == (
        "fleet quickstart, revision 1: nothing to change\n"
        "  ! here/notes/main   is not well: failed: exit 2, 3 times in 2.1 s\n"
        "  0 services to start, 0 to change, 0 to remove; 1 thing not as declared\n"
    )
    desk.write(
        FILE.split("[tenement.here.service.notes]")[0]
        + "[tenement.here.service"
        + FILE.split("[tenement.here.service")[2]
    )
    assert "- service notes   1 instance" in desk.slum("plan", code=10).out


def test_a_failing_service_is_told_with_its_last_words(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    desk.fleet.broken = {"notes"}
    desk.write(changed("app.py", "ap.py"))
    ran = desk.slum("apply", "--yes", code=8)
    assert "notes                 failed  exit 2, 3 times in 2.1 s; generation 1 still serves" in ran.out
    assert "  last words of notes:\n    no module named 'ap'\n" in ran.out
    assert ran.err.endswith(
        "error: revision 2 is committed, but notes is not well (exit 8)\n  next: `slum explain notes`, or `slum rollback`\n"
    )
    again = desk.slum("apply", "--yes", code=8)
    assert "nothing to commit" in again.out


def test_a_conflict_says_what_changed_since(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    desk.write(changed("sleep 1000", "sleep 2000"))
    real = deploy._upload
    monkeypatch.setattr(deploy, "_upload", lambda *a: (real(*a), desk.fleet.set_fleet(desk.fleet.fleet)))
    ran = desk.slum("apply", "--yes", code=4)
    assert ran.err == (
        "conflict: revision is 2, your plan was made on 1 (exit 4)\n"
        "  since then: root@ops changed service notes.memory_limit_mb 256 -> 512\n"
        "  next: look at `slum plan` and apply again\n"
    )


def test_another_fleet_is_a_conflict(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    desk.write(changed('"quickstart"', '"other"'))
    assert "holds the fleet 'quickstart'" in desk.slum("apply", "--yes", code=4).err
    assert desk.slum("plan", code=4).out == ""


def test_apply_as_json_has_one_document_and_progress_on_stderr(desk: Desk) -> None:  # noqa: F811
    ran = desk.slum("apply", "--yes", "--json")
    document = ran.json
    assert document["revision"] == 1
    assert document["ok"]
    assert document["plan"]["summary"]["services"]["add"] == 2
    steps = [json.loads(line) for line in ran.err.splitlines()]
    assert {step["name"] for step in steps} == {"here", "here/notes/main", "here/ticker/main"}
    assert desk.slum("apply", "--json").json["changed"] is False
    desk.write(changed("sleep 1000", "sleep 2000"))
    refused = desk.slum("apply", "--json", code=2)
    assert refused.out == ""
    assert json.loads(refused.err)["error"]["code"] == "bad_input"


def test_no_wait_and_too_little_time(desk: Desk) -> None:  # noqa: F811
    desk.fleet.stuck = True
    ran = desk.slum("apply", "--yes", "--no-wait")
    assert ran.out.endswith("committed revision 1; `slum ps` shows how it arrives\n")
    desk.write(changed("sleep 1000", "sleep 2000"))
    late = desk.slum("apply", "--yes", "--timeout", "300ms", code=8)
    assert "revision 2 is committed, but notes, ticker are not there after 0.3 s; it goes on" in late.err
    desk.fleet.stuck = False


@pytest.mark.parametrize("fault", ["busy", "cut before", "cut after"])
def test_apply_survives_a_server_that_restarts(desk: Desk, fault: str) -> None:  # noqa: F811
    desk.fleet.faults = [
        (what, fault) for what in ("GET /v1/state", "PUT /v1/blobs", "PUT /v1/fleet", "GET /v1/progress")
    ]
    desk.slum("apply", "--yes")
    assert desk.fleet.revision == 1
    assert desk.fleet.faults == []


def test_rollback_and_destroy(desk: Desk) -> None:  # noqa: F811
    assert "nothing was applied yet" in desk.slum("rollback", "--yes", code=2).err
    desk.slum("apply", "--yes")
    assert "is the first" in desk.slum("rollback", "--yes", code=2).err
    desk.write(changed("sleep 1000", "sleep 2000"))
    desk.slum("apply", "--yes")
    assert desk.slum("rollback", code=2).out.startswith("fleet quickstart, revision 2 -> 3\n")
    back = desk.slum("rollback", "--yes")
    assert 'command  "sleep 2000" -> "sleep 1000"' in back.out
    assert desk.fleet.revision == 3
    assert desk.fleet.fleet == desk.fleet.fleets[1].fleet
    assert "there is no revision 9" in desk.slum("rollback", "9", "--yes", code=2).err
    gone = desk.slum("destroy", "--yes")
    assert "- tenement here" in gone.out
    assert desk.fleet.fleet.tenements == ()
    assert "nothing to do" in desk.slum("destroy", "--yes").out
    desk.slum("rollback", "3", "--yes")
    assert desk.slum("ps", "--json").json


def test_destroy_is_refused_for_another_file(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    other = desk.write(changed('"quickstart"', '"other"'), "other.toml")
    assert "declares 'other'" in desk.slum("destroy", str(other), "--yes", code=4).err
    assert desk.fleet.revision == 1


def test_ctrl_c_before_and_after_the_commit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(deploy, "_upload", interrupt)
        assert "interrupted; nothing was changed (exit 130)" in desk.slum("apply", "--yes", code=130).err
    assert desk.fleet.revision == 0
    with monkeypatch.context() as patch:
        patch.setattr(deploy, "follow", interrupt)
        err = desk.slum("apply", "--yes", code=130).err
    assert "interrupted; revision 1 stays committed and goes on" in err
    assert desk.fleet.revision == 1


def test_validate_lists_every_problem(lonely: Desk) -> None:  # noqa: F811
    assert lonely.slum("validate").out == "slum.toml: valid: fleet quickstart, 1 tenement, 2 services\n"
    document = lonely.slum("validate", "--json").json
    assert document["ok"]
    assert document["fleet"]["name"] == "quickstart"
    lonely.write(changed("isolation", "isolatoin").replace('operator = "local"', 'operater = "local"'))
    ran = lonely.slum("validate", code=2)
    assert ran.out == ""
    lines = ran.err.splitlines()
    assert len(lines) == 4
    assert "did you mean `isolation`?" in ran.err
    assert "did you mean `operator`?" in ran.err
    assert lines[-1] == "error: 3 problems (exit 2)"
    as_json = json.loads(lonely.slum("validate", "--json", code=2).err)
    assert as_json["error"]["details"] == lines[:3]
    assert "no such file" in lonely.slum("validate", "-f", "absent.toml", code=2).err.lower()
    assert "two files were given" in lonely.slum("validate", "a.toml", "-f", "b.toml", code=2).err


def test_init_writes_a_valid_file_once(lonely: Desk) -> None:  # noqa: F811
    assert "is there already; it was not touched" in lonely.slum("init", code=2).err
    ran = lonely.slum("init", "new.toml")
    assert ran.out == "wrote new.toml: read it, change it, then `slum apply new.toml`\n"
    lonely.slum("validate", "new.toml")
    lonely.slum("init", "--force")
    assert (lonely.folder / "slum.toml").read_text() == (lonely.folder / "new.toml").read_text()


def test_a_level_that_is_missing_here_is_refused_before_anything(lonely: Desk) -> None:  # noqa: F811
    lonely.write(changed('isolation = "process"\nlisten', 'isolation = "wasm"\nlisten'))
    ran = lonely.slum("apply", "--yes", code=2)
    assert '"wasm" is not available on here' in ran.err
    assert "1 problem with this machine" in ran.err
    lonely.slum("validate")
    lonely.slum("validate", "--here", code=2)
    assert not lonely.home.data.exists()


def test_a_restart_of_the_server_while_progress_is_followed(desk: Desk) -> None:  # noqa: F811
    desk.fleet.stuck = True

    def restart() -> None:
        assert desk.fleet.changed.wait(20)
        desk.api.stop()
        desk.fleet.stuck = False
        desk.api.start()

    other = threading.Thread(target=restart)
    other.start()
    ran = desk.slum("apply", "--yes")
    other.join()
    assert "applied revision 1" in ran.out


def test_the_manual_shows_what_is_printed(lonely: Desk) -> None:  # noqa: F811
    manual = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text()
    example = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "slum.toml"
    made = plan(load(example).fleet, Fleet())
    assert textwrap.indent("\n".join(plan_lines(made, plain)), "    ") in manual
    broken = "[operators.local]\ntype = 'local'\n\n\n\n\n\n[tenement.here]\noperater = 'local'\n\n"
    lonely.write(broken + "[tenement.here.service.web]\ncommand = 'x'\nisolation = 'sandbax'\n", "broken.toml")
    ran = lonely.slum("validate", "broken.toml", code=2)
    assert textwrap.indent(ran.err, "    ") in manual
