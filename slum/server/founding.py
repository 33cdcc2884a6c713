"""A machine becomes a member: its identity for the ledger, its age identity, the fleet's authority, and the way in by a token.

Used by `slum server init` and `join`, in their own process, before or while the programs run. Every step can be repeated and
finds what is done already; secrets are 0600 in Home.state and appear nowhere else. Services are never touched here.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import re
import socket
import time

import msgspec

from slum import api
from slum.errors import ConfigError, QuorumLost, SlumError
from slum.frozen import Frozen
from slum.ledger import folder, identity, joiner
from slum.ledger.client import connect
from slum.ledger.commands import Member
from slum.ledger.joiner import Join
from slum.ledger.reader import Reader
from slum.node.keeperclient import KeeperClient, KeeperError
from slum.paths import Home
from slum.pki.request import make_request, new_key
from slum.server import front, trust

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
COMMIT_S = 20.0
POLL_S = 0.05
ATTEMPTS = 5
BEGUN = "joined-by"
"""sha256 of the token."""


class Place(Frozen):
    """Who a member is to be, and where it is found."""

    member: str
    address: str
    """The host's name or address, as the other members and machines reach it."""
    api_port: int
    ledger_port: int
    listen: str = ""
    """The address to listen on; all when empty."""

    @property
    def ledger(self) -> str:
        return f"{bracketed(self.address)}:{self.ledger_port}"

    @property
    def api(self) -> str:
        return f"{bracketed(self.address)}:{self.api_port}"

    @property
    def front(self) -> tuple[str, ...]:
        """Where the front listens."""
        hosts = (bracketed(self.listen),) if self.listen else ("0.0.0.0", "[::]")
        return tuple(f"{host}:{self.api_port}" for host in hosts)

    @property
    def ledger_listen(self) -> str:
        """One socket that takes IPv4 too, where the ledger listens everywhere."""
        everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
        return f"{bracketed(self.listen) or everywhere}:{self.ledger_port}"


def bracketed(host: str) -> str:
    """Return *host* as it stands before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def check_name(member: str) -> str:
    """Return *member* if it can be a member's name; ConfigError if not."""
    if not NAME.fullmatch(member):
        raise ConfigError(f"{member!r} is no name for a member: a-z, 0-9 and -, at most 32")
    return member


def own_name(home: Home) -> str | None:
    """Return the name of the one member whose ledger is in *home*; None without one."""
    if folder.current(home.state) is None:
        return None
    reader = Reader(home.state)
    try:
        members = reader.cluster().members
    finally:
        reader.close()
    return members[0].id if len(members) == 1 else None


def check_host(address: str) -> str:
    """Return *address* if others can find a machine by it: a host's name or an IP address; ConfigError if not."""
    host = address[1:-1] if address.startswith("[") and address.endswith("]") else address
    try:
        found = not ipaddress.ip_address(host).is_unspecified
    except ValueError:
        found = HOST.fullmatch(host) is not None
    if not found:
        raise ConfigError(f"{address!r} is no host name or address", hint="--address 10.0.0.1, without a port")
    return host


def check_ports(place: Place, me: identity.Me | None) -> None:
    """Return when a member can listen as *place* says, who as *me* listens elsewhere; ConfigError when it cannot."""
    own = {me.api.rpartition(":")[2], me.address.rpartition(":")[2]} if me is not None else set()
    for what, option, address in (
        ("API", "--api-port", place.front[0]),
        ("ledger", "--ledger-port", place.ledger_listen),
    ):
        host, _, port = address.rpartition(":")
        if port in own:
            continue
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host.strip("[]"), int(port)))
            except OSError as error:
                raise ConfigError(
                    f"the {what} cannot listen on {address}: {error.strerror or error}; nothing was changed",
                    hint=f"choose another with {option} or --listen",
                ) from error


def give_identity(home: Home, place: Place) -> identity.Me:
    """Return who *home* is, as *place* says; ConfigError when it is somebody else already.

    Who never got a ledger was taken in by nobody: an attempt to join that was given up may be repeated as somebody else. The
    only member may get another address: nobody else looks for it.
    """
    me = identity.load(home.state)
    if me is None or ((me.id, me.address, me.api) != _wanted(place) and folder.current(home.state) is None):
        recipient = trust.own_recipient(home)
        identity.forget(home.state)
        identity.make(
            home.state,
            id=place.member,
            listen=place.ledger_listen,
            address=place.ledger,
            api=place.api,
            recipient=recipient,
        )
    elif (me.address, me.api) != (place.ledger, place.api) and own_name(home) == me.id == place.member:
        moved = msgspec.structs.replace(me, listen=place.ledger_listen, address=place.ledger, api=place.api)
        trust.write(home.state / identity.ME, msgspec.json.encode(moved))
    me = identity.load(home.state)
    if me is None or (me.id, me.address, me.api) != _wanted(place):
        was = f"{me.id} at {me.address}" if me is not None else "nobody"
        raise ConfigError(
            f"this machine is the member {was}, not {place.member} at {place.ledger}; nothing was changed",
            hint="a member keeps its name and addresses: leave (`slum server leave`) and join again to change them",
        )
    return me


def _wanted(place: Place) -> tuple[str, str, str]:
    return place.member, place.ledger, place.api


def offer(home: Home, me: identity.Me) -> api.MemberOffer:
    """Return what the others must know of this member."""
    row = identity.row(home.state, me)
    return api.MemberOffer(
        id=row.id,
        incarnation=row.incarnation,
        public_key=row.public_key,
        address=row.address,
        recipient=row.recipient,
        api=row.api,
    )


def request(home: Home) -> str:
    """Return a certificate request for this member's front, whose key is made if need be."""
    home.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not home.front_key.exists():
        trust.write(home.front_key, new_key())
    return make_request(home.front_key.read_bytes())


def begin_with(home: Home, token: str) -> None:
    """Note which token this folder's member joins by."""
    trust.write(home.state / BEGUN, _digest(token).encode())


def was_begun_with(home: Home, token: str) -> bool:
    """Tell whether this folder's member joins, or has joined, by that very *token*."""
    try:
        return (home.state / BEGUN).read_text() == _digest(token)
    except FileNotFoundError:
        return False


def keep_answer(home: Home, answer: api.JoinAnswer) -> None:
    """Have on disk what a member's token brought; the ledger joins by it when it starts."""
    trust.write(home.authority_certificate, answer.ca.encode())
    trust.write(home.front_certificate, answer.certificate.encode())
    members = tuple(Member(**{name: getattr(row, name) for name in row.__struct_fields__}) for row in answer.members)
    joiner.prepare(home.state, Join(cluster=answer.cluster, members=members))


async def found_authority(home: Home, actor: str) -> str:
    """Give the fleet its authority and this member its certificate; return the recovery key, "" when there was an authority.

    The ledger must run. QuorumLost when it does not commit in time; then it may be repeated.
    """
    me = identity.load(home.state)
    if me is None:
        raise SlumError(f"{home.state} has no identity")
    reader = Reader(home.state)
    try:
        end = time.monotonic() + COMMIT_S
        while not _has_key(reader, me):
            if time.monotonic() > end:
                raise QuorumLost("the ledger did not take up this member's key in time", hint="repeat the command")
            await asyncio.sleep(POLL_S)
        async with connect(home.ledger_socket) as ledger:
            recovery = await trust.found(ledger, reader, home, actor=actor)
            await trust.certify(ledger, reader, home, me.id)
    finally:
        reader.close()
    return recovery


async def seal_alone(home: Home, actor: str) -> None:
    """Seal the authority's key to the members of now alone, after one went on without the others."""
    reader = Reader(home.state)
    try:
        row = reader.authority()
        if row is not None:
            members = {member.recipient for member in reader.cluster().members}
            async with connect(home.ledger_socket) as ledger:
                await trust.seal_to(ledger, reader, home, drop=set(row.recipients) - members, actor=actor)
    finally:
        reader.close()


async def open_front(home: Home, place: Place) -> None:
    """Make the front run and answer; this member has its certificate. The server, which keeps it, may be at it too."""
    for attempt in range(ATTEMPTS):
        try:
            async with await KeeperClient.connect(home) as keeper:
                await front.ensure(keeper, home, place.front)
            return
        except KeeperError:
            if attempt == ATTEMPTS - 1:
                raise
            await asyncio.sleep(0.5)


async def close_front(home: Home) -> None:
    """End the front of a member that has left."""
    async with await KeeperClient.connect(home) as keeper:
        await front.close(keeper, home)


def _digest(token: str) -> str:
    return hashlib.sha256(token.strip().encode()).hexdigest()


def _has_key(reader: Reader, me: identity.Me) -> bool:
    try:
        return any(row.id == me.id and row.public_key for row in reader.cluster().members)
    except QuorumLost:
        return False
