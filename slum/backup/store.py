"""A store of objects with the three conditional writes that a backup stands on: create, replace what was read, read.

``s3://`` goes through obstore (the object_store crate of Apache Arrow: conditional puts by If-None-Match and If-Match,
one wheel without dependencies, no credentials in its errors), ``file://`` through link(2), rename(2) and a lock. A store
that ignores preconditions lets two leaders overwrite each other in silence, so probe() tries each of them before anything
else is written. Blocking: call it from a thread. Never retries a conditional write.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from slum.backup.config import Keys, Place, Settings, place_of
from slum.errors import ConfigError, SlumError, Unreachable

CALL_S = 20
RETRY_S = 10
CHUNK_BYTES = 1 << 20
PART_BYTES = 5 << 20
"""What is larger goes and comes in such parts, one after the other: on a slow line each has the time of a whole call."""
TEXT_MAX = 300
HINT = "look at the address, the credentials and the network; it is tried again by itself"
HINTS = (
    (("TooSkewed", "RequestExpired"), "this machine's clock, or the store's, is wrong: set it"),
    (
        ("403", "401", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"),
        "look at AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and at what that key may do: get, put, list and delete",
    ),
    (("507", "QuotaExceeded", "InsufficientStorage", "StorageFull"), "the store is full: give it room"),
)
"""By what stands in a store's answer."""
Tell = Callable[[], None]


class StoreError(Unreachable):
    """The store does not answer, or refuses; nothing is known of what was asked."""


class Taken(SlumError):
    """The object is there already, or is not what was read any more: somebody else was faster."""


class Ignored(ConfigError):
    """The store ignores preconditions, so no backup may go there."""


class Object(NamedTuple):
    data: bytes
    tag: str


class Listed(NamedTuple):
    name: str
    size: int
    at: float


class Store(Protocol):
    """Names are relative, with slashes."""

    def get(self, name: str) -> Object | None: ...

    def get_file(self, name: str, path: Path) -> bool:
        """Write the object to *path*, new; False when there is none."""
        ...

    def create(self, name: str, data: bytes) -> str:
        """Write an object that is not there, durably, and return its tag; Taken when it is."""
        ...

    def create_file(self, name: str, path: Path) -> bool:
        """Write the file's bytes unless the object is there; True when it was not."""
        ...

    def replace(self, name: str, data: bytes, tag: str) -> str:
        """Replace the object that has *tag* and return the new tag; Taken when it has another one, or is gone."""
        ...

    def list(self, prefix: str) -> Iterator[Listed]: ...

    def delete(self, name: str) -> None: ...


def open_store(settings: Settings, keys: Keys, tell: Tell = lambda: None) -> Store:
    """Return the store that *settings* name. *tell* is called before each call, and with each chunk of a long one."""
    place = place_of(settings)
    return FolderStore(Path(place.path), tell) if place.kind == "file" else S3Store(settings, place, keys, tell)


def probe(store: Store) -> None:
    """Raise Ignored, with the reason, unless *store* keeps its word about preconditions. Leaves nothing behind."""
    name = f"probe-{secrets.token_hex(8)}"
    first = store.create(name, b"1")
    try:
        _must_be_taken(lambda: store.create(name, b"2"), "creates over an object that is there (If-None-Match)")
        second = store.replace(name, b"3", first)
        _must_be_taken(lambda: store.replace(name, b"4", first), "replaces an object that has changed (If-Match)")
        found = store.get(name)
        if found is None or found.data != b"3" or found.tag != second:
            raise Ignored("the store does not show what was just written", hint=PROBE_HINT)
    finally:
        # A few bytes that stay behind harm nobody; the reason must not be lost for them.
        with suppress(StoreError):
            store.delete(name)


PROBE_HINT = "two leaders could overwrite each other's backup: use a store that honours preconditions"


def _must_be_taken(write: Callable[[], str], what: str) -> None:
    try:
        write()
    except Taken:
        return
    raise Ignored(f"the store {what}", hint=PROBE_HINT)


class S3Store:
    def __init__(self, settings: Settings, place: Place, keys: Keys, tell: Tell = lambda: None) -> None:
        from obstore.store import S3Store as Inner

        self._tell = tell
        self._bucket = place.bucket
        options: dict[str, Any] = {"timeout": f"{CALL_S}s", "connect_timeout": "5s"}
        if settings.endpoint.startswith("http://"):
            options["allow_http"] = True
        where: dict[str, Any] = {"endpoint": settings.endpoint} if settings.endpoint else {}
        self._inner = Inner(
            place.bucket,
            prefix=place.path or None,
            region=settings.region,
            access_key_id=keys.id,
            secret_access_key=keys.secret,
            virtual_hosted_style_request=not settings.endpoint,
            client_options=options,  # type: ignore[arg-type]  # a dict of its TypedDict's keys
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=RETRY_S)},
            **where,
        )

    def get(self, name: str) -> Object | None:
        with self._translated(name):
            try:
                found = self._inner.get(name)
                return Object(bytes(found.bytes()), found.meta["e_tag"] or "")
            except FileNotFoundError as error:
                self._require_bucket(error)
                return None

    def get_file(self, name: str, path: Path) -> bool:
        with self._translated(name):
            try:
                size = self._inner.head(name)["size"]
            except FileNotFoundError:
                return False
            with path.open("xb") as file:
                for start in range(0, size, PART_BYTES):
                    file.write(self._inner.get_range(name, start=start, end=min(start + PART_BYTES, size)))
            return True

    def create(self, name: str, data: bytes) -> str:
        return self._put(name, data, "create")

    def create_file(self, name: str, path: Path) -> bool:
        with self._translated(name):
            try:
                self._inner.head(name)
            except FileNotFoundError:
                # Named by its digest, so two that write it write the same.
                if path.stat().st_size <= PART_BYTES:
                    self._inner.put(name, path)
                else:
                    with path.open("rb") as file:
                        self._inner.put(name, self._chunks(file), chunk_size=PART_BYTES, max_concurrency=1)
                return True
            return False

    def _chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        while chunk := file.read(CHUNK_BYTES):
            self._tell()
            yield chunk

    def replace(self, name: str, data: bytes, tag: str) -> str:
        return self._put(name, data, {"e_tag": tag})

    def list(self, prefix: str) -> Iterator[Listed]:
        with self._translated(prefix):
            for chunk in self._inner.list(f"{prefix}/"):
                for meta in chunk:
                    yield Listed(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def delete(self, name: str) -> None:
        with self._translated(name):
            try:
                self._inner.delete(name)
            except FileNotFoundError:
                return

    def _put(self, name: str, data: bytes, mode: Any) -> str:
        with self._translated(name):
            return self._inner.put(name, data, mode=mode)["e_tag"] or ""

    def _require_bucket(self, error: Exception) -> None:
        if "NoSuchBucket" in str(error):
            raise StoreError(f"the store has no bucket {self._bucket}", hint="make it, or mend `url`") from None

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn the library's errors into ours; they name server and code, never a credential."""
        from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError

        self._tell()
        try:
            yield
        except (AlreadyExistsError, PreconditionError, NotModifiedError, FileNotFoundError) as error:
            self._require_bucket(error)
            raise Taken(f"{name} is not as it was read: somebody else writes here too") from error
        except BaseError as error:
            text = _in_short(str(error))
            hint = next((hint for words, hint in HINTS if any(word in text for word in words)), HINT)
            raise StoreError(f"the store does not do what it is asked: {text[:TEXT_MAX]}", hint=hint) from None


def _in_short(said: str) -> str:
    """Return what the library said in one line that is the same each time: no durations, and of an XML answer what it means."""
    text = " ".join(said.partition("Debug source")[0].split())
    text = re.sub(r" in [0-9.]+(ns|µs|ms|s)\b", "", text)
    before, _, answer = text.partition("<")
    meaning = re.findall(r"<(?:Code|Message)>([^<]*)<", answer)
    return f"{before}{', '.join(meaning)}" if meaning else text


class FolderStore:
    """Objects are files; their tag is the digest of their bytes. Whoever replaces one holds the folder's lock."""

    def __init__(self, folder: Path, tell: Tell = lambda: None) -> None:
        self._folder = folder
        self._tell = tell

    def get(self, name: str) -> Object | None:
        with _file_errors(self._folder):
            try:
                data = (self._folder / name).read_bytes()
            except FileNotFoundError:
                return None
            return Object(data, _tag(data))

    def get_file(self, name: str, path: Path) -> bool:
        with _file_errors(self._folder):
            try:
                source = (self._folder / name).open("rb")
            except FileNotFoundError:
                return False
            with source, path.open("xb") as file:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
            return True

    def create(self, name: str, data: bytes) -> str:
        with self._fresh(name, iter((data,))) as temporary:
            try:
                os.link(temporary, self._folder / name)
            except FileExistsError:
                raise Taken(f"{name} is there already: somebody else writes here too") from None
        _sync_folder((self._folder / name).parent)
        return _tag(data)

    def create_file(self, name: str, path: Path) -> bool:
        with _file_errors(self._folder):
            if (self._folder / name).exists():
                return False
        with path.open("rb") as source, self._fresh(name, iter(lambda: source.read(CHUNK_BYTES), b"")) as temporary:
            temporary.rename(self._folder / name)
        _sync_folder((self._folder / name).parent)
        return True

    def replace(self, name: str, data: bytes, tag: str) -> str:
        with self._locked(), self._fresh(name, iter((data,))) as temporary:
            found = self.get(name)
            if found is None or found.tag != tag:
                raise Taken(f"{name} is not as it was read: somebody else writes here too")
            temporary.rename(self._folder / name)
            _sync_folder((self._folder / name).parent)
        return _tag(data)

    def list(self, prefix: str) -> Iterator[Listed]:
        with _file_errors(self._folder):
            for path in sorted((self._folder / prefix).rglob("*")):
                self._tell()
                if path.is_file() and path.name[0] != ".":
                    status = path.stat()
                    yield Listed(str(path.relative_to(self._folder)), status.st_size, status.st_mtime)

    def delete(self, name: str) -> None:
        path = self._folder / name
        with _file_errors(self._folder):
            path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self._folder:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    @contextmanager
    def _fresh(self, name: str, chunks: Iterator[bytes]) -> Iterator[Path]:
        """Yield a durable file of *chunks* beside where *name* goes; what is left of it is removed."""
        target = self._folder / name
        temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}")
        with _file_errors(self._folder):
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    for chunk in chunks:
                        self._tell()
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock; Ignored when a second holder gets it too (some network file systems)."""
        with _file_errors(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._folder / ".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                with (self._folder / ".lock").open("ab") as second:
                    try:
                        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        pass
                    else:
                        raise Ignored(f"{self._folder} lies on a file system without locks", hint=PROBE_HINT)
                yield


@contextmanager
def _file_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "look at its disk and rights"
        raise StoreError(f"the store {folder} cannot be used: {error.strerror}", hint=hint) from error


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
