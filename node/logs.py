"""The agent's side of logs: starts the readers (logreader.py) and the compressor, and passes their lines on.

Neither runs in the agent: searching and compressing would stall it, and grow it. Lines are bytes, ``ID UNIX_SECONDS TEXT``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection

import msgspec

from slum.errors import ConfigError, SlumError
from slum.node import logfiles
from slum.node.logreader import Request
from slum.node.trees import child_command, last_words, run_child
from slum.paths import Home

GREP_BYTES_MAX = 500
TAIL_MAX = 100_000
CHUNK_BYTES = 64 << 10
COMPRESS_TIMEOUT_S = 300.0


async def read(
    home: Home,
    service: str,
    ids: Collection[str],
    *,
    since: float | None = None,
    tail: int | None = None,
    grep: str | None = None,
    follow: bool = False,
    generation: int | None = None,
) -> AsyncIterator[bytes]:
    """Yield whole lines of the instances *ids* of *service*, merged by time, some at once.

    *since* is in unix seconds, *tail* keeps the last so many of all, *grep* is a regular expression searched in each text,
    *generation* leaves out what others wrote. With *follow* it goes on until it is closed. ConfigError when the pattern is not usable. A reader who is slow makes
    the child wait.
    """
    if grep is not None and len(grep.encode()) > GREP_BYTES_MAX:
        raise ConfigError(f"the pattern is longer than {GREP_BYTES_MAX} bytes")
    if tail is not None and not 0 <= tail <= TAIL_MAX:
        raise ConfigError(f"tail is not between 0 and {TAIL_MAX:,}")
    request = Request(
        folder=str(home.logs / service),
        ids=tuple(sorted(ids)),
        since=since,
        tail=tail,
        grep=grep,
        follow=follow,
        generation=generation,
    )
    argv, env = child_command("slum.node.logreader", msgspec.json.encode(request).decode())
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*argv, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        assert child.stdout is not None and child.stderr is not None  # noqa: PT018 - asked for above
        rest = b""
        while chunk := await child.stdout.read(CHUNK_BYTES):
            whole, newline, rest = (rest + chunk).rpartition(b"\n")
            if newline:
                yield whole + newline
        said = await child.stderr.read()
        if await child.wait() != 0:
            raise ConfigError(last_words(said.decode(errors="replace"), child.returncode or 0))
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()


async def compress_rotated(home: Home) -> None:
    """Compress the rotated log files that nobody touches any more, in a niced child; none is started for nothing."""
    if not await asyncio.to_thread(logfiles.compressible, home.logs, time.time()):
        return
    why = await run_child("slum.node.logcompress", home.logs, timeout_s=COMPRESS_TIMEOUT_S, doing="compressing logs")
    if why:
        raise SlumError(f"cannot compress logs: {why}")
