"""Uids: stable, unique, on disk before use, and never given out twice by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from slum.errors import SlumError
from slum.node import uids as module
from slum.node.uids import UID_FIRST, Uids


def test_uids_are_stable_unique_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "uids.json"
    table = Uids(file)
    assert [table.uid_of(name) for name in ("web", "db", "web")] == [UID_FIRST, UID_FIRST + 1, UID_FIRST]
    assert file.stat().st_mode & 0o777 == 0o600
    again = Uids(file)
    assert again.all() == {"web": UID_FIRST, "db": UID_FIRST + 1}
    assert again.uid_of("new") == UID_FIRST + 2


def test_a_uid_comes_back_only_when_freed(tmp_path: Path) -> None:
    file = tmp_path / "uids.json"
    table = Uids(file)
    for name in ("a", "b", "c"):
        table.uid_of(name)
    table.free("b")
    table.free("never-there")
    assert Uids(file).uid_of("d") == UID_FIRST + 1
    assert Uids(file).all()["c"] == UID_FIRST + 2


def test_when_all_are_taken_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UID_LAST", UID_FIRST + 1)
    table = Uids(tmp_path / "uids.json")
    table.uid_of("a")
    table.uid_of("b")
    with pytest.raises(SlumError, match="all 2 uids"):
        table.uid_of("c")
    assert table.uid_of("a") == UID_FIRST


def test_a_damaged_table_is_never_written_over(tmp_path: Path) -> None:
    file = tmp_path / "uids.json"
    file.write_text('{"web": 20')
    with pytest.raises(SlumError, match="is damaged"):
        Uids(file)
    assert file.read_text() == '{"web": 20'


def test_a_failed_write_gives_nothing_out(tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    table = Uids(folder / "uids.json")
    folder.rmdir()
    with pytest.raises(OSError):
        table.uid_of("web")
    assert table.all() == {}
