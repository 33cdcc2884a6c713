"""The stores' conditional writes, one contract over file:// and a real S3 server; and a server that ignores conditions."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from backup_support import KEY, S3, SECRET, careless, refusing

from slum.backup import config
from slum.backup.config import Keys
from slum.backup.store import FolderStore, Ignored, Store, StoreError, Taken, open_store, probe

pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "file":
        return open_store(config.made(f"file://{tmp_path}/store"), Keys("", ""))
    server: S3 = request.getfixturevalue("s3")
    return open_store(server.settings(f"contract/{tmp_path.name}"), Keys(KEY, SECRET))


def test_objects_are_written_read_listed_and_deleted(store: Store) -> None:
    assert store.get("a/b.json") is None
    tag = store.create("a/b.json", b"one")
    found = store.get("a/b.json")
    assert found is not None
    assert (found.data, found.tag) == (b"one", tag)
    store.create("a/c/d", b"")
    assert sorted((one.name, one.size) for one in store.list("a")) == [("a/b.json", 3), ("a/c/d", 0)]
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.get("a/b.json") is None


def test_an_object_is_created_once(store: Store) -> None:
    store.create("HEAD", b"one")
    with pytest.raises(Taken):
        store.create("HEAD", b"two")
    found = store.get("HEAD")
    assert found is not None
    assert found.data == b"one"


def test_an_object_is_replaced_only_as_it_was_read(store: Store) -> None:
    first = store.create("HEAD", b"one")
    second = store.replace("HEAD", b"two", first)
    for stale in (first, '"0123456789abcdef0123456789abcdef"'):
        with pytest.raises(Taken):
            store.replace("HEAD", b"three", stale)
    assert store.get("HEAD") == (b"two", second)
    store.delete("HEAD")
    with pytest.raises(Taken):
        store.replace("HEAD", b"four", second)


def test_of_many_that_write_at_once_one_wins(store: Store) -> None:
    tag = store.create("HEAD", b"0")
    start = threading.Barrier(8)

    def attempt(write: Callable[[bytes], str], number: int) -> bytes | None:
        start.wait()
        try:
            write(str(number).encode())
        except Taken:
            return None
        return str(number).encode()

    for write, name in (
        (lambda data: store.replace("HEAD", data, tag), "HEAD"),
        (lambda data: store.create("claim", data), "claim"),
    ):
        with ThreadPoolExecutor(8) as pool:
            won = [one for one in pool.map(attempt, [write] * 8, range(1, 9)) if one is not None]
        found = store.get(name)
        assert found is not None
        assert won == [found.data]


def test_files_go_there_and_come_back(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 << 20))
    assert store.create_file("blobs/x", source)
    assert not store.create_file("blobs/x", source)
    assert store.get_file("blobs/x", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()
    assert not store.get_file("blobs/y", tmp_path / "nothing")


def test_the_probe_finds_that_conditions_hold_and_leaves_nothing(store: Store) -> None:
    probe(store)
    probe(store)
    assert not list(store.list(""))


def test_a_server_that_ignores_conditions_is_refused_with_the_reason() -> None:
    with careless() as endpoint:
        store = open_store(config.made("s3://backups/x", endpoint=endpoint), Keys(KEY, SECRET))
        with pytest.raises(Ignored, match="creates over an object that is there"):
            probe(store)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems say yes to every lock; flock(2) is the kernel's, so it is what is replaced here."""
    import fcntl

    store = FolderStore(tmp_path / "store")
    monkeypatch.setattr(fcntl, "flock", lambda _file, _how: None)
    with pytest.raises(Ignored, match="without locks"):
        probe(store)


def test_errors_name_the_server_and_no_secret(s3: S3) -> None:
    wrong = open_store(s3.settings("x"), Keys(KEY, "wr0ng-s3cr3t"))
    away = open_store(config.made("s3://backups/x", endpoint="http://127.0.0.1:1"), Keys(KEY, SECRET))
    for store, word in ((wrong, "403"), (away, "127.0.0.1:1")):
        with pytest.raises(StoreError, match=word) as caught:
            store.get("HEAD")
        said = f"{caught.value} {caught.value.hint} {caught.value.__cause__!r} {store!r}"
        assert "s3cr3t" not in said
        assert ("AWS_SECRET_ACCESS_KEY" in caught.value.hint) == (word == "403")


@pytest.mark.parametrize(
    ("code", "word", "hint"),
    [
        (404, "NoSuchBucket", "mend `url`"),
        (403, "RequestTimeTooSkewed", "clock"),
        (403, "AccessDenied", "what that key may do"),
        (507, "InsufficientStorage", "the store is full"),
    ],
)
def test_what_a_store_refuses_says_what_to_look_at(code: int, word: str, hint: str) -> None:
    with refusing(code, word) as endpoint:
        store = open_store(config.made("s3://backups/x", endpoint=endpoint), Keys(KEY, SECRET))
        for ask in (lambda: store.create("HEAD", b""), lambda: store.get("HEAD")):
            with pytest.raises(StoreError, match="no bucket backups" if code == 404 else word) as caught:
                ask()
            assert hint in caught.value.hint
            said = str(caught.value)
            with pytest.raises(StoreError) as caught:
                ask()
            assert str(caught.value) == said, "said once, and not again for each attempt"
            assert "<" not in said


def test_a_store_that_is_no_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = FolderStore(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be used"):
        store.create("HEAD", b"")
