"""Bundles: equal contents give equal bytes; what may not be packed is refused; nothing changes underneath unseen."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from slum import pack as packing
from slum.errors import ConfigError
from slum.model import Fleet, Service, Tenement
from slum.pack import Packed, attach, pack


def tree(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    folder.mkdir(exist_ok=True)
    return folder


def members(bundle: Path) -> list[tarfile.TarInfo]:
    raw = zstandard.ZstdDecompressor().decompressobj().decompress(bundle.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return tar.getmembers()


def names(folder: Path, out: Path) -> list[str]:
    pack(folder, out)
    return [member.name for member in members(out)]


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    files = {"b/z.py": "1", "b/a.py": "2", "a.txt": "3", "ü/x": "4", "b.txt": "5"}
    one = tree(tmp_path / "one", files)
    other = tree(tmp_path / "other", dict(reversed(files.items())))
    (other / "a.txt").chmod(0o600)
    os.utime(other / "b" / "z.py", (1, 1))
    packed = pack(one, tmp_path / "1")
    assert pack(other, tmp_path / "2") == packed
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    raw = (tmp_path / "1").read_bytes()
    assert packed == Packed(digest=hashlib.sha256(raw).hexdigest(), bytes=len(raw), files=7)
    (other / "a.txt").chmod(0o700)
    assert pack(other, tmp_path / "3").digest != packed.digest


def test_what_stands_in_a_bundle(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {"bin/run": "#!", "data": "x" * 3000, "n" * 200 + "/" + "m" * 200: "long"})
    (source / "bin" / "run").chmod(0o4751)
    (source / "empty").mkdir(mode=0o700)
    (source / "link").symlink_to("bin/run")
    pack(source, tmp_path / "out")
    found = members(tmp_path / "out")
    assert [m.name for m in found] == sorted(m.name for m in found)
    kinds = {m.name: (m.type, m.mode, m.size, m.linkname) for m in found}
    assert kinds["bin/run"] == (tarfile.REGTYPE, 0o755, 2, "")
    assert kinds["data"] == (tarfile.REGTYPE, 0o644, 3000, "")
    assert kinds["empty"] == (tarfile.DIRTYPE, 0o755, 0, "")
    assert kinds["link"] == (tarfile.SYMTYPE, 0o777, 0, "bin/run")
    assert {(m.uid, m.gid, m.mtime, m.uname, m.gname) for m in found} == {(0, 0, 0, "", "")}
    assert "n" * 200 + "/" + "m" * 200 in kinds


def test_the_bytes_do_not_change_between_versions_unseen(tmp_path: Path) -> None:
    """A new compressor may change digests, which deploys everything again: then say so in the change log."""
    source = tree(tmp_path / "s", {"app.py": "print('hello')\n" * 100})
    assert pack(source, tmp_path / "out").bytes < 400
    raw = zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "out").read_bytes())
    assert hashlib.sha256(raw).hexdigest() == "b76952dceec6288e7ea3713bffaacb52889b32c8bb54d6f0bfeb834950944b15"


@pytest.mark.parametrize(
    ("ignore", "kept"),
    [
        ("", ["a.log", "a.py", "build", "build/x", "sub", "sub/b.log", "sub/build", "sub/build/y"]),
        ("*.log\n", ["a.py", "build", "build/x", "sub", "sub/build", "sub/build/y"]),
        ("/build/\n# comment\n", ["a.log", "a.py", "sub", "sub/b.log", "sub/build", "sub/build/y"]),
        ("build\n*.log\n!b.log\n", ["a.py", "sub", "sub/b.log"]),
        ("*\n!*.py\n", ["a.py"]),
    ],
)
def test_slumignore(tmp_path: Path, ignore: str, kept: list[str]) -> None:
    files = {
        "a.py": "",
        "a.log": "",
        "sub/b.log": "",
        "build/x": "",
        "sub/build/y": "",
        ".git/config": "",
        "sub/.git": "",
    }
    source = tree(tmp_path / "s", files)
    if ignore:
        (source / ".slumignore").write_text(ignore)
    assert names(source, tmp_path / "out") == kept


def test_ignored_things_are_not_looked_at(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {".slumignore": "venv/\nfifo\nout\n"})
    (source / "venv").mkdir()
    (source / "venv" / "python").symlink_to("/usr/bin/python3")
    (source / "out").symlink_to("/etc")
    os.mkfifo(source / "fifo")
    assert names(source, tmp_path / "out") == []


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "/", "..", "../s", "sub/../..", "sub/up/..", "loop", "sub/../../x", "hop"]
)
def test_links_that_lead_out_are_refused(tmp_path: Path, target: str) -> None:
    """`sub/up` -> `..` is fine by itself, but `sub/up/..` is outside, whatever its letters say."""
    source = tree(tmp_path / "s", {"sub/x": ""})
    (source / "sub" / "up").symlink_to("..")
    if target == "loop":
        (source / "loop").symlink_to("loop")
    elif target == "hop":
        (source / "bad").symlink_to("sub/up/sub/up/../x")
    else:
        (source / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="leads out of the folder"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target", ["x", "./sub/../x", "sub", ".", "sub/up/x", "sub/up/sub/up", "missing/file", "missing/.."]
)
def test_links_that_stay_inside_are_kept(tmp_path: Path, target: str) -> None:
    source = tree(tmp_path / "s", {"x": "", "sub/y": ""})
    (source / "sub" / "up").symlink_to("..")
    (source / "link").symlink_to(target)
    pack(source, tmp_path / "out")
    assert {m.linkname for m in members(tmp_path / "out") if m.name == "link"} == {target}


def test_devices_fifos_and_sockets_are_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {"a": ""})
    os.mkfifo(source / "f")
    with pytest.raises(ConfigError, match='"f" is a FIFO') as caught:
        pack(source, tmp_path / "out")
    assert ".slumignore" in caught.value.hint
    (source / "f").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        here = os.open(source, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{here}/s")  # a short name, however long the folder's is
        finally:
            os.close(here)
        with pytest.raises(ConfigError, match='"s" is a socket'):
            pack(source, tmp_path / "out")


@pytest.mark.root
def test_device_nodes_are_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {"a": ""})
    try:
        os.mknod(source / "null", 0o20666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("mknod is not allowed here")
    with pytest.raises(ConfigError, match='"null" is a device'):
        pack(source, tmp_path / "out")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {})
    (source / os.fsdecode(b"\xff")).touch()
    with pytest.raises(ConfigError, match="is not UTF-8"):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"\xff", b"x" * 70_000], ids=["not text", "too large"])
def test_a_bad_slumignore_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="slumignore"):
        pack(tree(tmp_path / "s", {".slumignore": content}), tmp_path / "out")


def test_a_slumignore_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {"a": ""})
    (source / ".slumignore").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="slumignore"):
        pack(source, tmp_path / "out")


def test_a_slumignore_that_is_a_folder_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {".slumignore/x": ""})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ConfigError, match="slumignore: is a directory"):
            pack(source, tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) < before + 10


def test_limits(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {})
    with open(source / "big", "wb") as file:
        file.truncate(packing.BYTES_MAX + 1)
    with pytest.raises(ConfigError, match="more than 256"):
        pack(source, tmp_path / "out")
    (source / "big").unlink()
    deep = source
    for _ in range(packing.DEPTH_MAX + 2):
        deep = deep / "d"
        deep.mkdir()
    with pytest.raises(ConfigError, match="nested deeper than 100"):
        pack(source, tmp_path / "out")
    shutil.rmtree(source)
    tree(source, {str(n): "" for n in range(11)})
    with pytest.raises(ConfigError, match="more than 10 files"):
        pack(source, tmp_path / "out", files_max=10)
    assert pack(source, tmp_path / "out", files_max=11).files == 11


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, why in (("missing", "no such file"), ("file", "not a directory")):
        with pytest.raises(ConfigError, match=why):
            pack(tmp_path / name, tmp_path / "out")
    with pytest.raises(ConfigError, match="no such file"):
        pack(tree(tmp_path / "s", {"a": ""}), tmp_path / "no" / "out")


def test_a_bundle_inside_its_own_folder_leaves_itself_out(tmp_path: Path) -> None:
    source = tree(tmp_path / "s", {"a": "1"})
    assert names(source, source / "out") == ["a"]


def test_a_folder_that_changes_is_an_error_never_a_torn_bundle(tmp_path: Path) -> None:
    """A writer rewrites and swaps files all the while: each try gives an error or a bundle of whole files."""
    source = tree(tmp_path / "s", {f"f{n:02}": b"a" * 200_000 for n in range(8)})
    secret = tree(tmp_path / "outside", {"secret": "TOPSECRET"}) / "secret"
    done = threading.Event()

    def disturb() -> None:
        n = 0
        while not done.is_set():
            n += 1
            victim, spare = source / f"f{n % 8:02}", tmp_path / "spare"
            if n % 3 == 0:
                spare.unlink(missing_ok=True)
                spare.symlink_to(secret)
                spare.rename(victim)
            else:
                spare.unlink(missing_ok=True)
                spare.write_bytes(b"ab"[n % 2 : n % 2 + 1] * 200_000)
                spare.rename(victim)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        tries = refused = 0
        while tries < 40 or (not refused and tries < 4000):
            tries += 1
            (tmp_path / "out").unlink(missing_ok=True)
            try:
                pack(source, tmp_path / "out")
            except ConfigError:
                refused += 1
                assert not (tmp_path / "out").exists()
                continue
            raw = zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "out").read_bytes())
            assert b"TOPSECRET" not in raw
            with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
                for member in tar:
                    body = tar.extractfile(member)
                    assert body is not None
                    assert len(set(body.read())) == 1
    finally:
        done.set()
        thread.join()
    assert refused


NAME = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=5).filter(
    lambda name: name not in (".", "..", ".git", ".slumignore")
)


@settings(max_examples=40, deadline=None)
@given(files=st.dictionaries(NAME, st.binary(max_size=50), max_size=5))
def test_any_files_come_back_as_they_were(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = tree(folder / "s", files)
    pack(source, folder / "out")
    raw = zstandard.ZstdDecompressor().decompressobj().decompress((folder / "out").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        found = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        assert {name: body.read() for name, body in found.items() if body is not None} == files


def test_attach_sets_digests_and_nothing_else() -> None:
    services = (Service(name="a", command=("x",), source="a"), Service(name="b", command=("x",)))
    fleet = Fleet(tenements=(Tenement(name="t", operator="l", services=services),))
    attached = attach(fleet, {("t", "a"): "0" * 64, ("u", "b"): "1" * 64})
    assert [service.bundle for service in attached.tenements[0].services] == ["0" * 64, None]
    assert attach(attached, {}) == attached
