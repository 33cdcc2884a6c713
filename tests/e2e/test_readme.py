"""The README's commands and the example fleet, run as a newcomer would; only the port and the folders differ."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest
from e2e_site import REPOSITORY, Site

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]


def readme_commands() -> list[list[str]]:
    """Every command of a console block, as words."""
    blocks = re.findall(r"```console\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return [shlex.split(line[2:]) for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_the_example_runs_and_the_readmes_commands_do_what_they_say(site: Site) -> None:
    example = site.folder / "examples" / "quickstart"
    shutil.copytree(REPOSITORY / "examples" / "quickstart", example)
    fleet = example / "slum.toml"
    fleet.write_text(fleet.read_text() + f'\n[tenement.here.routing]\nlisten = ["127.0.0.1:{site.port}"]\n')
    applied = site.slum("apply", str(fleet), "--yes", timeout=200)
    assert f"http://notes.localhost:{site.port}" in applied.out
    assert site.get("hello")[1].startswith("hello from hello/main")
    assert "nothing yet" in site.get("notes")[1]

    own = [words[1:] for words in readme_commands() if words[0] == ".venv/bin/slum"]
    assert len(own) >= 7
    for words in own:
        if words[0] == "init":
            continue
        ran = site.slum(*words, check=False)
        assert ran.code == 0, (words, ran)
        assert ran.out.strip(), words


def test_init_writes_a_file_that_validates(site: Site) -> None:
    site.slum("init")
    assert (site.folder / "slum.toml").exists()
    site.slum("validate")
    again = site.slum("init", check=False)
    assert again.code == 2
    assert "slum.toml" in again.err


def test_without_a_terminal_and_consent_nothing_is_changed(site: Site) -> None:
    site.fleet('[S.web]\ncommand = "sleep 1000"\nlisten = "none"\n')
    ran = site.slum("apply", check=False)
    assert ran.code == 2
    assert "--yes" in ran.err
    assert not site.data.exists()


def test_bad_input_is_one_clear_error_and_changes_nothing(site: Site) -> None:
    site.fleet('[S.web]\ncomand = "sleep 1000"\nisolation = "sandbax"\n')
    ran = site.slum("apply", "--yes", check=False)
    assert ran.code == 2
    assert "slum.toml:" in ran.err
    assert "did you mean `command`" in ran.err
    assert not site.data.exists()


def test_a_level_that_is_missing_here_is_refused_with_the_reason(site: Site) -> None:
    site.fleet('[S.web]\ncommand = "sleep 1000"\nlisten = "none"\nisolation = "sandbox"\n')
    ran = site.slum("apply", "--yes", check=False)
    assert ran.code == 2
    assert "sandbox" in ran.err
    assert not site.data.exists()
