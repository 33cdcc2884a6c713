"""The file that `env:` secrets come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from slum.errors import ConfigError
from slum.node.secretenv import lookup, read, secret_file
from slum.paths import Home


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "env"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_it_overlays_the_environment_and_is_read_anew(tmp_path: Path) -> None:
    home = Home(data=tmp_path, run=tmp_path)
    home.agent.mkdir()
    assert lookup(home, "A", {"A": "env"}) == "env"
    assert lookup(home, "B", {}) is None
    write(home.agent, "# comment\n\nA=file=1 \nB=\n")
    assert lookup(home, "A", {"A": "env"}) == "file=1 "
    assert lookup(home, "B", {}) == ""
    write(home.agent, "A=rotated\n")
    assert lookup(home, "A", {}) == "rotated"
    assert secret_file(home) == home.agent / "env"


@pytest.mark.parametrize(
    ("text", "mode"), [("A=1\n", 0o640), ("A=1\n", 0o604), ("hush-771\n", 0o600), ("1A=hush-771\n", 0o600)]
)
def test_an_unusable_file_is_refused_without_its_words(tmp_path: Path, text: str, mode: int) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, text, mode))
    assert "hush-771" not in str(caught.value) + caught.value.hint


def test_not_utf8(tmp_path: Path) -> None:
    file = write(tmp_path, "")
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read(file)
