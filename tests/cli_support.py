"""The command line in this process, against a control plane in memory: quick, and with real sockets and files."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes.api import FakeApi, FakeFleet

from slum.cli.main import run
from slum.paths import Home, checked_home

FILE = """
[fleet]
name = "quickstart"

[operators.local]
type = "local"

[tenement.here]
operator = "local"

[tenement.here.service.notes]
source = "./notes"
command = "python3 app.py"
isolation = "process"

[tenement.here.service.ticker]
command = "sleep 1000"
isolation = "process"
listen = "none"
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Desk:
    """A folder with a slum.toml, a home, and a fake control plane that may be started."""

    def __init__(self, folder: Path, home: Home, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.home = home
        self.fleet = FakeFleet()
        self.api = FakeApi(home.api_socket, self.fleet)
        self._capture = capture
        self.write(FILE)

    def write(self, text: str, name: str = "slum.toml") -> Path:
        (self.folder / "notes").mkdir(exist_ok=True)
        (self.folder / "notes" / "app.py").write_text("print('hello')\n")
        path = self.folder / name
        path.write_text(text)
        return path

    def slum(self, *args: str, code: int | None = 0) -> Ran:
        """Run one command line; *code* is the exit code that is expected, None for any."""
        self._capture.readouterr()
        got = run(["--data-dir", str(self.home.data), "--run-dir", str(self.home.run), *args])
        out, err = self._capture.readouterr()
        ran = Ran(got, out, err)
        assert code is None or got == code, ran
        return ran


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    """A desk whose control plane runs; nobody sits at a terminal."""
    with bare_desk(tmp_path, monkeypatch, capfd) as made, made.api:
        yield made


@pytest.fixture
def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    """A desk without a control plane."""
    with bare_desk(tmp_path, monkeypatch, capfd) as made:
        yield made


@contextmanager
def bare_desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Desk]:
    short = Path(f"/tmp/c{secrets.token_hex(5)}")
    # Not below tmp_path, which the services' own users cannot pass.
    home = checked_home(short.with_name(short.name + "-d"), short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in [name for name in os.environ if name.startswith("SLUM_")]:
        monkeypatch.delenv(name)
    # pytest-xdist's workers ignore SIGINT, and so would all that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield Desk(tmp_path, home, capfd)
    finally:
        signal.signal(signal.SIGINT, before)
        shutil.rmtree(home.run, ignore_errors=True)
        shutil.rmtree(home.data, ignore_errors=True)
