"""`slum export`: the fleet as another system's files, in a folder of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slum import __version__
from slum.cli.base import Invocation, command
from slum.errors import EXIT_CHANGES, ConfigError

if TYPE_CHECKING:
    from slum.cli.outfolder import Change
    from slum.exports.base import Loss
    from slum.model import Fleet

NAMES = ("fly", "terraform", "compose")
DEFAULT_FILE = "slum.toml"
NEXT: Mapping[str, str] = {
    "fly": "read {out}/README.md, then `fly deploy`",
    "terraform": "`terraform -chdir={out} init`, then `plan`",
    "compose": "read {out}/README.md, then `docker compose up`",
}


@command(
    "export",
    examples="""
    slum export compose
    slum export terraform --out build/tf -f examples/quickstart/slum.toml
    slum export fly --diff --strict
    """,
)
@click.argument("name", metavar="NAME", type=click.Choice(NAMES))
@click.option("-f", "--file", "file_option", metavar="FILE", help="The slum.toml; without one here, the live fleet.")
@click.option("--out", metavar="DIR", help="Folder to write into.  [default: build/NAME]")
@click.option("--strict", is_flag=True, help="Anything that NAME cannot say is an error.")
@click.option(
    "--diff", is_flag=True, help="Show what would change in DIR and write nothing; exit 10 when there is something."
)
@click.option("--force", is_flag=True, help="Replace files in DIR that would change.")
@click.option("--import", "take_over", is_flag=True, help="terraform: take over the machines of the live fleet.")
def export(
    asked: Invocation,
    name: str,
    file_option: str | None,
    out: str | None,
    strict: bool,
    diff: bool,
    force: bool,
    take_over: bool,
) -> int:
    """Write the fleet as files for NAME: fly, terraform or compose.

    Reads FILE, or ./slum.toml, or asks the control plane when there is none. What NAME cannot say is listed, here and in
    DIR/losses.json. No secret is ever read or written.
    """
    from slum.cli.outfolder import compare, write
    from slum.exports.base import LOSSES, Site
    from slum.exports.registry import EXPORTS

    folder = Path(out or f"build/{name}")
    fleet, sources, root = _fleet(asked, file_option, folder)
    machines = _machines(asked) if take_over else {}
    site = Site(root=root, sources=sources, version=__version__, machines=machines)
    rendered = EXPORTS[name](fleet, site)
    if strict and rendered.losses:
        raise ConfigError(
            f"{name} cannot say {len(rendered.losses)} of the things that this fleet says; nothing was written",
            problems=_grouped(rendered.losses),
            hint="change them, or export without --strict",
        )
    files = [*((file.path, file.text) for file in rendered.files), (LOSSES, _losses_json(rendered.losses))]
    changes = compare(folder, files)
    changed = [change for change in changes if change.state == "changed"]
    written = not diff and (force or not changed)
    if written:
        write(folder, [file for file, change in zip(files, changes, strict=True) if change.state != "same"])
    if asked.json:
        shown = [{"path": change.path, "state": change.state} for change in changes]
        asked.emit({"export": name, "out": str(folder), "written": written, "files": shown, "losses": rendered.losses})
    else:
        _say(asked, name, folder, changes, rendered.losses, written=written, diff=diff)
    if diff:
        return EXIT_CHANGES if any(change.state != "same" for change in changes) else 0
    if not written:
        count = f"{len(changed)} file{'s' if len(changed) > 1 else ''} in {folder} would change"
        raise ConfigError(f"{count}; nothing was written", hint="look at the diff, then add --force")
    return 0


def _fleet(asked: Invocation, file: str | None, folder: Path) -> tuple[Fleet, dict[tuple[str, str], str], str]:
    """Return the fleet, where its sources lie seen from *folder*, and the way from there to where we are."""
    from slum.fleetfile import load

    target = os.path.realpath(folder)
    root = os.path.relpath(os.getcwd(), target)
    path = file or (DEFAULT_FILE if os.path.lexists(DEFAULT_FILE) else None)
    if path is None:
        with asked.client() as client:
            fleet = client.fleet().fleet
        asked.note("no slum.toml here: this is the fleet of the control plane")
        return fleet, {}, root
    loaded = load(Path(path))
    for warning in loaded.warnings:
        asked.note(f"{warning} (warning)")
    sources = {key: os.path.relpath(os.path.realpath(source), target) for key, source in loaded.sources.items()}
    return loaded.fleet, sources, root


def _machines(asked: Invocation) -> dict[str, str]:
    with asked.client() as client:
        return {view.name: view.machine for view in client.state().tenements if view.machine}


def _losses_json(losses: Sequence[Loss]) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(losses), indent=2).decode() + "\n"


def _say(
    asked: Invocation,
    name: str,
    folder: Path,
    changes: Sequence[Change],
    losses: Sequence[Loss],
    *,
    written: bool,
    diff: bool,
) -> None:
    from slum.render import clean

    marks = {"new": ("+", "good"), "changed": ("~", "warn")}
    moved = [change for change in changes if change.state in marks]
    for change in moved:
        mark, style = marks[change.state]
        if written or diff or change.state == "changed":
            asked.say(asked.paint(f"{mark} {folder / change.path}", style))
        if not written:
            for line in change.diff:
                asked.say(asked.paint(f"  {clean(line)}", {"+": "good", "-": "bad", "@": "dim"}.get(line[:1], "")))
    if losses:
        asked.say(f"{name} cannot say {len(losses)} of the things that this fleet says:")
        for line in _grouped(losses):
            asked.say(f"  {line}")
    if written:
        same = len(changes) - len(moved)
        asked.say(f"{len(moved)} files written, {same} as they were; next: {NEXT[name].format(out=folder)}")
    elif diff and not moved:
        asked.say(f"{folder} is as it would be written")


def _grouped(losses: Sequence[Loss]) -> list[str]:
    """Return one line for each kind of loss: where, why, and what to do instead."""
    from slum.render import clean

    kinds: dict[tuple[str, str, str], list[Loss]] = {}
    for loss in losses:
        kinds.setdefault((loss.path.rpartition(".")[2], loss.why, loss.instead), []).append(loss)
    lines = []
    for (_, why, instead), group in kinds.items():
        where = group[0].path + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        what = f" ({group[0].what})" if len(group) == 1 else ""
        lines.append(clean(f"{where}{what}: {why}" + (f"; {instead}" if instead else "")))
    return lines
