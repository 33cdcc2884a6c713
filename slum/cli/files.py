"""`slum init` and `slum validate`: writing and checking slum.toml."""

from __future__ import annotations

from pathlib import Path

import click

from slum.cli.base import Invocation, command, file_of, file_option
from slum.errors import ConfigError


@command(
    "init",
    examples="""
    slum init
    slum init fleet/slum.toml
    """,
)
@file_option
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def init(asked: Invocation, file: str | None, file_option: str | None, force: bool) -> None:
    """Write a commented slum.toml (or FILE) to start from: it is valid as it stands."""
    from importlib.resources import files

    path = Path(file_of(file, file_option))
    text = files("slum.cli").joinpath("init.toml").read_text(encoding="utf-8")
    if str(path) == "-":
        click.echo(text, nl=False)
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} is there already; it was not touched", hint="name another file, or add --force"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    if asked.json:
        asked.emit({"file": str(path)})
    asked.say(f"wrote {path}: read it, change it, then `slum apply{'' if str(path) == 'slum.toml' else f' {path}'}`")


@command(
    "validate",
    examples="""
    slum validate
    slum validate examples/quickstart/slum.toml --json
    """,
)
@file_option
@click.option("--here", is_flag=True, help="Also prove that this machine can do what its services ask.")
def validate(asked: Invocation, file: str | None, file_option: str | None, here: bool) -> None:
    """Check FILE (./slum.toml) and every tenement.toml that it names: all problems at once, with file and line.

    Ends with 2 when there is one. Warnings do not count.
    """
    from slum.cli.prepare import read_fleet
    from slum.fleetfile import load
    from slum.render import quantity

    path = file_of(file, file_option)
    loaded = read_fleet(asked, path) if here else load(Path(path))
    warnings = [str(warning) for warning in loaded.warnings]
    if asked.json:
        asked.emit({"ok": True, "fleet": loaded.fleet, "warnings": warnings, "files": [str(f) for f in loaded.files]})
        return
    if not here:
        for warning in warnings:
            asked.note(f"{warning} (warning)")
    services = sum(len(tenement.services) for tenement in loaded.fleet.tenements)
    asked.say(
        f"{path}: {asked.paint('valid', 'good')}: fleet {loaded.fleet.name}, "
        f"{quantity(len(loaded.fleet.tenements), 'tenement')}, {quantity(services, 'service')}"
    )
