"""`slum export` and `slum import`: what is written, what is never touched, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cli_support import FILE, Desk, desk, lonely  # noqa: F401 - fixtures
from exports_support import ROOT, run, tool

QUIET = """
[operators.fly]
type = "fly"
org = "personal"
region = "iad"
[tenement.here]
operator = "fly"
[tenement.here.service.web]
command = "python3 app.py"
listen = "port"
port = 8000
"""


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["compose", "fly", "terraform"])
def test_export_writes_below_its_folder_and_twice_the_same(lonely: Desk, name: str) -> None:  # noqa: F811
    before = tree(lonely.folder)
    ran = lonely.slum("export", name, "--out", "build/x")
    assert "files written" in ran.out
    written = tree(lonely.folder / "build/x")
    assert {"README.md", "losses.json"} <= set(written)
    assert {path: text for path, text in tree(lonely.folder).items() if not path.startswith("build/")} == before
    assert json.loads(written["losses.json"])[0].keys() == {"path", "what", "why", "instead"}
    times = {path: os.stat(lonely.folder / "build/x" / path).st_mtime_ns for path in written}
    again = lonely.slum("export", name, "--out", "build/x", "--diff")
    assert "as it would be written" in again.out
    lonely.slum("export", name, "--out", "build/x")
    assert tree(lonely.folder / "build/x") == written
    assert {path: os.stat(lonely.folder / "build/x" / path).st_mtime_ns for path in written} == times


def test_sources_are_found_from_the_folder(lonely: Desk) -> None:  # noqa: F811
    lonely.slum("export", "compose", "--out", "deep/er/out")
    folder = lonely.folder / "deep/er/out/here"
    shown = run(tool("docker-compose"), "-f", str(folder / "compose.yaml"), "config", "--format", "json")
    notes = json.loads(shown)["services"]["notes"]["build"]
    assert notes["additional_contexts"]["source"] == str(lonely.folder / "notes")
    lonely.slum("export", "fly", "--out", "deep/fly")
    first = (lonely.folder / "deep/fly/quickstart-here-notes/Dockerfile").read_text().splitlines()[1]
    assert first == '# context: "../../../notes"'


def test_what_would_change_is_shown_and_needs_force(lonely: Desk) -> None:  # noqa: F811
    lonely.slum("export", "compose", "--out", "out")
    mine = lonely.folder / "out/here/compose.yaml"
    mine.write_text(mine.read_text() + "# mine\x1b[2J\n")
    lonely.write(FILE.replace("sleep 1000", "sleep 2000"))
    before = tree(lonely.folder / "out")
    ran = lonely.slum("export", "compose", "--out", "out", code=2)
    assert "~ out/here/compose.yaml" in ran.out
    assert "-# mine" in ran.out
    assert "\x1b" not in ran.out
    assert "--force" in ran.err
    assert tree(lonely.folder / "out") == before
    ran = lonely.slum("export", "compose", "--out", "out", "--diff", code=10)
    assert tree(lonely.folder / "out") == before
    lonely.slum("export", "compose", "--out", "out", "--force")
    assert "# mine" not in mine.read_text()


def test_links_and_devices_in_the_folder_are_not_followed(lonely: Desk, tmp_path: Path) -> None:  # noqa: F811
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "compose.yaml").write_text("precious")
    out = lonely.folder / "out"
    out.mkdir()
    (out / "here").symlink_to(outside)
    for words in ((), ("--force",), ("--diff",)):
        ran = lonely.slum("export", "compose", "--out", "out", *words, code=2)
        assert "in the way" in ran.err
    assert (outside / "compose.yaml").read_text() == "precious"
    assert list(outside.iterdir()) == [outside / "compose.yaml"]
    (out / "here").unlink()
    (out / "README.md").symlink_to(outside / "compose.yaml")
    lonely.slum("export", "compose", "--out", "out", "--force", code=2)
    (out / "README.md").unlink()
    os.mkfifo(out / "README.md")
    assert "no regular file" in lonely.slum("export", "compose", "--out", "out", "--force", code=2).err
    assert tree(outside) == {"compose.yaml": "precious"}


def test_strict_names_every_loss_and_writes_nothing(lonely: Desk) -> None:  # noqa: F811
    ran = lonely.slum("export", "compose", "--out", "out", "--strict", code=2)
    assert "service.notes.deploy" in ran.err
    assert not (lonely.folder / "out").exists()
    lonely.write(QUIET)
    assert "files written" in lonely.slum("export", "fly", "--out", "out", "--strict").out


def test_json_is_one_document(lonely: Desk) -> None:  # noqa: F811
    found = lonely.slum("export", "terraform", "--out", "out", "--json").json
    assert found["written"] is True
    assert {"path": "README.md", "state": "new"} in found["files"]
    assert found["losses"][0]["path"]


def test_the_live_fleet_is_exported_where_no_file_is(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    (desk.folder / "slum.toml").unlink()
    ran = desk.slum("export", "compose", "--out", "out")
    assert "the fleet of the control plane" in ran.err
    text = (desk.folder / "out/here/compose.yaml").read_text()
    assert "name: quickstart-here" in text
    assert "source: ../../notes" in text


def test_without_file_and_control_plane_it_says_so(lonely: Desk) -> None:  # noqa: F811
    (lonely.folder / "slum.toml").unlink()
    assert lonely.slum("export", "fly", code=6).err


def test_there_and_back(lonely: Desk) -> None:  # noqa: F811
    lonely.slum("export", "compose", "--out", "build/compose")
    ran = lonely.slum("import", "compose", "build/compose", "--out", "back.toml")
    assert "wrote back.toml" in ran.out
    assert "valid" in lonely.slum("validate", "back.toml").out
    back = (lonely.folder / "back.toml").read_text()
    assert 'source = "notes"' in back
    assert "[tenement.here.service.ticker]" in back
    before = lonely.slum("import", "compose", "build/compose/here/compose.yaml").out
    assert before == back
    (lonely.folder / "back.toml").write_text("mine = 1\n")
    assert "--force" in lonely.slum("import", "compose", "build/compose", "--out", "back.toml", code=2).err
    assert (lonely.folder / "back.toml").read_text() == "mine = 1\n"
    lonely.slum("import", "compose", "build/compose", "--out", "back.toml", "--force")
    lonely.slum("export", "fly", "--out", "build/fly")
    assert 'org = "personal"' in lonely.slum("import", "fly", "build/fly").out


def test_import_tells_losses_on_stderr_and_as_json(lonely: Desk) -> None:  # noqa: F811
    example = str(ROOT / "examples/import/compose.yaml")
    ran = lonely.slum("import", "compose", example)
    assert ran.out.startswith("[fleet]\n")
    assert "services.proxy.ports" in ran.err
    found = lonely.slum("import", "compose", example, "--json").json
    assert found["problems"] == []
    assert found["toml"] in ran.out
    assert lonely.slum("import", "compose", example, "--strict", code=2).out == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "helm"), "helm"),
        (("export", "compose", "-f", "nothing.toml"), "no such file"),
        (("import", "compose", "nothing.yaml"), "no such file"),
        (("import", "compose", "notes"), "there is no compose.yaml"),
        (("import", "fly"), "missing argument"),
    ],
)
def test_bad_words_end_with_2(lonely: Desk, words: tuple[str, ...], says: str) -> None:  # noqa: F811
    assert says in lonely.slum(*words, code=2).err.lower()


def test_the_commands_of_the_manual_work_from_the_checkout(tmp_path: Path) -> None:
    slum = tool("slum")
    for name in ("terraform", "compose", "fly"):
        run(slum, "export", name, "--out", str(tmp_path / name), "-f", "slum.toml.example", cwd=ROOT)
    env = {**os.environ, "CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": ""}
    check = [tool("terraform"), f"-chdir={tmp_path}/terraform", "fmt", "-check", "-recursive"]
    assert subprocess.run(check, env=env, check=False).returncode == 0
    for file in (tmp_path / "compose").glob("*/compose.yaml"):
        run(tool("docker-compose"), "-f", str(file), "config", "-q")
    said = run(slum, "import", "compose", "examples/import/compose.yaml", cwd=ROOT)
    assert "[tenement.here.service.web]" in said


def test_machines_of_the_live_fleet_are_taken_over(desk: Desk) -> None:  # noqa: F811
    desk.write(QUIET)
    desk.slum("apply", "--yes", "--no-wait")
    desk.slum("export", "terraform", "--out", "out", "--import")
    text = (desk.folder / "out/imports.tf").read_text()
    assert 'to = module.fly.fly_machine.this["here"]' in text
    assert "# here is local:m1 to slum." in text
    assert 'id = var.machine_ids["here"]' in text
