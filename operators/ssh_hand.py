"""This side of the hand that works on a host: starts it over an SSH connection and asks it for things.

One command line of shell finds a Python of 3.11 or later and root (or `sudo -n`), and starts it with the text of
bootstrap_look.py, which comes by stdin like all that follows. bootstrap_hand.py follows when something is to be done. Nothing of what is asked stands in an argument of any process.
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import asyncssh

from slum.errors import OperatorError

LOOK = Path(__file__).with_name("bootstrap_look.py")
HAND = Path(__file__).with_name("bootstrap_hand.py")
LOOKS = frozenset({"facts", "have"})
CHUNK_BYTES = 1 << 16
AHEAD_BYTES = 8 * CHUNK_BYTES
"""sshd keeps what its child has not taken yet in a buffer that it copies as it grows: megabytes ahead cost it more than
all the rest of a connection."""
TAKEN = b"\n"
TOO_OLD, NOT_ROOT = 77, 78
PYTHONS = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "/usr/local/bin/python3")
_LOADER = (
    f"import sys,os;sys.version_info<(3,11) and sys.exit({TOO_OLD});os.geteuid() and sys.exit({NOT_ROOT});"
    "f=sys.stdin.buffer;exec(compile(f.read(int(f.readline())),chr(60)+chr(62),chr(101)+chr(120)+chr(101)+chr(99)))"
)
COMMAND = f"""exec sh -c '
pre=
seen=
for p in {" ".join(PYTHONS)}; do
  command -v $p >/dev/null 2>&1 || continue
  $pre $p -I -S -c "{_LOADER}"
  code=$?
  if [ $code = {NOT_ROOT} ]; then
    command -v sudo >/dev/null 2>&1 && sudo -n true >/dev/null 2>&1 || {{ echo "no-root $(id -un)"; exit 0; }}
    pre="sudo -n"
    $pre $p -I -S -c "{_LOADER}"
    code=$?
  fi
  [ $code = {TOO_OLD} ] || exit $code
  seen="$seen $p is $($p -V 2>&1);"
done
echo "no-python$seen"
'"""
"""Python itself tells whether it is root: the usual case is a process less."""


class Hand:
    """A running hand. Not safe for two tasks at once."""

    def __init__(self, where: str, process: asyncssh.SSHClientProcess[bytes]) -> None:
        self.where = where
        self._process = process
        self._is_whole = False

    async def ask(self, do: str, payload: tuple[BinaryIO, int] | None = None, **fields: Any) -> dict[str, Any]:
        """Return the answer to verb *do*; OperatorError with the hand's code when it is not done."""
        if do not in LOOKS and not self._is_whole:
            text = HAND.read_bytes()
            await self._ask("more", (io.BytesIO(text), len(text)), size=len(text))
            self._is_whole = True
        return await self._ask(do, payload, **fields)

    async def _ask(self, do: str, payload: tuple[BinaryIO, int] | None = None, **fields: Any) -> dict[str, Any]:
        request = json.dumps({"do": do, **fields}).encode() + b"\n"
        try:
            # A host that cannot do it says why and ends, perhaps before it was asked.
            with suppress(BrokenPipeError):
                self._process.stdin.write(request)
                if payload is not None:
                    await self._send(*payload)
            while (line := await self._process.stdout.readline()) == TAKEN:
                pass
        except (asyncssh.Error, OSError) as error:
            raise OperatorError(
                f"{self.where}: the connection broke while `{do}` was under way: {error}", provider_code="unreachable"
            ) from error
        return self._answer(do, line)

    async def _send(self, file: BinaryIO, left: int) -> None:
        """Send *left* bytes of *file*, a little ahead of what the far end has taken."""
        ahead = 0
        while left:
            data = file.read(min(left, CHUNK_BYTES))
            if not data:
                raise OperatorError(f"{self.where}: what is to be uploaded became shorter")
            left -= len(data)
            self._process.stdin.write(data)
            await self._process.stdin.drain()
            ahead += 1
            if ahead * CHUNK_BYTES >= AHEAD_BYTES:
                if await self._process.stdout.readline() != TAKEN:
                    raise OperatorError(
                        f"{self.where}: the connection ended in the middle of an upload", provider_code="unreachable"
                    )
                ahead -= 1

    def _answer(self, do: str, line: bytes) -> dict[str, Any]:
        if not line.endswith(b"\n"):
            raise OperatorError(
                f"{self.where}: the connection ended while `{do}` was under way",
                hint="it is safe to do again: it goes on where it was",
                provider_code="unreachable",
            )
        first = line.decode(errors="replace").strip()
        if first.startswith("no-root"):
            user = first.partition(" ")[2]
            raise OperatorError(
                f"{self.where}: {user!r} is not root and may not run `sudo -n`",
                hint=f'connect as root, or let it: echo "{user} ALL=(ALL) NOPASSWD: ALL" > /etc/sudoers.d/{user}',
                provider_code="no_root",
            )
        if first.startswith("no-python"):
            seen = first.removeprefix("no-python").strip(" ;")
            raise OperatorError(
                f"{self.where}: no Python of 3.11 or later is there{f': {seen}' if seen else ''}",
                hint="Debian 12 has one: apt install python3; elsewhere install it as /usr/local/bin/python3",
                provider_code="no_python",
            )
        try:
            answer: dict[str, Any] = json.loads(first)
        except ValueError as error:
            raise OperatorError(
                f"{self.where}: it answered with something else: {first[:200]!r}",
                hint="does the user's shell print something when no terminal is there?",
            ) from error
        if "error" in answer:
            raise OperatorError(
                f"{self.where}: {answer['error']}", hint=HINTS.get(answer["code"], ""), provider_code=answer["code"]
            )
        return answer


HINTS = {
    "disk_full": "make room on the host (slum needs some 400 MB below /opt); it goes on where it was",
    "read_only": "mount it read-write; slum needs /opt/slum, /var/lib/slum and /run",
    "busy": "wait for it, then do it again",
    "taken": "a host holds one machine: remove that one first, or name another host",
    "dead": "the control plane makes a new one by itself",
}


@asynccontextmanager
async def working(where: str, connection: asyncssh.SSHClientConnection) -> AsyncIterator[Hand]:
    """Yield a Hand that works as root on the host of *connection*; with the block's end it ends."""
    text = LOOK.read_bytes()
    process = await connection.create_process(COMMAND, encoding=None, stderr=asyncssh.DEVNULL)
    async with process:
        with suppress(BrokenPipeError):
            process.stdin.write(b"%d\n" % len(text) + text)
        yield Hand(where, process)
        process.stdin.write_eof()
