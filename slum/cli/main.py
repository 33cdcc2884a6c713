"""The `slum` program: which commands there are, and how every one of them ends.

A command's module is imported only when that command runs (or its own --help is asked for), so `slum --help` stays as
cheap as click itself: this module may import nothing beyond click, the errors and the small base beside it. Here alone
errors are printed and turned into exit codes (docs/cli.md); nothing else in slum prints errors or exits.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import NamedTuple

import click

from slum import __version__
from slum.cli.base import EXIT_PIPE, print_error, shared_options
from slum.errors import EXIT_DONE, EXIT_INTERRUPTED, SlumError

COMPLETE_VARIABLE = "_SLUM_COMPLETE"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What a write meets when the user's disk, not slum, is at fault."""


class Entry(NamedTuple):
    """Where a command lives ("module:attribute") and what the list says of it."""

    where: str
    help: str


SECTIONS: dict[str, dict[str, Entry]] = {
    "Change the fleet": {
        "init": Entry("slum.cli.files:init", "Write a commented slum.toml to start from."),
        "validate": Entry("slum.cli.files:validate", "Check a slum.toml and list every problem at once."),
        "plan": Entry("slum.cli.planning:plan", "Show what apply would do; exit 10 when there is something."),
        "apply": Entry("slum.cli.apply:apply", "Make the fleet what slum.toml says, and wait for it."),
        "rollback": Entry("slum.cli.undo:rollback", "Go back to an earlier revision."),
        "destroy": Entry("slum.cli.undo:destroy", "Stop and remove everything that the fleet declares."),
    },
    "Other systems": {
        "export": Entry("slum.cli.export:export", "Write the fleet as files for fly, terraform or compose."),
        "import": Entry("slum.cli.import_:import_", "Turn a fly.toml or a Compose file into a slum.toml."),
    },
    "Look": {
        "machines": Entry("slum.cli.machines:machines", "List the machines of all operators, strays too."),
        "status": Entry("slum.cli.look:status", "Show control plane, machines and what is not well."),
        "ps": Entry("slum.cli.look:ps", "List instances and their URLs."),
        "logs": Entry("slum.cli.logs:logs", "Print or follow the output of a service."),
        "events": Entry("slum.cli.events:events", "List, follow or verify the audit trail."),
        "at": Entry("slum.cli.history:at", "Show the fleet as it was at a point."),
        "diff": Entry("slum.cli.history:diff", "Show what changed between two points."),
        "explain": Entry("slum.cli.look:explain", "Tell why a service is in its state, and what to do."),
    },
    "Act on a service": {
        "restart": Entry("slum.cli.act:restart", "Restart instances and wait until they are well."),
        "stop": Entry("slum.cli.act:stop", "Stop instances until `slum start`."),
        "start": Entry("slum.cli.act:start", "Start what was stopped."),
        "exec": Entry("slum.cli.shell:exec_", "Run a command inside the wall of a running instance."),
        "run": Entry("slum.cli.shell:run", "Run a one-off command behind a wall like the service's."),
    },
    "Machines": {
        "bootstrap": Entry("slum.cli.bootstrap:bootstrap", "Install slum on hosts with SSH, or upgrade it there."),
        "ssh": Entry("slum.cli.ssh:ssh", "Open a shell on a tenement's host."),
        "drain": Entry("slum.cli.machines:drain", "Empty a machine and keep it empty until --undo."),
        "hostkey": Entry("slum.cli.hostkey:hostkey", "List the keys of hosts with SSH, or forget one."),
    },
    "Who may come in": {
        "token": Entry("slum.cli.token:token", "Let in a node, a member or a user, once; revoke."),
        "user": Entry("slum.cli.user:user", "List and remove users of this control plane."),
        "context": Entry("slum.cli.context:context", "Choose the control plane to speak to, here or elsewhere."),
    },
    "Backup and recovery": {
        "backup": Entry("slum.cli.backup:backup", "How far the backup is, and whether it can be restored."),
        "restore": Entry("slum.cli.restore:restore", "Bring a control plane back from its backup."),
        "resume": Entry("slum.cli.restore:resume", "Go on after a restore, once you have seen what would be done."),
    },
    "This machine": {
        "up": Entry("slum.cli.machine:up", "Start the control plane and the agent here."),
        "down": Entry("slum.cli.machine:down", "Stop them; services go on unless --services."),
        "secret": Entry("slum.cli.secret:secret", "Keep secrets of services and tokens of operators here."),
        "join": Entry("slum.cli.join:join", "Make this machine a node of a control plane elsewhere."),
        "doctor": Entry("slum.cli.machine:doctor", "Prove which isolation levels and limits work here."),
        "server": Entry("slum.cli.server:server", "Open the control plane to others; members join and leave."),
        "version": Entry("slum.cli.machine:version", "Print the versions."),
        "completion": Entry("slum.cli.machine:completion", "Print the completion script of a shell."),
    },
}
COMMANDS: dict[str, Entry] = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class LazyGroup(click.Group):
    """A group whose list comes from COMMANDS and whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        from importlib import import_module

        module, _, attribute = entry.where.partition(":")
        command = getattr(import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.where} is no command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, n=1)
            raise click.UsageError(
                f"there is no command {args[0]!r}" + (f"; did you mean `slum {near[0]}`?" if near else ""), ctx=ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), entry.help) for name, entry in entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[click.shell_completion.CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=e.help) for name, e in COMMANDS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{self.epilog}\n")


EPILOG = """\
Start here:
  slum doctor                 what works on this machine
  slum init && slum apply     a first fleet
  slum explain SERVICE        why something is as it is"""


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
    subcommand_metavar="COMMAND [ARGS]...",
)
@shared_options
@click.version_option(__version__, message="slum %(version)s")
@click.pass_context
def slum(ctx: click.Context) -> None:
    """Run many small programs, isolated, on few machines: one file declares the fleet, slum keeps it true."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; every error is printed here and nowhere else."""
    settings: dict[str, object] = {}
    try:
        with slum.make_context("slum", list(args), obj=settings) as ctx:
            result = slum.invoke(ctx)
        sys.stdout.flush()
        return result if isinstance(result, int) else EXIT_DONE
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        print_error(_usage_message(error), settings, hint=_usage_hint(error), exit_code=error.exit_code)
        return error.exit_code
    except SlumError as error:
        print_error(error.message, settings, error=error, hint=error.hint, exit_code=error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has gone (`slum logs web | head`): nothing is wrong, and nothing can be said.
        _drop_output()
        return EXIT_PIPE
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except Exception as bug:  # noqa: BLE001 - the outermost boundary: a bug is recorded with its traceback, then exit 1
        from slum.cli.crash import record

        if isinstance(bug, OSError) and bug.errno in FULL and bug.filename is None:
            _drop_output()
            print_error(f"the output cannot be written: {bug.strerror}", settings, exit_code=SlumError.exit_code)
            return SlumError.exit_code
        print_error(
            f"a bug in slum: {type(bug).__name__}: {bug}",
            settings,
            hint=record(bug, debug=bool(settings.get("debug"))),
            exit_code=SlumError.exit_code,
        )
        return SlumError.exit_code


def _drop_output() -> None:
    """What is still to be written goes nowhere, so that the interpreter's end does not try it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """The console script."""
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        sys.exit(shell_complete(slum, {"obj": {}}, "slum", COMPLETE_VARIABLE, instruction))
    sys.exit(_uninterrupted(sys.argv[1:]))


def _uninterrupted(args: Sequence[str]) -> int:
    """Run, and be deaf to ctrl-C from then on: the interpreter's own end would turn one into a traceback or a signal."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it; in this order each gets its own descriptor back
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for good
    try:
        code = run(args)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = EXIT_INTERRUPTED
    return code


def _usage_message(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    return message[:1].lower() + message[1:]


def _usage_hint(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    return f"`{ctx.command_path} --help` shows what it takes" if ctx is not None else ""


if __name__ == "__main__":
    main()
