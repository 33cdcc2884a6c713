"""The frame of the command line: what is imported, how commands end, and that help and manual tell the truth."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from cli_support import Desk, desk, lonely  # noqa: F401 - fixtures

from slum import errors
from slum.cli import crash, look
from slum.cli.base import EXIT_PIPE, SHARED, SlumCommand
from slum.cli.main import COMMANDS, run, slum

MANUAL = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text()
HELP_IMPORTS = {"slum", "slum.cli", "slum.cli.base", "slum.cli.main", "slum.errors", "__future__", "__main__"}
"""All that `slum --help` may import beyond what `import click` does."""
NOT_RUN = {"up", "down", "server", "at", "diff", "backup", "restore", "resume"}
"""Examples that would start or stop the real thing, or need a backup; the end-to-end tests do."""


def commands() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(slum)
    for name in COMMANDS:
        command = slum.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", below) for sub, below in command.commands.items())


def test_help_imports_nothing_heavy() -> None:
    script = """
import sys, contextlib, io, json
import click
before = set(sys.modules)
from slum.cli.main import run
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert run(["--help"]) == 0
assert "explain" in out.getvalue()
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    imported = {name for name in json.loads(done.stdout) if not name.startswith("__editable__")}
    standard = {name for name in imported if name.partition(".")[0] in sys.stdlib_module_names}
    heavy = imported - standard - HELP_IMPORTS - {"click._textwrap"}
    assert heavy == set()
    assert (
        imported & {"asyncio", "socket", "ssl", "subprocess", "json", "hashlib", "dataclasses", "pathlib", "http"}
        == set()
    )


def test_the_list_says_of_each_command_what_its_help_says(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    listed = " ".join(capfd.readouterr().out.split())
    for name, entry in COMMANDS.items():
        assert f"{name} {entry.help}" in listed
        assert len(entry.help) < 66


def test_every_command_has_help_and_examples_that_parse() -> None:
    for name, command in commands():
        context = click.Context(command, info_name=name)
        text = command.get_help(context)
        assert "Examples:\n" in text, name
        assert command.help, name
        if not isinstance(command, SlumCommand):
            continue
        examples = [line.strip() for line in (command.epilog or "").splitlines() if line.strip()]
        assert examples, name
        for example in examples:
            words = shell_words(example)
            assert f" {name} " in f" {' '.join(words)} ", example
            parsed = slum.make_context("slum", words, obj={})
            while isinstance(parsed.command, click.Group):
                rest = [*parsed._protected_args, *parsed.args]
                below = parsed.command.get_command(parsed, rest[0])
                assert below is not None
                parsed = below.make_context(rest[0], rest[1:], parent=parsed)


def shell_words(line: str) -> list[str]:
    """Return the words after `slum` of the first slum command in *line*, up to a pipe, a redirection or &&."""
    words = shlex.split(line, comments=True)
    assert words[0] == "slum", line
    end = next((n for n, word in enumerate(words) if word in ("|", ">", "&&", "<")), len(words))
    return words[1:end]


def test_every_command_and_option_is_in_the_manual() -> None:
    common = MANUAL.split("## Options of every command")[1].split("\n## ")[0]
    for name, command in commands():
        first, _, rest = name.partition(" ")
        sections = [
            part for part in re.split(r"\n##+ ", MANUAL) if re.match(rf"slum .*\b{first}\b", part.splitlines()[0])
        ]
        assert sections, f"docs/cli.md has no section for slum {name}"
        assert rest in sections[0]
        for parameter in command.params:
            where = common if parameter.name in SHARED else "\n".join(sections)
            if isinstance(parameter, click.Option):
                for option in parameter.opts:
                    if parameter.name == "file_option" and first != "destroy":
                        where = MANUAL
                    assert re.search(rf"`{re.escape(option)}(?![\w-])", where), f"{name} {option} is not in docs/cli.md"


def test_the_manual_has_no_option_that_does_not_exist() -> None:
    known = {option for _, command in commands() for parameter in command.params for option in parameter.opts}
    known |= {"--help", "--version", "-h", "--"}
    for option in re.findall(r"`(--?[a-z][a-z-]*)", MANUAL):
        assert option in known, option


def test_exit_codes_are_those_of_the_manual() -> None:
    table = MANUAL.split("## Exit codes")[1].split("\n## ")[0]
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    known = {kind.exit_code for kind in errors.BY_CODE.values()}
    assert told == known | {errors.EXIT_DONE, errors.EXIT_CHANGES, errors.EXIT_INTERRUPTED, EXIT_PIPE}


def test_the_examples_of_the_manual_run(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    root = Path(__file__).resolve().parents[1]
    (desk.folder / "examples").symlink_to(root / "examples")
    ran = 0
    for line in re.findall(r"^    \$ (slum .*)$", MANUAL, re.MULTILINE):
        words = shell_words(line)
        if words[0] in NOT_RUN or "broken.toml" in words:
            continue
        codes = {"plan": (10, 2, 4), "doctor": (0, 8)}.get(words[0], (0,))
        done = desk.slum(*words, code=None)
        assert done.code in codes, (line, done)
        ran += 1
    assert ran > 15


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["aply"], "there is no command 'aply'; did you mean `slum apply`?"),
        (["ps", "--jsno"], "--json"),
        (["logs"], "missing argument"),
        (["server"], "missing command"),
        (["completion", "ksh"], "ksh"),
        (["logs", "a/b/c"], "is not SERVICE or SERVICE/ID"),
        (["apply", "--timeout", "soon"], "is not a span of time"),
    ],
)
def test_bad_words_are_told_in_a_line_and_end_with_2(lonely: Desk, words: list[str], says: str) -> None:  # noqa: F811
    ran = lonely.slum(*words, code=2)
    assert ran.out == ""
    assert says in ran.err.splitlines()[0]
    assert ran.err.startswith("error: ")
    assert "(exit 2)" in ran.err


def test_names_of_services_are_guessed(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    for words in (
        ["ps", "note"],
        ["logs", "note"],
        ["restart", "note"],
        ["exec", "note", "--", "ls"],
        ["explain", "note"],
    ):
        ran = desk.slum(*words, code=2)
        assert re.search("did you mean .notes.[?]", ran.err), words
    assert "no instance 'mian'; did you mean `main`?" in desk.slum("stop", "notes/mian", code=2).err


def test_a_folder_that_cannot_be_is_refused(lonely: Desk) -> None:  # noqa: F811
    assert "longer than 26 bytes" in lonely.slum("ps", "--run-dir", "/tmp/" + "x" * 30, code=2).err


def test_options_may_stand_before_the_command(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    assert desk.slum("--json", "ps").json == desk.slum("ps", "--json").json


def test_nobody_there_is_exit_6_with_the_way_out(lonely: Desk) -> None:  # noqa: F811
    for words in (
        ["ps"],
        ["status"],
        ["events"],
        ["explain", "x"],
        ["stop", "x"],
        ["destroy", "--yes"],
        ["exec", "x", "ls"],
    ):
        ran = lonely.slum(*words, code=6)
        assert "no control plane runs on this machine" in ran.err
        assert "`slum apply` starts one" in ran.err
    assert json.loads(lonely.slum("ps", "--json", code=6).err)["error"]["code"] == "unreachable"


def test_a_bug_keeps_its_traceback(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    desk.slum("apply", "--yes")

    def broken(*_: object) -> list[str]:
        raise KeyError("surprise")

    monkeypatch.setattr(look, "ps_lines", broken)
    ran = desk.slum("ps", code=1)
    found = re.search(r"its traceback: (\S+)", ran.err)
    assert found is not None
    assert ran.err.startswith("error: a bug in slum: KeyError: 'surprise' (exit 1)\n")
    assert "surprise" in Path(found[1]).read_text()
    assert "Traceback" in desk.slum("ps", "--debug", code=1).err
    monkeypatch.setenv("XDG_STATE_HOME", "/proc/nowhere")
    assert "could not be kept" in desk.slum("ps", code=1).err
    assert crash.record(KeyError("x"), debug=True)


def test_a_reader_that_goes_away_is_no_error(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    words = [sys.executable, "-m", "slum.cli.main", "--run-dir", str(desk.home.run), "events", "-f", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=desk.folder) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        for _ in range(3):
            desk.fleet.event("service_changed", "service:notes")
        assert process.wait(20) == EXIT_PIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_closed_are_no_bug(lonely: Desk, closed: str) -> None:  # noqa: F811
    words = f"{sys.executable} -m slum.cli.main --run-dir {lonely.home.run} --data-dir {lonely.home.data}"
    done = subprocess.run(["sh", "-c", f"{words} doctor --help {closed}; {words} ps {closed}"], capture_output=True)
    assert done.returncode == 6, done
    assert b"a bug in slum" not in done.stdout + done.stderr


def test_a_full_disk_under_the_output_is_no_bug(lonely: Desk) -> None:  # noqa: F811
    words = [sys.executable, "-m", "slum.cli.main", "--run-dir", str(lonely.home.run), "version"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == "error: the output cannot be written: No space left on device (exit 1)\n"
    assert done.returncode == 1


def test_ctrl_c_after_the_end_is_too_late() -> None:
    script = """
import atexit, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist leaves it ignored
from slum.cli.main import main
class Last:
    def __del__(self, raised=signal.raise_signal, number=signal.SIGINT): raised(number)
sys.last = Last()  # dropped when the interpreter has put its signal handlers back already
atexit.register(signal.raise_signal, signal.SIGINT)
sys.argv = ["slum", "--version"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("slum ")


def test_no_colour_in_pipes_and_none_where_it_is_refused(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    for words in (["ps"], ["status"], ["plan"], ["explain", "notes"], ["ps", "nothere"]):
        ran = desk.slum(*words, code=None)
        assert "\x1b" not in ran.out + ran.err


def test_completion_lists_commands_options_and_services(desk: Desk) -> None:  # noqa: F811
    desk.slum("apply", "--yes")
    assert "_SLUM_COMPLETE" in desk.slum("completion", "zsh").out

    def complete(line: str) -> list[str]:
        env = {
            **os.environ,
            "_SLUM_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split(" ")) - 1),
            "SLUM_RUN_DIR": str(desk.home.run),
        }
        done = subprocess.run(
            [sys.executable, "-m", "slum.cli.main"], env=env, capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        return [item.split(",")[1] for item in done.stdout.splitlines()]

    assert complete("slum resta") == ["restart"]
    assert complete("slum logs no") == ["notes"]
    assert complete("slum stop notes/") == ["notes/main"]
    assert complete("slum logs --gr") == ["--grep"]


def test_version(lonely: Desk) -> None:  # noqa: F811
    assert lonely.slum("version", "--json").json["control_plane"] is None
    assert lonely.slum("--version").out.startswith("slum 0.")
    with lonely.api:
        assert lonely.slum("version", "--json").json["control_plane"] == "0.1.0"


def test_doctor_lines_up(lonely: Desk) -> None:  # noqa: F811
    ran = lonely.slum("doctor", code=None)
    rows = [line for line in ran.out.splitlines() if line.startswith(("ok", "no ", "warn"))]
    assert len(rows) >= 8
    checks = lonely.slum("doctor", "--json", code=ran.code).json
    column = rows[0].index(checks[0]["detail"][:10])
    assert all(row[column - 2 : column] == "  " for row in rows)
