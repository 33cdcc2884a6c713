"""What every command shares: the common options, how it was called, and the ways to print.

Light on purpose: `slum --help` imports it, so only click and the errors may be imported at the top. People's text goes
to stdout through Invocation.say, programs' JSON through emit; notes and progress go to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeVar

import click

from slum.errors import ConfigError, Conflict, SlumError

if TYPE_CHECKING:
    from slum.client import Client
    from slum.contexts import Contexts
    from slum.paths import Home
    from slum.reach import Reach

EXIT_PIPE = 141
"""Whoever read our output went away: what a shell reports for SIGPIPE."""

F = TypeVar("F", bound=Callable[..., Any])

STYLES: dict[str, dict[str, Any]] = {
    "good": {"fg": "green"},
    "bad": {"fg": "red"},
    "warn": {"fg": "yellow"},
    "dim": {"dim": True},
    "strong": {"bold": True},
}


class Invocation(NamedTuple):
    """How a command was called. Built once, before the command's own code."""

    home: Home
    json: bool
    yes: bool
    quiet: bool
    color: bool
    """Colour on stdout: a terminal, and nothing said against it."""
    context: str = ""
    """The name of the context that leads to the control plane; "" for this machine's own."""

    def say(self, text: str = "") -> None:
        """Print *text* for people on stdout; with --json stdout belongs to the one document."""
        if not self.json:
            click.echo(text, color=True)

    def say_table(self, header: Sequence[str], rows: Collection[Sequence[str]], *, none: str = "") -> None:
        """Print *rows* under *header* for people on stdout, or *none* when there are none."""
        from slum.render import table

        if not rows and none:
            self.say(none)
            return
        for line in table(header, rows, self.paint):
            self.say(line)

    def note(self, text: str) -> None:
        """Print what is good to know but not the answer, on stderr; not with --quiet."""
        if not self.quiet:
            click.echo(text, err=True, color=True)

    def emit(self, document: object) -> None:
        """Print *document* as indented JSON on stdout."""
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())

    def emit_line(self, document: object, *, err: bool = False) -> None:
        """Print *document* as one line of JSON, at once."""
        import msgspec

        click.echo(msgspec.json.encode(document).decode(), err=err)

    def paint(self, text: str, style: str) -> str:
        """Return *text* in *style* (a key of STYLES), or as it is when stdout takes no colour."""
        return click.style(text, **STYLES[style]) if self.color and style else text

    def client(self) -> Client:
        """Return a client of the control plane that is meant; use it in a with statement."""
        from slum.client import Client

        return Client(self.reach())

    def reach(self) -> Reach:
        """Return how that control plane is reached."""
        from slum.reach import Elsewhere, Here

        if not self.context:
            return Here(self.home)
        contexts = self.contexts()
        return Elsewhere(contexts, contexts.load(self.context))

    def contexts(self) -> Contexts:
        """Return this user's contexts."""
        from slum.contexts import Contexts

        return Contexts.of(os.environ, os.path.expanduser("~"))


class SlumCommand(click.Command):
    """A command whose help ends with examples, and lists the common options apart from its own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own: list[tuple[str, str]] = []
        shared: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                (shared if parameter.name in SHARED else own).append(record)
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        with formatter.section("Common options"):
            formatter.write_dl(shared)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\nExamples:\n{self.epilog}\n")


class TrailingCommand(SlumCommand):
    """A command that ends with another program's words: what stands after ``--``, or else all after SERVICE, is theirs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.allow_interspersed_args = "--" in args
        return super().parse_args(ctx, args)


class SlumGroup(click.Group):
    """A group whose help ends with examples. Without a command it says what is missing, not all that there is."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **{"no_args_is_help": False, **attributes})

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\nExamples:\n{self.epilog}\n")


def command(
    name: str, *, examples: str, cls: type[SlumCommand] = SlumCommand, **attributes: Any
) -> Callable[[Callable[..., int | None]], SlumCommand]:
    """Make a function a command: it gets an Invocation first, and returns its exit code (None is 0).

    *examples* are lines like ``slum ps --json``, shown at the end of --help; a test runs them all through the parser.
    """
    epilog = "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())

    def decorate(function: Callable[..., int | None]) -> SlumCommand:
        @click.pass_context
        def called(ctx: click.Context, /, **values: Any) -> int | None:
            return function(invocation(ctx.find_root().obj or {}), **values)

        called.__doc__ = function.__doc__
        called.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]  # click's own slot
        return click.command(name, cls=cls, epilog=epilog, **attributes)(shared_options(called))

    return decorate


def shared_options(function: F) -> F:
    """Add the options that every command takes; before the command's name they mean the same."""
    for option in reversed(
        (
            _shared(
                "--context", metavar="NAME", help="Which control plane; `local` is this machine's.  [env: SLUM_CONTEXT]"
            ),
            _shared("--data-dir", metavar="DIR", help="Where state lies.  [env: SLUM_DATA_DIR]"),
            _shared("--run-dir", metavar="DIR", help="Where sockets lie.  [env: SLUM_RUN_DIR]"),
            _shared("--json", is_flag=True, help="JSON on stdout, with a stable schema."),
            _shared("-y", "--yes", is_flag=True, help="Do not ask."),
            _shared("-q", "--quiet", is_flag=True, help="No progress and no notes."),
            _shared("--no-color", is_flag=True, help="No colour, also on a terminal.  [env: NO_COLOR]"),
            _shared("--debug", is_flag=True, help="Show the traceback of a bug."),
        )
    ):
        function = option(function)
    return function


SHARED = frozenset({"context", "data_dir", "run_dir", "json", "yes", "quiet", "no_color", "debug", "help"})


def file_option(function: F) -> F:
    """Add FILE, as an argument or as -f; the default is ./slum.toml."""
    function = click.option(
        "-f", "--file", "file_option", metavar="FILE", help="The same as FILE; - is standard input."
    )(function)
    return click.argument("file", required=False, type=click.Path())(function)


def file_of(file: str | None, file_option: str | None) -> str:
    """Return which file was meant; ConfigError when two were."""
    if file is not None and file_option is not None and file != file_option:
        raise ConfigError(f"two files were given: {file} and {file_option}", hint="give one")
    return file or file_option or "slum.toml"


def invocation(settings: Mapping[str, object]) -> Invocation:
    """Return how this command was called, from what the options left in *settings*; ConfigError for a bad folder."""
    from slum.paths import find_home

    env = dict(os.environ)
    for variable, setting in (("SLUM_DATA_DIR", "data_dir"), ("SLUM_RUN_DIR", "run_dir")):
        given = settings.get(setting)
        if isinstance(given, str):
            env[variable] = os.path.abspath(given)
    return Invocation(
        home=find_home(env, os.geteuid(), os.path.expanduser("~")),
        json=bool(settings.get("json")),
        yes=bool(settings.get("yes")),
        quiet=bool(settings.get("quiet")),
        color=style_on(settings, sys.stdout),
        context=context_of(settings, os.environ),
    )


def context_of(settings: Mapping[str, object], env: Mapping[str, str]) -> str:
    """Return the name of the context that is meant, "" for this machine's own control plane.

    In this order: --context; a folder of this machine that an option names; SLUM_CONTEXT; the context in use.
    """
    given = settings.get("context")
    if given is None and not settings.get("data_dir") and not settings.get("run_dir"):
        given = env.get("SLUM_CONTEXT") or _context_in_use(env)
    return "" if given in (None, "local") else str(given)


def _context_in_use(env: Mapping[str, str]) -> str:
    """As Contexts.current, without its imports: every command asks."""
    try:
        with open(f"{env.get('XDG_CONFIG_HOME') or os.path.expanduser('~/.config')}/slum/context") as file:
            return file.read().strip()
    except OSError:
        return ""


def can_consent(asked: Invocation) -> bool:
    """Tell whether consent is given, or somebody who sees the plan can be asked."""
    return asked.yes or (not asked.json and sys.stdin.isatty() and sys.stderr.isatty())


def consent(asked: Invocation, question: str, *, typed: str | None = None) -> bool:
    """Ask; True with --yes. With *typed* the answer must be that word. ConfigError (exit 2) when nobody can be asked."""
    if asked.yes:
        return True
    if not can_consent(asked):
        raise ConfigError(
            "this needs consent, and there is no terminal to ask on; nothing was changed", hint="add --yes"
        )
    # Not click.confirm: it asks through readline, which misses a ctrl-C that comes while it sets itself up.
    click.echo(f"{question}: " if typed is not None else f"{question} [y/N] ", err=True, nl=False)
    answer = sys.stdin.readline().strip()
    return answer == typed if typed is not None else answer.lower() in ("y", "yes")


def style_on(settings: Mapping[str, object], stream: TextIO) -> bool:
    """Tell whether *stream* takes colour: a terminal, no --no-color, no NO_COLOR (https://no-color.org), not dumb."""
    if settings.get("no_color") or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def print_error(
    message: str,
    settings: Mapping[str, object],
    *,
    exit_code: int,
    hint: str = "",
    error: SlumError | None = None,
) -> None:
    """Print on stderr what went wrong, the details one a line, and what to do next; with --json one JSON document."""
    details = error.problems if isinstance(error, ConfigError) else error.changes if isinstance(error, Conflict) else ()
    code = error.code if error is not None else {2: "bad_input", 130: "interrupted"}.get(exit_code, "internal")
    if settings.get("json"):
        import json

        problem = {"code": code, "message": message, "hint": hint, "details": list(details), "exit_code": exit_code}
        click.echo(json.dumps({"error": problem}), err=True)
        return
    label = "conflict" if isinstance(error, Conflict) else "error"
    if style_on(settings, sys.stderr):
        label = click.style(label, fg="red", bold=True)
    lines = [f"{label}: {message} (exit {exit_code})"]
    if isinstance(error, ConfigError):
        lines = [*details, *lines]
    elif details:
        lines += [f"  {'since then:' if n == 0 else '           '} {line}" for n, line in enumerate(details)]
    if hint:
        lines.append(f"  next: {hint}")
    click.echo("\n".join(lines), err=True, color=True)


def _shared(*names: str, **attributes: Any) -> Callable[[F], F]:
    return click.option(*names, expose_value=False, callback=_remember, **attributes)


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    root = ctx.find_root()
    if root.obj is None:
        root.obj = {}
    if value is not None and value is not False:
        root.obj[parameter.name] = value
