"""The keeper's children: started, watched, signalled, started again, and taken over from a keeper that died.

A child is known by name; its process by pid and start time together. A child's record is on disk before its program
executes, so that no moment of death of the keeper loses one or starts one twice. When a child without ``respawn`` ends,
what it left behind in its session and cgroup is killed; a respawned one (the agent) may leave processes alone.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence

from slum.node import keeper_proc as proc
from slum.node.keeper_child import GO, Heritage, check_spawn, launch
from slum.node.keeper_clients import Refused
from slum.node.keeper_kill import Killer
from slum.node.keeper_log import Output, unlink_if_there
from slum.node.keeper_loop import Loop
from slum.node.keeper_table import CHILD, Child, Table, file_name, kept
from slum.node.keeper_watch import Watchdog, limit_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

START_DEADLINE_S = 10.0
YOUNG_S = 10.0
"""A respawned child that dies sooner than this waits twice as long as the last time."""
EXITED_MAX = 4096


class Children:
    """All children by name. *sockets* gives the listening sockets for names; *tell* hears of "spawned" and "exit"."""

    def __init__(
        self,
        loop: Loop,
        table: Table,
        fifos: str,
        alive: str,
        *,
        boot_id: str,
        heritage: Heritage,
        sockets: Callable[[Sequence[str]], list[int]],
        tell: Callable[[str, Child], None],
        say: Callable[[str], None],
    ) -> None:
        self.by_name: dict[str, Child] = {}
        self._by_pid: dict[int, Child] = {}
        self._loop = loop
        self._table = table
        self._fifos = fifos
        self._boot_id = boot_id
        self._heritage = heritage
        self._sockets = sockets
        self._tell = tell
        self._say = say
        self._killer = Killer(loop, self.by_name.values)
        self._watchdog = Watchdog(loop, alive, self._kill_hung)

    def view(self, child: Child) -> dict[str, Any]:
        return {"name": child.name, "boot_id": self._boot_id, **child.facts(), "meta": child.spawn["meta"]}

    def spawn(
        self,
        spawn: dict[str, Any],
        stdio: Sequence[int] = (),
        done: Callable[[Child, Refused | None], None] | None = None,
    ) -> None:
        """Start *spawn* (checked) and call *done* when it executes or cannot; Refused when it cannot even be forked."""
        former = self.by_name.get(spawn["name"])
        if former is not None and not former.settled:
            raise Refused("exists", f"{spawn['name']} is there already (pid {former.pid})")
        if stdio and spawn["respawn"]:
            raise Refused("invalid", "a respawned child cannot be given descriptors")
        child = Child(spawn)
        child.done = done
        try:
            self._launch(child, spawn, stdio)
        except OSError as error:
            self._let_go(child)
            raise Refused("os", f"{spawn['name']}: {error.strerror or error}", error.errno) from None
        self.by_name[child.name] = child

    def signal(self, name: str, signum: int, *, tree: bool) -> None:
        """Send *signum* to the process that Signalling names; to the whole tree when *tree* or when it is SIGKILL."""
        child = self._running(name)
        if not self._killer.signal(child, signum, tree=tree):
            raise Refused("missing", f"{name} has just exited")

    def stop_respawn(self, name: str) -> None:
        """Make the next exit of *name* its last."""
        child = self._known(name)
        if not child.spawn["respawn"]:
            return
        child.spawn = kept(child.spawn)
        if child.retry is not None:
            child.retry.cancel()
            child.retry = None
        if child.settled:
            self._close_output(child)
        self._save(child)

    def forget(self, name: str) -> None:
        """Drop the record of *name*, which must have exited."""
        child = self._known(name)
        if not child.settled:
            raise Refused("invalid", f"{name} has not exited")
        self._drop(child)

    def reap(self) -> None:
        """Take the status of every process that ended, orphans of children included."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = self._by_pid.get(ended.si_pid)
            if child is not None and child.control is not None:
                self._started(child)
            child = self._by_pid.pop(ended.si_pid, None)
            if child is not None and not child.spawn["respawn"]:
                self._killer.kill_group(child)  # before its number can be given away
            _, status = os.waitpid(ended.si_pid, 0)
            if child is not None:
                self._exited(child, os.waitstatus_to_exitcode(status))

    def adopt(self, booted: Sequence[str]) -> None:
        """Take over what the table holds. A dead child named in *booted* is left to be started anew from there."""
        for record in self._table.load(CHILD):
            try:
                child = Child(check_spawn({"argv": ["-"], "env": {}, **record["spawn"]}))
                child.restore(record)
            except (KeyError, TypeError, ValueError) as error:
                self._say(f"left out a record of the table that makes no sense: {error}")
                continue
            alive = child.running and self._take_over(child)
            if not alive and child.name in booted:
                self._table.remove(CHILD, child.name)
                continue
            self.by_name[child.name] = child
            if alive:
                self._open_output(child, child.spawn, fresh=False)
                self._open_log(child)
                self._watchdog.watch(child)
            elif child.running:
                self._exited(child, None)
            elif child.spawn["respawn"]:
                self._retry_later(child)
        fifos = {file_name(child.name) for child in self.by_name.values() if not child.settled}
        for entry in os.listdir(self._fifos):
            if entry not in fifos:
                unlink_if_there(f"{self._fifos}/{entry}")

    def living_pids(self) -> list[int]:
        return [child.pid for child in self.by_name.values() if child.running]

    def any_left(self) -> bool:
        return any(not child.settled for child in self.by_name.values())

    def forget_all(self) -> None:
        """Drop every record; nothing may be running."""
        for child in list(self.by_name.values()):
            self._drop(child)

    def _launch(self, child: Child, spawn: dict[str, Any], stdio: Sequence[int]) -> None:
        listeners = self._sockets(spawn["listeners"])
        opened = child.output is None and not stdio
        if opened:
            self._open_output(child, spawn, fresh=True)
        child.pid, control = launch(
            {**spawn, "env": {**spawn["env"], **self._watchdog.environment(child)}},
            listeners=listeners,
            stdio=stdio,
            fifo=child.output.fifo if child.output else None,
            heritage=self._heritage,
        )
        try:
            stat = proc.read_stat(child.pid)
            child.start_time = stat.start_time if stat else 0
            child.started_at = time.time()
            child.state, child.status, child.exited_at = "running", None, None
            child.own, child.adopted = True, False
            self._table.save(CHILD, child.name, self._record(child))
        except OSError:
            control.close()  # it leaves without executing
            raise
        child.control = control
        self._by_pid[child.pid] = child
        _tell_go(control)
        self._watchdog.watch(child)
        if opened:
            self._open_log(child)  # a folder and a file on disk, which the program need not wait for
        self._loop.watch(control.fileno(), lambda _mask: self._started(child))
        child.deadline = self._loop.after(START_DEADLINE_S, lambda: self._too_slow(child))

    def _started(self, child: Child) -> None:
        """Hear whether *child* executes its program now (its end closed) or why not."""
        if child.control is None:
            return
        report = _read_report(child.control)
        if report is None:
            return
        done = self._close_control(child)
        if not report:
            if done is not None:
                done(child, None)
            self._tell("spawned", child)
            return
        why = json.loads(report)
        refused = Refused("os" if why["errno"] else "invalid", f"{child.name}: {why['error']}", why["errno"])
        self._by_pid.pop(child.pid, None)
        if child.spawn["respawn"] and done is None:
            self._say(f"cannot start {refused.why}")
            if child.output is not None:
                child.output.note(f"cannot start {refused.why}")
            self._exited(child, 127)
            return
        self._drop(child)
        if done is not None:
            done(child, refused)
        else:
            self._say(f"cannot start {refused.why}")

    def _too_slow(self, child: Child) -> None:
        done = self._close_control(child)
        self._say(f"{child.name} did not execute within {START_DEADLINE_S:.0f} s: killed")
        if done is not None:
            done(child, Refused("os", f"{child.name} did not execute in time", errno.ETIMEDOUT))
        self._killer.kill(child)

    def _kill_hung(self, child: Child) -> None:
        why = f"killed, for it hung: it has not told that it lives for {limit_ms(child) / 1000:g} s"
        self._say(f"{child.name}: {why}")
        if child.output is not None:
            child.output.note(why)
        self._killer.kill(child)

    def _close_control(self, child: Child) -> Callable[[Child, Refused | None], None] | None:
        done, child.done = child.done, None
        if child.control is not None:
            self._loop.unwatch(child.control.fileno())
            child.control.close()
            child.control = None
        if child.deadline is not None:
            child.deadline.cancel()
            child.deadline = None
        return done

    def _exited(self, child: Child, status: int | None) -> None:
        self._close_control(child)
        self._watchdog.forget(child)
        child.state, child.status, child.exited_at = "exited", status, time.time()
        if child.pidfd >= 0:
            self._loop.unwatch(child.pidfd)
            os.close(child.pidfd)
            child.pidfd = -1
        if child.spawn["respawn"]:
            if child.output is not None:
                child.output.drain()
        else:
            if not child.own:
                self._killer.kill_group(child)
            self._killer.kill_cgroup(child)
            self._close_output(child)
        self._save(child)
        self._tell("exit", child)
        if child.spawn["respawn"]:
            self._retry_later(child)
        else:
            self._trim()

    def _retry_later(self, child: Child) -> None:
        limits = child.spawn["respawn"]
        young = child.exited_at is not None and child.exited_at - child.started_at < YOUNG_S
        child.delay_ms = (
            min(limits["delay_ms_max"], child.delay_ms * 2) if young and child.delay_ms else limits["delay_ms_min"]
        )
        child.retry = self._loop.after(child.delay_ms / 1000, lambda: self._respawn(child))

    def _respawn(self, child: Child) -> None:
        child.retry = None
        child.respawns += 1
        try:
            self._launch(child, child.spawn, ())
        except (OSError, Refused) as error:
            self._say(f"cannot start {child.name}: {error}")
            child.state, child.started_at = "exited", time.time()
            self._retry_later(child)

    def _take_over(self, child: Child) -> bool:
        """Watch the process of *child* if it lives on; False when it is gone, or its number is another's."""
        stat = proc.read_stat(child.pid)
        if stat is not None and stat.start_time == child.start_time and stat.parent == os.getpid():
            self._by_pid[child.pid] = child
            return True
        pidfd = proc.open_living(child.pid, child.start_time)
        if pidfd is None:
            return False
        child.own, child.adopted, child.pidfd = False, True, pidfd
        self._loop.watch(pidfd, lambda _mask: self._foreign_exit(child))
        self._save(child)
        return True

    def _foreign_exit(self, child: Child) -> None:
        if child.pidfd >= 0 and proc.has_exited(child.pidfd):
            self._exited(child, None)

    def _open_output(self, child: Child, spawn: dict[str, Any], *, fresh: bool) -> None:
        if spawn["log"] is None:
            return
        output = Output(self._loop, f"{self._fifos}/{file_name(child.name)}", spawn["log"])
        try:
            output.open(spawn.get("uid"), spawn.get("gid"), fresh=fresh)
            child.output = output
        except OSError as error:
            if fresh:
                raise
            self._say(f"{child.name} is not logged now: its FIFO: {error.strerror}")

    def _open_log(self, child: Child) -> None:
        if child.output is not None and (trouble := child.output.open_log()):
            self._say(f"{child.name} is not logged now: {trouble}")

    def _close_output(self, child: Child) -> None:
        if child.output is not None:
            child.output.close(unlink=True)
            child.output = None

    def _let_go(self, child: Child) -> None:
        self._watchdog.forget(child)
        self._close_control(child)
        self._close_output(child)

    def _drop(self, child: Child) -> None:
        self._let_go(child)
        if self.by_name.get(child.name) is child:
            del self.by_name[child.name]
        self._table.remove(CHILD, child.name)

    def _trim(self) -> None:
        settled = [child for child in self.by_name.values() if child.settled]
        if len(settled) > EXITED_MAX:
            self._drop(min(settled, key=lambda child: child.exited_at or 0))

    def _record(self, child: Child) -> dict[str, Any]:
        return {**child.facts(), "spawn": child.spawn}

    def _save(self, child: Child) -> None:
        try:
            self._table.save(CHILD, child.name, self._record(child))
        except OSError as error:
            self._say(f"cannot write the record of {child.name}: {error}")

    def _known(self, name: str) -> Child:
        child = self.by_name.get(name)
        if child is None:
            raise Refused("missing", f"no child is named {name}")
        return child

    def _running(self, name: str) -> Child:
        child = self._known(name)
        if not child.running:
            raise Refused("missing", f"{name} has exited")
        return child


def _tell_go(control: socket.socket) -> None:
    try:
        control.send(GO)
    except ConnectionError:
        return  # it has failed already, and reported why


def _read_report(control: socket.socket) -> bytes | None:
    """Return what the child reports, empty when it has closed without a word, None when it has not done either."""
    for _ in range(2):
        try:
            return control.recv(4096)
        except BlockingIOError:
            return None
        except ConnectionError:
            continue  # said once when it left GO unread; its report comes after
    return b""
