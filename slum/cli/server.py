"""`slum server`: this machine as a member of a replicated control plane: making one, joining, leaving.

What asks, says and starts is here; what happens to the data is in slum.server.founding, slum.server.cluster and slum.ledger.
Services are never touched by any of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slum.cli.base import Invocation, SlumGroup, command, consent
from slum.cli.server_recover import recover
from slum.cli.server_steps import actor, machine_name, run_quietly, start
from slum.errors import ConfigError, QuorumLost, SlumError

if TYPE_CHECKING:
    from slum import api
    from slum.client import Client
    from slum.server.founding import Place

API_PORT, LEDGER_PORT = 7443, 7444
JOIN_S = 120.0
AGAIN_S = 5.0
POLL_S = 0.1
F = TypeVar("F", bound=Callable[..., Any])


def place_options(function: F) -> F:
    """Add where a member is found."""
    for option in reversed(
        (
            click.option(
                "--address",
                required=True,
                metavar="HOST",
                help="This machine's name or address, as the other members and machines reach it.",
            ),
            click.option("--api-port", type=click.IntRange(1, 65535), default=API_PORT, show_default=True),
            click.option("--ledger-port", type=click.IntRange(1, 65535), default=LEDGER_PORT, show_default=True),
            click.option("--listen", metavar="ADDR", help="Listen on this address only, instead of on all."),
        )
    ):
        function = option(function)
    return function


@command(
    "init",
    examples="""
    slum server init --address 10.0.0.1
    slum server init --address a.example.org --member alpha --recovery-key-file /mnt/usb/slum.key
    """,
)
@place_options
@click.option("--member", metavar="NAME", help="This member's name.  [default: m1]")
@click.option("--recovery-key-file", type=click.Path(), metavar="FILE", help="Write the recovery key there, 0600.")
def init(
    asked: Invocation,
    address: str,
    api_port: int,
    ledger_port: int,
    listen: str | None,
    member: str | None,
    recovery_key_file: str | None,
) -> None:
    """Open this machine's control plane to others: members, tenements elsewhere, users. Starts one if there is none.

    It gets a certificate authority of its own. What runs here goes on; ledger and server are started again. Repeating it
    changes nothing. The recovery key opens the authority when every member is lost: it is shown once, so keep it elsewhere.
    """
    from slum.ledger import identity
    from slum.node.home import refuse_node
    from slum.server import founding, trust

    refuse_node(asked.home)
    key_file = _free_file(recovery_key_file)
    name = founding.own_name(asked.home)
    if name is not None and member not in (None, name):
        raise ConfigError(f"the control plane here is the member {name}, which keeps its name", hint=f"--member {name}")
    place = _place(founding.check_name(member or name or "m1"), address, api_port, ledger_port, listen)
    was = identity.load(asked.home.state)
    if was is None or (was.address, was.api) != (place.ledger, place.api):
        founding.check_ports(place, was)
    start(asked, again=founding.give_identity(asked.home, place) != was)
    key = run_quietly(founding.found_authority(asked.home, actor()))
    if key and key_file is not None:
        trust.write(key_file, f"{key}\n".encode())
    run_quietly(founding.open_front(asked.home, place))
    if asked.json:
        shown = key if key_file is None else ""
        asked.emit(
            {
                "member": place.member,
                "ledger": place.ledger,
                "api": place.api,
                "new": was is None,
                "recovery_key": shown,
            }
        )
        return
    asked.say(f"{place.member} is a member that others can join: API https://{place.api}, ledger {place.ledger}")
    if key and key_file is None:
        asked.say("recovery key, shown this once; keep it, but not on this machine:\n")
        asked.say(f"    {key}\n")
    elif key:
        asked.say(f"the recovery key is in {key_file}; keep it, but not on this machine")
    asked.say("next: `slum token new member`, and with that token on each of two more machines")
    asked.say(f"      slum server join https://{place.api} --token-file - --address HOST")


@command(
    "join",
    examples="""
    slum server join https://10.0.0.1:7443 --token-file - --address 10.0.0.2
    slum server join https://10.0.0.1:7443 --token-file token --address 10.0.0.4 --member m4 --replace m2
    """,
)
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option(
    "--token-file", required=True, metavar="FILE", help="The token of `slum token new member`; - reads stdin."
)
@place_options
@click.option("--member", metavar="NAME", help="This member's name.  [default: this machine's]")
@click.option("--replace", metavar="MEMBER", help="Remove that member when this one is in.")
@click.option("--timeout", type=float, default=JOIN_S, show_default=True, metavar="SECONDS", help="How long to wait.")
def join(
    asked: Invocation,
    urls: tuple[str, ...],
    token_file: str,
    address: str,
    api_port: int,
    ledger_port: int,
    listen: str | None,
    member: str | None,
    replace: str | None,
    timeout: float,
) -> None:
    """Make this machine a member of the control plane that answers at URL.

    It gets a copy of all that is committed, follows, and votes as soon as it is close behind. The token is told only to the
    authority that it names. What was interrupted is finished by the same command with the same token. One that was removed
    or fenced comes back so, as a new one; what it held is kept aside.
    """

    from slum import api
    from slum.cli.join import token_from
    from slum.ledger import identity
    from slum.node.home import checked_url, refuse_node
    from slum.node.join import answered
    from slum.pki.tokens import parse
    from slum.server import founding

    refuse_node(asked.home)
    urls = tuple(checked_url(url) for url in urls)
    text = token_from(token_file, {}) or ""
    token = parse(text)
    place = _place(founding.check_name(member or machine_name()), address, api_port, ledger_port, listen)
    end = time.monotonic() + timeout
    if identity.load(asked.home.state) is None:
        founding.check_ports(place, None)
    with _room(asked, text):
        was = identity.load(asked.home.state)
        me = founding.give_identity(asked.home, place)
        request = api.JoinRequest(
            secret=token.secret,
            csr=founding.request(asked.home),
            host=machine_name(),
            member=founding.offer(asked.home, me),
        )
        answer = answered(urls, token, request, timeout, asked.note)
        if answer.kind != "member":
            raise ConfigError(f"this token is for a {answer.kind}", hint="make one with `slum token new member`")
        founding.keep_answer(asked.home, answer)
    start(asked, again=was not in (None, me), wait=False)
    run_quietly(founding.open_front(asked.home, place))
    again_at = time.monotonic() + AGAIN_S
    while not _votes(asked, place.member):
        now = time.monotonic()
        if now > end:
            raise QuorumLost(
                f"{place.member} has a certificate, but was not made a member within {timeout:g} s",
                hint=f"repeat the command; the reason is in {asked.home.own_log('ledger')} and in the leader's logs",
            )
        if now > again_at:
            # Whoever let us in may be gone: ask again, which is the same to the others.
            again_at = now + AGAIN_S
            answered(urls, token, request, max(0.0, end - now), asked.note)
        time.sleep(POLL_S)
    with _here(asked) as client:
        if replace is not None:
            client.change_members(remove=replace)
        members = tuple(row.id for row in client.cluster().members)
    if asked.json:
        asked.emit({"member": place.member, "ledger": place.ledger, "api": place.api, "members": members})
        return
    asked.say(f"{place.member} is a member: {', '.join(members)}")
    if len(members) % 2 == 0:
        asked.say(f"{len(members)} members stand no more losses than {len(members) - 1}: let one more join")
    asked.say("next: `slum status --cluster`")


@command(
    "leave",
    examples="""
    slum server leave
    slum server leave --yes
    """,
)
def leave(asked: Invocation) -> None:
    """Take this machine out of the control plane's members, and stop ledger and server here. Its data is kept aside.

    A leader hands over first. Services here go on. Refused for the last member, and while a tenement of the fleet is this
    machine itself. One that was removed while it was away, or fenced, is only stopped: the others know.
    """
    from slum.ledger import identity
    from slum.ledger.refusal import MARK
    from slum.node import boot as node_boot
    from slum.node import service
    from slum.server import boot, founding
    from slum.server.cluster import REMOVED

    me = identity.load(asked.home.state)
    if me is None:
        raise ConfigError("this machine is no member of a replicated control plane", hint="`slum status --cluster`")
    if not consent(asked, f"Take {me.id} out of the members?"):
        asked.note("nothing was changed")
        return
    left: tuple[str, ...] = ()
    if not (asked.home.state / MARK).exists():
        with _here(asked) as client:
            view = client.cluster()
            if all(alarm.kind != REMOVED for alarm in view.alarms):
                left = client.change_members(remove=me.id).members
    run_quietly(founding.close_front(asked.home))
    node_boot.shut_down(asked.home, set(boot.PROGRAMS))
    asked.home.boot.unlink(missing_ok=True)
    service.retire(asked.home)
    aside = asked.home.state.with_name(f"state.left-{int(time.time())}")
    asked.home.state.rename(aside)
    if asked.json:
        asked.emit({"left": me.id, "members": left, "data": str(aside)})
        return
    now = f"has left; members: {', '.join(left)}" if left else "was no member any more, and is stopped"
    asked.say(f"{me.id} {now}. Its data is in {aside}: remove it when nothing is missed")


@command(
    "members",
    examples="""
    slum server members
    slum server members remove m3
    slum server members --replace m3
    """,
)
@click.argument("action", required=False, type=click.Choice(["remove"]))
@click.argument("member", required=False)
@click.option("--replace", metavar="MEMBER", help="Make a token for a machine that takes that member's place.")
def members(asked: Invocation, action: str | None, member: str | None, replace: str | None) -> None:
    """List the members, or remove one that is gone for good.

    A removed member's certificate is revoked; it can come back only as a new one. Where it was lost with its disk, let another
    machine take its place first: --replace says how.
    """
    if action == "remove" and member is None:
        raise click.UsageError("remove: name the member")
    if replace is not None:
        _say_replacement(asked, replace)
        return
    with asked.client() as client:
        found = client.cluster()
    if action is None:
        if asked.json:
            asked.emit(found)
            return
        from slum.cli.views import cluster_lines

        for line in cluster_lines(found, asked.paint):
            asked.say(line)
        return
    _check_known(str(member), found)
    if not consent(asked, f"Remove {member} from the members for good?"):
        asked.note("nothing was changed")
        return
    with asked.client() as client:
        left = client.change_members(remove=str(member)).members
    if asked.json:
        asked.emit({"removed": member, "members": left})
        return
    asked.say(f"{member} is removed; members: {', '.join(left)}")


@command(
    "install",
    examples="""
    slum server install
    """,
)
def install(asked: Invocation) -> None:
    """Let systemd start the control plane of this machine, now and after a reboot. What runs goes on."""
    from slum.node import service
    from slum.node.home import refuse_node
    from slum.server import boot

    refuse_node(asked.home)
    if not service.can_install():
        raise ConfigError(
            "systemd is not this machine's init, or not yours to command",
            hint="`slum up` starts the control plane without it; after a reboot somebody has to do that again",
        )
    done = service.start(asked.home, boot.boot_children(asked.home), installing=True)
    boot.wait_for_api(asked.home)
    if asked.json:
        asked.emit({"unit": done.unit, "started": done.started})
        return
    asked.say(f"{done.unit} keeps the control plane of this machine: `systemctl status {done.unit}`")


@command(
    "run",
    examples="""
    slum server run
    slum server run --data-dir /srv/slum
    """,
)
def run(asked: Invocation) -> None:
    """Be the keeper in the foreground, with ledger, server and agent as its children: what `slum up` does detached.

    For systemd and containers. SIGTERM ends it; services live on and are adopted by the next one.
    """

    import os

    from slum.node.boot import check_keeper
    from slum.node.home import refuse_node
    from slum.node.keeperclient import keeper_command
    from slum.server import boot

    refuse_node(asked.home)
    check_keeper(asked.home)
    boot.write_boot(asked.home)
    words, env = keeper_command(asked.home)
    asked.note(f"keeper in the foreground (data {asked.home.data}); its log is {asked.home.own_log('keeper')}")
    os.execve(words[0], words, env)


@click.group("server", cls=SlumGroup, epilog="  slum server init --address 10.0.0.1\n  slum server members")
def server() -> None:
    """The control plane's members: make the first one, join, leave, replace, recover."""


for _command in (init, join, leave, members, recover, install, run):
    server.add_command(_command)


@contextmanager
def _room(asked: Invocation, token: str) -> Iterator[None]:
    """Have a folder for a new member, or the one that this *token* began with; what was there is moved aside, or back."""
    from slum.ledger import fence, folder
    from slum.ledger.refusal import MARK
    from slum.server import boot, founding

    state = asked.home.state
    fenced = (state / MARK).exists()
    if not fenced and (folder.current(state) is None or founding.was_begun_with(asked.home, token)):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        founding.begin_with(asked.home, token)
        yield
        return
    if not (state / "member.json").exists():
        raise ConfigError(
            f"{asked.home.data} holds a control plane of its own",
            hint="a member takes an empty data folder: choose another --data-dir and --run-dir",
        )
    if not consent(asked, f"This machine {'was fenced' if fenced else 'is a member already'}. Join as a new one?"):
        raise ConfigError("nothing was changed", hint="--yes puts what it holds aside")
    boot.shut_down_servers(asked.home)
    aside = fence.set_aside(state, time.time())
    try:
        state.mkdir(mode=0o700)
        founding.begin_with(asked.home, token)
        yield
    except BaseException:
        state.rename(state.with_name(f"{state.name}-unfinished-{int(time.time())}"))
        aside.rename(state)
        boot.up(asked.home, wait=False)
        raise
    asked.note(f"what this machine held before is in {aside}")


def _place(member: str, address: str, api_port: int, ledger_port: int, listen: str | None) -> Place:
    from slum.server.founding import Place, check_host

    if api_port == ledger_port:
        raise ConfigError(f"API and ledger cannot both have port {api_port}")
    return Place(
        member=member,
        address=check_host(address),
        api_port=api_port,
        ledger_port=ledger_port,
        listen=listen or "",
    )


def _votes(asked: Invocation, member: str) -> bool:
    """Tell whether the ledger of here counts *member* among those that vote, and its server answers."""
    from slum.server import boot

    if not boot.is_ready(asked.home):
        return False
    try:
        with _here(asked) as client:
            found = client.cluster()
    except SlumError:
        return False
    return any(row.id == member and row.role in ("leader", "follower") for row in found.members)


def _here(asked: Invocation) -> Client:
    """Return a client of this machine's own server, whatever context is in use: who leaves is a member of that one."""
    from slum.client import Client

    return Client(asked.home)


def _say_replacement(asked: Invocation, member: str) -> None:
    with asked.client() as client:
        _check_known(member, client.cluster())
        made = client.add_token("member")
    if asked.json:
        asked.emit(made)
        return
    where = made.servers[0] if made.servers else "URL"
    asked.say(f"on the new machine, within an hour, with this token on stdin:\n\n    {made.token}\n")
    asked.say(f"    slum server join {where} --token-file - --address HOST --member NAME --replace {member}")


def _check_known(member: str, view: api.ClusterView) -> None:
    from slum.problem import nearest

    known = [row.id for row in view.members]
    if member not in known:
        raise ConfigError(f"{member} is no member{nearest(member, known)}", hint="`slum server members` lists them")


def _free_file(name: str | None) -> Path | None:
    """Return the path of a file that is to be written and is not there yet."""
    if name is None:
        return None
    path = Path(name)
    if path.exists() or not path.parent.is_dir():
        why = "is there already" if path.exists() else "cannot be written: its folder is missing"
        raise ConfigError(f"{name} {why}; nothing was changed", hint="a recovery key needs a file of its own")
    return path
