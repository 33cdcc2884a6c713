"""What a host is given to install: slum's own wheel, the versions of its dependencies that run here, and uv.

A target needs no internet, this machine does the first time for each kind of target (Python version, processor, libc).
slum's wheel is made of the files that this process runs; equal files give equal bytes. Everything else is downloaded
by pip and kept in a folder of its own, renamed into place once complete.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import slum
from slum.errors import OperatorError
from slum.frozen import Frozen

UV = "uv==0.13.9"
DOWNLOAD_S = 300.0
LOCKED_S = 0.1
EPOCH = (1980, 1, 1, 0, 0, 0)
GLIBC_FIRST = 5
"""The first manylinux_2_N there is."""
KEPT = 6
"""Wheelhouses in the cache, the newest ones."""


class Target(Frozen):
    """What decides which wheels fit. *libc* is "glibc 2.36" or "musl 1.2"."""

    python: str
    """"3.11"."""
    arch: str
    libc: str


class Wheel(Frozen):
    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        return Path(self.path).name


class Wheelhouse(Frozen):
    name: str
    """The folder below /opt/slum: version and digest of all wheels."""
    wheels: tuple[Wheel, ...]


def target_of(python: str, arch: str, libc: str) -> Target:
    """Return the Target of a host whose Python is "3.11.2"."""
    return Target(python=".".join(python.split(".")[:2]), arch=arch, libc=libc)


async def build(target: Target, cache: Path) -> Wheelhouse:
    """Return the wheelhouse for *target*, downloaded into *cache* where it is not there yet."""
    house = cache / _fingerprint(target)
    if not house.is_dir():
        async with _alone(cache):
            if not house.is_dir():
                await _download(target, house)
    own = await asyncio.to_thread(_own_wheel, cache)
    wheels = tuple(await asyncio.to_thread(_measured, (own, *sorted(house.glob("*.whl")))))
    digest = hashlib.sha256("".join(wheel.sha256 for wheel in wheels).encode()).hexdigest()
    return Wheelhouse(name=f"{slum.__version__}-{digest[:8]}", wheels=wheels)


def pins(target: Target) -> tuple[str, ...]:
    """Return NAME==VERSION of all that slum needs on *target*, in the versions that are installed here; uv included."""
    environment = {
        "python_version": target.python,
        "python_full_version": f"{target.python}.0",
        "platform_machine": target.arch,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    found: dict[str, str] = {}
    todo: list[tuple[str, frozenset[str]]] = [("slum", frozenset())]
    done = set(todo)
    while todo:
        name, extras = todo.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = name  # needed there but not here: the newest
            continue
        found[name] = f"{name}=={distribution.version}"
        for text in distribution.requires or ():
            needed = Requirement(text)
            if needed.marker and not any(needed.marker.evaluate({**environment, "extra": e}) for e in ("", *extras)):
                continue
            one = (canonicalize_name(needed.name), frozenset(needed.extras))
            if one not in done:
                done.add(one)
                todo.append(one)
    del found["slum"]
    return (*(found[name] for name in sorted(found)), UV)


def platforms(target: Target) -> tuple[str, ...]:
    """Return the platform tags of wheels that run on *target*, best first (PEP 600, PEP 656)."""
    kind, _, version = target.libc.partition(" ")
    major, _, minor = version.partition(".")
    if kind == "musl":
        return tuple(f"musllinux_{major}_{n}_{target.arch}" for n in range(int(minor or 2), -1, -1))
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    tags: list[str] = []
    for n in range(int(minor or 17), GLIBC_FIRST - 1, -1):
        tags.append(f"manylinux_2_{n}_{target.arch}")
        if n in legacy:
            tags.append(f"{legacy[n]}_{target.arch}")
    return (*tags, f"linux_{target.arch}")


def _fingerprint(target: Target) -> str:
    text = "\n".join((target.python, target.arch, target.libc, *pins(target)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@asynccontextmanager
async def _alone(cache: Path) -> AsyncIterator[None]:
    """Hold the lock of *cache*, which other processes and other tasks of this one respect too."""
    os.makedirs(cache, mode=0o700, exist_ok=True)
    lock = os.open(cache / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(LOCKED_S)
        yield
    finally:
        os.close(lock)


async def _download(target: Target, house: Path) -> None:
    """Fill *house* with pip; it appears when it is complete."""
    new = house.with_name(f".new-{secrets.token_hex(6)}")
    version = target.python.replace(".", "")
    chosen = pins(target)
    pure = tuple(pin for pin in chosen if _is_pure(pin))
    fitting = ["--only-binary=:all:", "--python-version", target.python, "--implementation", "cp"]
    fitting += [part for abi in (f"cp{version}", "abi3", "none") for part in ("--abi", abi)]
    fitting += [part for tag in platforms(target) for part in ("--platform", tag)]
    try:
        async with asyncio.timeout(DOWNLOAD_S), asyncio.TaskGroup() as group:
            # Some pure ones are published as source only; what is pure here is pure there.
            group.create_task(_pip("wheel", "--wheel-dir", str(new), *pure), name="pure wheels")
            others = [pin for pin in chosen if pin not in pure]
            group.create_task(_pip("download", "--dest", str(new), *fitting, *others), name="binary wheels")
        new.rename(house)
    except TimeoutError as error:
        raise OperatorError(f"the wheels could not be downloaded within {DOWNLOAD_S:g} s") from error
    except ExceptionGroup as errors:
        failed, rest = errors.split(OperatorError)
        if failed is None or rest is not None:
            raise
        why = " ".join(str(error) for error in failed.exceptions)
        raise OperatorError(
            f"the wheels for Python {target.python} on {target.arch} ({target.libc}) cannot be had: {why}",
            hint="this machine needs a Python package index the first time for each kind of host",
        ) from errors
    finally:
        shutil.rmtree(new, ignore_errors=True)
    for old in sorted(_houses(house.parent), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


async def _pip(command: str, *arguments: str) -> None:
    """Run pip; OperatorError with what it said when it fails."""
    argv = (sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps")
    process = await asyncio.create_subprocess_exec(
        *argv,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = [line for line in output.decode(errors="replace").splitlines() if "ERROR" in line or "No module" in line]
        raise OperatorError(" ".join(said[:2]) or "pip failed")


def _is_pure(pin: str) -> bool:
    """Tell whether the distribution of *pin*, as it is installed here, runs anywhere."""
    try:
        text = metadata.distribution(pin.partition("==")[0]).read_text("WHEEL") or ""
    except metadata.PackageNotFoundError:
        return False
    tags = [line for line in text.splitlines() if line.startswith("Tag:")]
    return bool(tags) and all(tag.endswith("-none-any") for tag in tags)


def _houses(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir() and len(path.name) == 16]


def _own_wheel(cache: Path) -> Path:
    """Write the wheel of the slum that runs here into *cache* and return it."""
    entries = dict(_own_files())
    info = f"slum-{slum.__version__}.dist-info"
    distribution = metadata.distribution("slum")
    entries[f"{info}/METADATA"] = (distribution.read_text("METADATA") or "").encode()
    entries[f"{info}/entry_points.txt"] = (distribution.read_text("entry_points.txt") or "").encode()
    entries[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: slum\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_record_digest(data)},{len(data)}\n" for name, data in sorted(entries.items()))
    entries[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    digest = hashlib.sha256(record.encode()).hexdigest()
    path = cache / "own" / digest[:16] / f"slum-{slum.__version__}-py3-none-any.whl"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f".{secrets.token_hex(6)}")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted(entries.items()):
                member = zipfile.ZipInfo(name, EPOCH)
                member.external_attr = 0o644 << 16
                archive.writestr(member, data, zipfile.ZIP_DEFLATED)
        temporary.rename(path)
        for old in sorted(path.parent.parent.iterdir(), key=lambda one: one.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    return path


def _own_files() -> Iterator[tuple[str, bytes]]:
    """Yield (name in the wheel, content) of each file of the package, through the links of a checkout too."""
    root = Path(slum.__file__).parent
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(files):
            if not name.endswith((".pyc", ".pyo")) and not name.startswith("."):
                path = Path(folder) / name
                yield f"slum/{path.relative_to(root)}", path.read_bytes()


def _record_digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _measured(paths: tuple[Path, ...]) -> Iterator[Wheel]:
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        yield Wheel(path=str(path), sha256=digest, size=path.stat().st_size)
