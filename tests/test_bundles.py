"""Bundles: what slum packs comes out whole and read-only, and nothing hostile comes out at all."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from slum import pack
from slum.errors import ConfigError, Unreachable
from slum.model import Service
from slum.node import bundles, trees, unpack
from slum.paths import Home

GID = 200_123 if os.geteuid() == 0 else None


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(data=tmp_path / "data", run=tmp_path / "run")
    home.data.mkdir()
    return home


def packed(content: bytes) -> tuple[bytes, str]:
    data = zstandard.ZstdCompressor().compress(content)
    return data, hashlib.sha256(data).hexdigest()


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> tuple[bytes, str]:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed(out.getvalue())


def entry(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.mode = 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


class Blobs:
    """Stands for the control plane: hands out one blob, and counts."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.fetched = 0

    async def __call__(self, digest: str, folder: Path) -> Path:
        self.fetched += 1
        path = folder / "blob"
        path.write_bytes(self.data)
        return path


def leftovers(home: Home, service: str = "web") -> list[str]:
    return [name for name in os.listdir(home.bundles / service) if name.startswith(".")] + os.listdir(
        home.bundles / bundles.INCOMING
    )


async def test_what_was_packed_comes_out_read_only(tmp_path: Path, home: Home) -> None:
    source = tmp_path / "app"
    (source / "bin").mkdir(parents=True)
    (source / "bin/run").write_text("#!/bin/sh\n")
    (source / "bin/run").chmod(0o755)
    (source / "déjà vu.txt").write_text("x" * 3_000_000)
    (source / "empty").mkdir()
    (source / "current").symlink_to("bin/../bin/run")
    made = pack.pack(source, tmp_path / "out")
    blobs = Blobs((tmp_path / "out").read_bytes())
    folder = await bundles.ensure(home, "web", made.digest, GID, blobs)
    assert folder == home.bundles / "web" / made.digest
    assert (folder / "current").read_text() == "#!/bin/sh\n"
    assert (folder / "déjà vu.txt").stat().st_size == 3_000_000
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*") if not path.is_symlink()}
    assert modes == {"bin": 0o750, "run": 0o550, "déjà vu.txt": 0o440, "empty": 0o750}
    assert {(path.lstat().st_uid, path.lstat().st_gid) for path in (folder, *folder.glob("*/*"))} == {
        (os.geteuid(), os.getegid() if GID is None else GID)
    }
    assert await bundles.ensure(home, "web", made.digest, GID, blobs) == folder
    assert blobs.fetched == 1
    assert leftovers(home) == []


HOSTILE: dict[str, tuple[Callable[[], tuple[bytes, str]], str]] = {
    "parent": (lambda: archive(entry("../out", b"x")), "leads out"),
    "inner parent": (lambda: archive(entry("a/../../out", b"x")), "leads out"),
    "absolute": (lambda: archive(entry("/etc/slum-was-here", b"x")), "leads out"),
    "absolute link": (lambda: archive(link("a", "/etc/passwd")), "leads out"),
    "escaping link": (lambda: archive(link("a", "../../x")), "leads out"),
    "escape by two links": (lambda: archive(entry("d/e/f"), link("d/l", "e"), link("m", "d/l/../../..")), "leads out"),
    "write through a link": (lambda: archive(link("a", "."), entry("a/b", b"x")), "twice"),
    "file over a link": (lambda: archive(link("a", "b"), entry("a", b"x")), "twice"),
    "hard link": (lambda: archive(entry("a"), entry("b", type=tarfile.LNKTYPE, linkname="a")), "neither a file"),
    "device": (lambda: archive(entry("a", type=tarfile.CHRTYPE, devmajor=1, devminor=3)), "neither a file"),
    "FIFO": (lambda: archive(entry("a", type=tarfile.FIFOTYPE)), "neither a file"),
    "set-uid": (lambda: archive(entry("a", b"x", mode=0o4755)), "set-uid"),
    "twice": (lambda: archive(entry("a", b"x"), entry("a", b"y")), "twice"),
    "deep": (lambda: archive(entry("/".join("d" * 200))), "too long"),
    "not an archive": (lambda: packed(b"hello" * 1000), "damaged"),
    "not compressed": (lambda: (b"hello", hashlib.sha256(b"hello").hexdigest()), "damaged"),
    "cut short": (lambda: packed(_cut()), "damaged|cut short"),
    "bomb": (lambda: packed_zeros(), "MiB"),
}  # fmt: skip


def _cut() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("a")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(b"x" * 100_000))
    return out.getvalue()[:50_000]


def packed_zeros() -> tuple[bytes, str]:
    """A file of 2 GiB of zeros, some 200 kB compressed."""
    info = tarfile.TarInfo("zeros")
    info.size = 2 << 30
    compressor = zstandard.ZstdCompressor().compressobj()
    block = bytes(1 << 20)
    data = compressor.compress(info.tobuf()) + b"".join(compressor.compress(block) for _ in range(64))
    data += compressor.flush()
    return data, hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_bundle_is_refused_and_leaves_nothing(tmp_path: Path, home: Home, name: str) -> None:
    make, why = HOSTILE[name]
    data, digest = make()
    with pytest.raises(ConfigError, match=why):
        await bundles.ensure(home, "web", digest, GID, Blobs(data))
    assert leftovers(home) == []
    assert os.listdir(home.bundles / "web") == []
    assert "slum-was-here" not in os.listdir("/etc")
    assert os.listdir(tmp_path) == ["data"]


def test_more_files_than_allowed_are_refused(tmp_path: Path) -> None:
    data, digest = archive(*(entry(f"{number}/f") for number in range(6)))
    (tmp_path / "blob").write_bytes(data)
    with pytest.raises(unpack.Refused, match="more than 11 files"):
        unpack.unpack(tmp_path / "blob", digest, tmp_path / "folder", -1, files_max=11)
    assert os.listdir(tmp_path) == ["blob"]
    unpack.unpack(tmp_path / "blob", digest, tmp_path / "folder", -1, files_max=12)


async def test_contents_that_are_not_what_was_asked_for_are_refused(home: Home) -> None:
    data, _ = archive(entry("a", b"x"))
    with pytest.raises(ConfigError, match="digest"):
        await bundles.ensure(home, "web", "0" * 64, GID, Blobs(data))
    assert os.listdir(home.bundles / "web") == []


async def test_a_fetch_that_fails_passes_its_error_and_leaves_nothing(home: Home) -> None:
    async def gone(digest: str, folder: Path) -> Path:
        (folder / "part").write_text("x")
        raise Unreachable("no control plane")

    with pytest.raises(Unreachable):
        await bundles.ensure(home, "web", "0" * 64, GID, gone)
    assert leftovers(home) == []


async def test_two_at_once_get_the_same_folder(home: Home) -> None:
    data, digest = archive(entry("a", b"x"))
    blobs = Blobs(data)
    first, second = await asyncio.gather(*(bundles.ensure(home, "web", digest, GID, blobs) for _ in range(2)))
    assert first == second
    assert (first / "a").read_text() == "x"
    assert leftovers(home) == []


def test_a_crash_while_unpacking_leaves_no_bundle(tmp_path: Path, home: Home) -> None:
    data, digest = archive(*(entry(f"f{number}", b"x" * 1000) for number in range(4_000)))
    blob = tmp_path / "blob"
    blob.write_bytes(data)
    folder = bundles.make_folder(home, "web", GID) / digest
    argv, env = trees.child_command("slum.node.unpack", blob, digest, folder, -1)
    with subprocess.Popen(argv, env=env) as child:
        while not any(name.startswith(unpack.UNFINISHED) for name in os.listdir(folder.parent)):
            assert child.poll() is None
        child.kill()
    assert not folder.exists()
    assert len(leftovers(home)) == 1
    service = Service(name="web", command=("x",), bundle=digest)
    bundles.collect(home, [service])
    assert leftovers(home) == []
    unpack.unpack(blob, digest, folder, -1)
    assert len(os.listdir(folder)) == 4_000


async def test_collect_removes_all_that_nobody_needs(home: Home) -> None:
    data, digest = archive(entry("d/a", b"x"))
    other, other_digest = archive(entry("a", b"y"))
    await bundles.ensure(home, "web", digest, GID, Blobs(data))
    await bundles.ensure(home, "web", other_digest, GID, Blobs(other))
    await bundles.ensure(home, "gone", digest, GID, Blobs(data))
    web = Service(name="web", command=("x",), bundle=digest, build="make")
    old = Service(name="web", command=("x",), bundle=digest, build="make old")
    for service in (web, old):
        bundles.build_path(home, service).mkdir()
        bundles.build_marker(home, service).touch()
    (bundles.caches(home) / "web").mkdir(parents=True)
    (bundles.caches(home) / "gone").mkdir()
    bundles.collect(home, [web])
    kept = {bundles.bundle_path(home, "web", digest), bundles.build_path(home, web), bundles.build_marker(home, web)}
    assert set((home.bundles / "web").iterdir()) == kept
    assert sorted(os.listdir(home.bundles)) == [bundles.INCOMING, "web"]
    assert os.listdir(bundles.caches(home)) == ["web"]
    assert bundles.collect(home, [web]) == ()


def test_removing_copes_with_folders_without_permissions(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").touch()
    (root / "link").symlink_to(tmp_path)
    (root / "a/b").chmod(0)
    trees.remove(root)
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)
    trees.remove(root)
