"""`slum import`: another system's files as a slum.toml."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slum.cli.base import Invocation, command
from slum.errors import ConfigError

if TYPE_CHECKING:
    from slum.exports.base import Loss

NAMES: dict[str, tuple[str, ...]] = {
    "fly": ("fly.toml",),
    "compose": ("compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"),
}
"""What a folder is searched for."""
READ_MAX = 1 << 20
FILES_MAX = 100_000


@command(
    "import",
    examples="""
    slum import compose examples/import/compose.yaml
    slum import compose docker-compose.yml --out slum.toml
    slum import fly build/fly --out slum.toml --force
    """,
)
@click.argument("name", metavar="NAME", type=click.Choice(list(NAMES)))
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path())
@click.option("--out", metavar="FILE", help="Write the slum.toml there instead of on stdout.")
@click.option("--strict", is_flag=True, help="Anything that slum.toml cannot say is an error.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def import_(asked: Invocation, name: str, files: tuple[str, ...], out: str | None, strict: bool, force: bool) -> None:
    """Read FILE (fly.toml or a Compose file; of a folder, all below it) and print a slum.toml.

    What a fleet cannot say is listed on stderr with its place in FILE. Variables are not read: ${NAME} becomes a secret
    that is read where the service runs, or its default.
    """
    from slum.cli.outfolder import compare, write
    from slum.exports.registry import IMPORTS
    from slum.exports.slumtoml import slum_toml
    from slum.validate import check_fleet

    target = Path(out) if out else Path("slum.toml")
    imported = IMPORTS[name](_read(name, files, target.parent))
    lines = _lines(imported.losses)
    if strict and lines:
        raise ConfigError(
            f"slum.toml cannot say {len(imported.losses)} of the things that are there; nothing was written",
            problems=lines,
        )
    text = slum_toml(imported.fleet)
    problems = tuple(str(problem) for problem in check_fleet(imported.fleet))
    if out is not None:
        change = compare(target.parent, [(target.name, text)])[0]
        if change.state == "changed" and not force:
            for line in change.diff:
                asked.say(f"  {line}")
            raise ConfigError(f"{target} would change; it was not touched", hint="look at the diff, then add --force")
        write(target.parent, [(target.name, text)])
    if asked.json:
        asked.emit({"fleet": imported.fleet, "toml": text, "losses": imported.losses, "problems": problems, "out": out})
        return
    if out is None:
        asked.say(text.rstrip("\n"))
    _note(asked, "could not be taken over as it is:", lines)
    _note(asked, "needs a decision before it can be applied:", problems)
    if out is not None:
        asked.say(f"wrote {target}: read it, then `slum validate {target}`")


def _read(name: str, given: Sequence[str], base: Path) -> dict[str, str]:
    """Return path (relative to *base*) -> text of the files that were named, and of those that tell more of them."""
    from slum.exports import compose_import, fly_import

    companions: Callable[[str, str], tuple[str, ...]]
    companions = fly_import.companions if name == "fly" else compose_import.companions
    texts: dict[str, str] = {}
    beside: dict[str, Path] = {}
    for path in _named(name, given):
        key = os.path.relpath(path, base)
        texts[key] = _text(path)
        for more in companions(key, texts[key]):
            beside[os.path.normpath(os.path.join(os.path.dirname(key), more))] = path.parent / more
    for key, path in sorted(beside.items()):
        if key not in texts and path.is_file():
            texts[key] = _text(path)
    return texts


def _named(name: str, given: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for text in given:
        path = Path(text)
        if not path.is_dir():
            found.append(path)
            continue
        below = sorted(p for wanted in NAMES[name] for p in path.rglob(wanted) if p.is_file())
        if not below:
            raise ConfigError(f"{path}: there is no {' or '.join(NAMES[name])} in it")
        found += below
    if len(found) > FILES_MAX:
        raise ConfigError(f"{len(found):,} files are more than {FILES_MAX:,}")
    return found


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(READ_MAX + 1)
        if len(data) > READ_MAX:
            raise ConfigError(f"{path}: larger than {READ_MAX >> 10} KB")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {data[error.start]:#04x})") from error


def _lines(losses: Sequence[Loss]) -> list[str]:
    from slum.render import clean

    return [
        clean(f"{loss.path}: {loss.what}: {loss.why}" + (f"; {loss.instead}" if loss.instead else ""))
        for loss in losses
    ]


def _note(asked: Invocation, head: str, lines: Sequence[str]) -> None:
    if lines:
        asked.note(f"{len(lines)} thing{'s' if len(lines) > 1 else ''} {head}")
        for line in lines:
            asked.note(f"  {line}")
