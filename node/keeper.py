"""The keeper: slum's small init. It starts and reaps children, holds listening sockets, and keeps what children say.

Everything else may die, the keeper included: children live on, and the next keeper takes them over. It knows nothing of
services, decides nothing but when a respawned child starts again, and speaks version 1 of the protocol in docs/node.md on
``<run>/p/keeper.sock``. One thread, standard library only, and nothing that blocks: no request, child or full disk may
stop it. Here are the verbs; keeper_children starts and adopts, keeper_child is a child between fork and exec,
keeper_kill signals, keeper_log and keeper_listen own files and sockets, keeper_clients the wire.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time

from slum import __version__
from slum.node import keeper_proc as proc
from slum.node.keeper_child import NAME, Heritage, check_spawn
from slum.node.keeper_children import Children
from slum.node.keeper_clients import Client, Door, Refused
from slum.node.keeper_listen import Listener, bind, check_listen, holders, take_back
from slum.node.keeper_loop import Loop
from slum.node.keeper_start import LEFT, AlreadyRuns, Options, OwnLog, Places, detach, lock, prepare, sign
from slum.node.keeper_table import LISTENER, Child, Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

PROTOCOL = 1
PAGE_BYTES = 64 << 10
DROPPED_NAMES_MAX = 500


class Keeper:
    """One keeper, from start to shutdown. *state* is what a keeper that replaced itself by execve left for this one."""

    def __init__(self, places: Places, log: OwnLog, lock_fd: int, state: dict[str, Any]) -> None:
        self.loop = Loop()
        self.say = log.say
        self.started_at = time.time()
        self.boot_id = proc.boot_id()
        self._places = places
        self._lock_fd = lock_fd
        self._running = True
        self._leaving = False
        proc.prctl(proc.PR_SET_CHILD_SUBREAPER, 1)
        self._catch_signals()
        self._heritage = Heritage(state.get("nofile"))
        self._table = Table(places.table, self.boot_id)
        self._listeners: dict[str, Listener] = {}
        self.children = Children(
            self.loop,
            self._table,
            places.fifos,
            places.alive,
            boot_id=self.boot_id,
            heritage=self._heritage,
            sockets=self._sockets,
            tell=self._tell,
            say=self.say,
        )
        self._verbs: dict[str, Callable[[Client, dict[str, Any], list[int]], dict[str, Any] | None]] = {
            "hello": self._hello,
            "spawn": self._spawn,
            "signal": self._signal,
            "list": self._list,
            "forget": self._forget,
            "stop_respawn": self._stop_respawn,
            "listen": self._listen,
            "listeners": self._list_listeners,
            "close": self._close,
            "subscribe": self._subscribe,
            "stats": self._stats,
            "reexec": self._reexec,
            "shutdown": self._shutdown,
        }
        self.door = Door(self.loop, places.socket, handle=self._handle, say=self.say, inherited=state.get("door"))
        booted = self._read_boot()
        self.children.adopt([spawn["name"] for spawn in booted])
        self._take_back_listeners(state.get("listeners", {}))
        self.children.reap()
        self._start_booted(booted)

    def run(self) -> int:
        """Serve until a signal (children stay, for the next keeper: LEFT) or the end of a shutdown (nothing stays: 0)."""
        status = LEFT
        while self._running:
            self.loop.turn()
            if self._leaving and not self.children.any_left():
                self._running, status = False, 0
                for listener in self._listeners.values():
                    listener.close(unlink=True)
                    self._table.remove(LISTENER, listener.name)
                self.children.forget_all()
        self.door.close()
        return status

    def _catch_signals(self) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for signum in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda _signum, _frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def caught(_mask: int) -> None:
            try:
                signums = os.read(reader, 4096)
            except BlockingIOError:
                return
            self.children.reap()
            if signal.SIGTERM in signums or signal.SIGINT in signums:
                self.say("asked to end: children stay for the next keeper")
                self._running = False

        self.loop.watch(reader, caught)

    def _read_boot(self) -> list[dict[str, Any]]:
        try:
            return [check_spawn(raw) for raw in json.loads(proc.read_bytes(self._places.boot))["children"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.say(f"{self._places.boot} is of no use, so nothing was started from it: {error}")
            return []

    def _start_booted(self, booted: Sequence[dict[str, Any]]) -> None:
        for spawn in booted:
            known = self.children.by_name.get(spawn["name"])
            if known is not None and not known.settled:
                continue
            try:
                self.children.spawn(spawn)
            except Refused as refused:
                self.say(f"cannot start {spawn['name']}: {refused.why}")

    def _take_back_listeners(self, inherited: dict[str, int]) -> None:
        records = self._table.load(LISTENER)
        cold = any(record.get("name") not in inherited for record in records)
        held = holders(self.children.living_pids()) if cold else {}
        for record in records:
            try:
                listener, trouble = take_back(record, held, inherited.get(record["name"]))
                self._table.save(LISTENER, listener.name, listener.record)
            except (KeyError, TypeError, ValueError, OSError) as error:
                self.say(f"left out a listener of the table: {error}")
                continue
            self._listeners[listener.name] = listener
            if trouble:
                self.say(f"listener {listener.name}: {trouble}")

    def _sockets(self, names: Sequence[str]) -> list[int]:
        fds = []
        for name in names:
            listener = self._listeners.get(name)
            if listener is None:
                raise Refused("missing", f"no listener is named {name}")
            fds.append(self._ready(listener))
        return fds

    def _ready(self, listener: Listener) -> int:
        if listener.sock is None:
            listener.ready()
            self._table.save(LISTENER, listener.name, listener.record)
        sock = listener.ready()
        # Blocking, as systemd gives them: the flag is the socket's, and a generation that died may have changed it.
        sock.setblocking(True)
        return sock.fileno()

    def _tell(self, event: str, child: Child) -> None:
        self.door.tell_subscribers({"event": event, "child": self.children.view(child)})

    def _handle(self, client: Client, request: dict[str, Any], fds: list[int]) -> None:
        """Do one request and answer it. What no verb foresaw is answered and logged: no request may end the init."""
        verb = self._verbs.get(request["op"])
        try:
            if verb is None:
                raise Refused("invalid", f"no such op: {request['op'][:100]!r}")
            if fds and request["op"] != "spawn":
                raise Refused("invalid", "only spawn takes descriptors")
            answer = verb(client, request, fds)
        except Refused:
            raise
        except ValueError as error:
            raise Refused("invalid", str(error)[:1000]) from None
        except OSError as error:
            raise Refused("os", str(error)[:1000], error.errno) from None
        except Exception as error:  # noqa: BLE001 - a bug in one verb may not end the init
            import traceback  # costs a megabyte, and is for bugs alone

            self.say(f"a bug in {request['op']}:\n{traceback.format_exc()}")
            raise Refused("invalid", f"a bug in the keeper, see its log: {type(error).__name__}") from None
        if answer is not None:
            client.answer(request["id"], **answer)

    def _hello(self, _client: Client, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        about = {"pid": os.getpid(), "version": __version__, "protocol": PROTOCOL, "data": self._places.data}
        return {**about, "boot_id": self.boot_id, "started_at": self.started_at}

    def _spawn(self, client: Client, request: dict[str, Any], fds: list[int]) -> None:
        if fds and len(fds) != 3:
            raise Refused("invalid", "spawn takes no descriptors or 3")
        spawn = check_spawn(request.get("spawn"))

        def done(child: Child, refused: Refused | None) -> None:
            if refused is None:
                client.answer(request["id"], child=self.children.view(child))
            else:
                client.answer(request["id"], refused)

        self.children.spawn(spawn, fds, done)
        self._leaving = False

    def _signal(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        signum = request.get("signal", 15)
        if type(signum) is not int or not 0 <= signum < signal.NSIG:
            raise Refused("invalid", "signal is not a signal's number")
        self.children.signal(_name(request), signum, tree=request.get("tree") is True)
        return {}

    def _list(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        after = request.get("after") or ""
        if not isinstance(after, str):
            raise Refused("invalid", "after is no name")
        page: list[dict[str, Any]] = []
        size = 0
        for name in sorted(name for name in self.children.by_name if name > after):
            view = self.children.view(self.children.by_name[name])
            size += len(json.dumps(view))
            if size > PAGE_BYTES and page:
                return {"children": page, "more": True}
            page.append(view)
        return {"children": page, "more": False}

    def _forget(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.children.forget(_name(request))
        return {}

    def _stop_respawn(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        self.children.stop_respawn(_name(request))
        return {}

    def _listen(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        record = check_listen(request)
        name = _name(request)
        there = self._listeners.get(name)
        if there is not None and there.address() != {k: record[k] for k in ("path", "tcp") if record[k] is not None}:
            raise Refused("exists", f"listener {name} has another address: {there.address()}")
        if there is None or not there.in_place():
            listener = Listener(record, bind(record))
            self._table.save(LISTENER, name, record)
            if there is not None:
                there.close(unlink=False)
            self._listeners[name] = there = listener
        return {**there.address(), "inode": there.record["inode"], "bound": there.record["bound"]}

    def _list_listeners(self, _client: Client, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {"listeners": [{"name": each.name, **each.address()} for each in self._listeners.values()]}

    def _close(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        listener = self._listeners.pop(_name(request), None)
        if listener is None:
            raise Refused("missing", f"no listener is named {request['name']}")
        listener.close(unlink=True)
        self._table.remove(LISTENER, listener.name)
        return {}

    def _subscribe(self, client: Client, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        client.subscribed = True
        return {}

    def _stats(self, _client: Client, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        pages = int(proc.read_bytes("/proc/self/statm").split()[1])
        outputs = {child.name: child.output for child in self.children.by_name.values() if child.output is not None}
        dropped = {name: output.dropped_total for name, output in outputs.items() if output.dropped_total}
        worst = sorted(dropped, key=lambda name: -dropped[name])[:DROPPED_NAMES_MAX]
        return {
            "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
            "children": len(self.children.living_pids()),
            "listeners": len(self._listeners),
            "fds": len(os.listdir("/proc/self/fd")) - 1,
            "dropped_bytes": {name: dropped[name] for name in worst},
        }

    def _reexec(self, client: Client, request: dict[str, Any], _fds: list[int]) -> None:
        """Become the keeper that is installed now: same pid, so children stay ours, with the sockets by number."""
        if not os.access(sys.executable, os.X_OK):
            raise Refused("os", f"{sys.executable} cannot be executed")
        listeners = {name: each.sock.fileno() for name, each in self._listeners.items() if each.sock is not None}
        state = {
            "lock": self._lock_fd,
            "door": self.door.fileno(),
            "listeners": listeners,
            "nofile": self._heritage.nofile,
        }
        memory = os.memfd_create("keeper", 0)
        os.write(memory, json.dumps(state).encode())
        os.lseek(memory, 0, os.SEEK_SET)
        stay = (self._lock_fd, self.door.fileno(), *listeners.values())
        for fd in stay:
            os.set_inheritable(fd, True)
        client.answer(request["id"])
        arguments = sys.orig_argv[1:]
        if "--state" in arguments:
            del arguments[arguments.index("--state") :]
        try:
            os.execv(sys.executable, [sys.executable, *arguments, "--state", str(memory)])
        except OSError as error:
            self.say(f"cannot replace myself: {error}")
            os.close(memory)
            for fd in stay:
                os.set_inheritable(fd, False)

    def _shutdown(self, _client: Client, request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        names, grace_s = request.get("names"), request.get("grace_s", 10)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused("invalid", "names is not a list of names")
        if type(grace_s) not in (int, float) or not 0 <= grace_s <= 3600:
            raise Refused("invalid", "grace_s is not from 0 to 3600")
        ending = [self.children.by_name[name] for name in names if name in self.children.by_name]
        for child in ending:
            self.children.stop_respawn(child.name)
            self._signal_if_running(child, signal.SIGTERM)

        def kill() -> None:
            for child in ending:
                self._signal_if_running(child, signal.SIGKILL)

        self.loop.after(grace_s, kill)
        self._leaving = True
        return {}

    def _signal_if_running(self, child: Child, signum: int) -> None:
        if child.running and self.children.by_name.get(child.name) is child:
            try:
                self.children.signal(child.name, signum, tree=False)
            except Refused as refused:
                if refused.kind != "missing":
                    raise


def _name(request: dict[str, Any]) -> str:
    name = request.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused("invalid", "name is missing, or is no name")
    return name


def main(arguments: Sequence[str]) -> int:
    """Run a keeper as *arguments* say; with --detach 0 as soon as one answers, also when it ran already.

    With --wait it takes over from the keeper that runs, once that has ended: for an init, which would try again for ever.
    """
    try:
        options = Options(arguments)
        places = Places(options.data, options.run)
        state = _inherited_state(options.state)
        prepare(places)
        lock_fd = state["lock"] if state else lock(places.lock, wait=options.wait)
    except AlreadyRuns as error:
        sys.stderr.write(f"keeper: {error}\n")
        return 0 if options.detach else 1
    except (OSError, ValueError) as error:
        sys.stderr.write(f"keeper: {error}\n")
        return 2
    ready = -1
    if options.detach and not state:
        caller, ready = detach()
        if caller:
            if os.read(ready, 1):
                return 0
            sys.stderr.write(f"keeper: it did not come up, see {places.log}\n")
            return 1
    sign(lock_fd)
    keeper = Keeper(places, OwnLog(places.log if options.detach else None), lock_fd, state)
    if ready >= 0:
        os.write(ready, b"r")
        os.close(ready)
    gc.collect()
    gc.freeze()
    return keeper.run()


def _inherited_state(fd: int) -> dict[str, Any]:
    if fd < 0:
        return {}
    with open(fd, "rb", buffering=0) as file:
        state: dict[str, Any] = json.loads(file.read())
    for fd in (state["lock"], state["door"], *state["listeners"].values()):
        os.set_inheritable(fd, False)
    return state


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
