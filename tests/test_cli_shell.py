"""exec and run: bytes both ways, exit statuses, and a real pseudo terminal with its size and raw mode."""

from __future__ import annotations

import fcntl
import os
import pty
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_support import Desk, desk  # noqa: F401 - fixtures
from wsproto import ConnectionType, WSConnection, events

from slum import wire
from slum.paths import checked_home

WORDS = [sys.executable, "-m", "slum.cli.main"]


@pytest.fixture
def applied(desk: Desk) -> Desk:  # noqa: F811
    desk.slum("apply", "--yes")
    return desk


def piped(desk: Desk, *args: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:  # noqa: F811
    env = {**os.environ, "SLUM_RUN_DIR": str(desk.home.run), "SLUM_DATA_DIR": str(desk.home.data)}
    return subprocess.run([*WORDS, *args], input=given, env=env, capture_output=True, timeout=30, check=False)


def test_output_errors_and_status_are_the_commands_own(applied: Desk) -> None:
    ran = piped(applied, "exec", "notes", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (ran.returncode, ran.stdout, ran.stderr) == (7, b"out\n", b"err\n")
    assert piped(applied, "run", "notes", "sh", "-c", "kill -9 $$").returncode == 137


def test_input_goes_in_and_its_end_too(applied: Desk) -> None:
    blob = os.urandom(3_000_000)
    ran = piped(applied, "exec", "notes", "--", "cat", given=blob)
    assert ran.returncode == 0
    assert ran.stdout == blob


def test_a_command_that_reads_nothing_stalls_nobody(applied: Desk) -> None:
    ran = piped(applied, "run", "notes", "--", "true", given=b"x" * 5_000_000)
    assert ran.returncode == 0, ran.stderr


def test_words_after_the_service_are_the_commands(applied: Desk) -> None:
    assert piped(applied, "run", "notes", "echo", "--json", "-y").stdout == b"--json -y\n"
    assert piped(applied, "run", "notes", "-T", "--", "echo", "--", "-T").stdout == b"-- -T\n"


def test_refusals_and_absences_are_told(applied: Desk) -> None:
    refused = piped(applied, "exec", "notes", "refused")
    assert refused.returncode == 2
    assert refused.stderr == b"error: that instance does not run (exit 2)\n  next: start it\n"
    absent = piped(applied, "run", "notes", "/no/such/program")
    assert absent.returncode == 8
    assert b"No such file" in absent.stderr
    assert b"no command was given" in piped(applied, "exec", "notes").stderr
    applied.slum("stop", "notes")
    stopped = piped(applied, "exec", "notes", "ls")
    assert stopped.returncode == 2
    assert b"notes is stopped" in stopped.stderr


def test_a_lost_connection_is_told(applied: Desk) -> None:
    env = {**os.environ, "SLUM_RUN_DIR": str(applied.home.run)}
    words = [*WORDS, "exec", "notes", "--", "sh", "-c", "echo here; exec sleep 2"]
    with subprocess.Popen(
        words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"here\n"
        applied.api.stop()
        assert process.wait(20) == 6
        assert b"the connection was lost" in process.stderr.read()


class Terminal:
    """A person's side of a pseudo terminal."""

    def __init__(self, leader: int, process: subprocess.Popen[bytes]) -> None:
        self.leader = leader
        self.process = process
        self.seen = b""

    def until(self, text: bytes) -> bytes:
        """Read until *text* has come, and forget what came up to it."""
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.leader], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.leader, 65536)
                except OSError as error:
                    raise AssertionError(self.seen) from error
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: bytes) -> None:
        os.write(self.leader, text)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@contextmanager
def terminal(desk: Desk, *args: str) -> Iterator[Terminal]:  # noqa: F811
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = {**os.environ, "SLUM_RUN_DIR": str(desk.home.run), "SLUM_DATA_DIR": str(desk.home.data), "TERM": "xterm"}
    env.pop("NO_COLOR", None)
    script = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *WORDS, *args],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=env,
        cwd=desk.folder,
    )
    try:
        yield Terminal(leader, process)
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)


def test_a_shell_at_a_terminal(applied: Desk) -> None:
    with terminal(applied, "exec", "notes") as me:
        me.type(b"PS1=; stty size; echo re''ady\n")
        assert b"30 100" in me.until(b"ready")
        me.resize(40, 120)
        me.type(b"while [ \"$(stty size)\" != '40 120' ]; do :; done; echo res''ized\n")
        me.until(b"resized")
        me.type(b'sh -c \'trap "echo cau""ght; exit" INT; echo arm""ed; while :; do sleep 0.1; done\'\n')
        me.until(b"armed")
        me.type(b"\x03")
        me.until(b"caught")
        me.type(b"exit 5\n")
        assert me.process.wait(20) == 5
        assert termios.tcgetattr(me.leader)[3] & termios.ECHO, "the terminal was put back"


def test_a_terminal_is_put_back_when_slum_is_told_to_end(applied: Desk) -> None:
    with terminal(applied, "exec", "notes", "--", "sh", "-c", "echo in''side; cat") as me:
        me.until(b"inside")
        assert not termios.tcgetattr(me.leader)[3] & termios.ECHO
        me.process.terminate()
        assert me.process.wait(20) == 143
        assert termios.tcgetattr(me.leader)[3] & termios.ECHO


def test_apply_at_a_terminal_asks_and_shows_live_colour(desk: Desk) -> None:  # noqa: F811
    with terminal(desk, "apply") as me:
        me.until(b"Apply? [y/N] ")
        me.type(b"n\n")
        me.until(b"nothing was changed")
        assert me.process.wait(20) == 2
    assert desk.fleet.revision == 0
    with terminal(desk, "apply") as me:
        plan = me.until(b"Apply? [y/N] ")
        assert b"\x1b[32m" in plan
        me.type(b"y\n")
        live = me.until(b"applied revision 1")
        assert b"\x1b[" in live
        assert b"healthy" in live
        assert me.process.wait(20) == 0


def test_destroy_at_a_terminal_wants_the_name(applied: Desk) -> None:
    for typed, code, left in ((b"y\n", 2, 1), (b"quickstart\n", 0, 2)):
        with terminal(applied, "destroy") as me:
            me.until(b"Type the fleet's name (quickstart)")
            me.type(typed)
            me.until(b"nothing was changed" if code else b"applied revision 2")
            assert me.process.wait(20) == code
        assert applied.fleet.revision == left


def test_ctrl_c_at_the_question_changes_nothing(desk: Desk) -> None:  # noqa: F811
    with terminal(desk, "apply") as me:
        me.until(b"Apply? [y/N] ")
        me.type(b"\x03")
        me.until(b"interrupted; nothing was changed")
        assert me.process.wait(20) == 130
    assert desk.fleet.revision == 0


def test_ctrl_c_while_following_says_that_it_goes_on(desk: Desk) -> None:  # noqa: F811
    desk.fleet.stuck = True
    with terminal(desk, "apply", "--yes") as me:
        me.until(b"starting")
        me.type(b"\x03")
        me.until(b"revision 1 stays committed and goes on")
        assert me.process.wait(20) == 130
    desk.fleet.stuck = False


def test_a_far_side_that_closes_while_input_ends_has_the_last_word(tmp_path: Path) -> None:
    home = checked_home(tmp_path, Path(f"/tmp/c{secrets.token_hex(5)}"))
    home.private.mkdir(parents=True)
    words = [sys.executable, "-c", ATTACH, str(home.data), str(home.run)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.api_socket))
        listener.listen()
        listener.settimeout(20)
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            link, _ = listener.accept()
            with link:
                server = WSConnection(ConnectionType.SERVER)
                server.receive_data(link.recv(65536))
                assert [type(event) for event in server.events()] == [events.Request]
                ready = wire.encoder.encode(wire.StreamData(data=b"ready\n", channel=1))
                link.sendall(server.send(events.AcceptConnection()) + server.send(events.BytesMessage(data=ready)))
                assert client.stdout.readline() == b"ready\n"
                # Both come while it cannot look, so it meets them together.
                client.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, client.pid, os.WSTOPPED)
                link.sendall(server.send(events.CloseConnection(code=1011)))
                client.stdin.close()
                client.send_signal(signal.SIGCONT)
                assert client.stdout.read() == b"Unreachable\n"
    shutil.rmtree(home.run)


ATTACH = """
import sys
from pathlib import Path
from slum.cli.terminal import attach
from slum.errors import SlumError
from slum.paths import Home
from slum.reach import Here
try:
    attach(Here(Home(data=Path(sys.argv[1]), run=Path(sys.argv[2]))), "run", [], terminal=False)
except SlumError as error:
    print(type(error).__name__)
"""
