"""Where a bug's traceback goes: a file that the user can send, or the terminal with --debug. Nothing else."""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path

import click


def record(bug: BaseException, *, debug: bool) -> str:
    """Keep the traceback of *bug* and return the sentence that says where it is."""
    text = "".join(traceback.format_exception(bug))
    if debug:
        click.echo(text, err=True)
        return "please report it with the lines above"
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "slum"
    path = folder / f"crash-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        return f"its traceback could not be kept in {path} ({error.strerror}); repeat with --debug to see it"
    return f"please report it with its traceback: {path}"
