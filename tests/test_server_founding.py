"""Who a machine becomes as a member: what is refused before anything is written, and what of it can be taken back."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

import msgspec
import pytest

from slum.errors import ConfigError
from slum.ledger import fence, identity
from slum.ledger.beginning import Beginning, begin
from slum.ledger.refusal import REJOIN, Refusal
from slum.paths import Home
from slum.server import boot
from slum.server.founding import Place, check_host, check_ports, give_identity


def place(member: str = "m1", address: str = "10.0.0.1", **fields: object) -> Place:
    return msgspec.structs.replace(Place(member=member, address=address, api_port=7443, ledger_port=7444), **fields)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(data=tmp_path / "d", run=tmp_path / "r")


def with_a_ledger(home: Home, *others: str) -> None:
    """Let *home* have a ledger of its own member and *others*."""
    me = identity.load(home.state)
    assert me is not None
    rows = [identity.row(home.state, me)]
    rows += [msgspec.structs.replace(rows[0], id=name, incarnation=name) for name in others]
    made = Beginning(cluster=str(uuid.uuid4()), lineage="l", generation=7, members=tuple(rows), at=1.0)
    begin(home.state, made, 1 << 20)


@pytest.mark.parametrize("host", ["10.0.0.1", "fd00::1", "[fd00::1]", "a.example.org", "node_7", "127.0.0.1"])
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert check_host(host) == host.strip("[]")


@pytest.mark.parametrize(
    "host", ["", " ", "10.0.0.1:7443", "a:7443", "https://a", "a/b", "a b", "0.0.0.0", "::", "[::1", "-a", "a\nb"]
)
def test_what_others_could_not_dial_is_no_host(host: str) -> None:
    with pytest.raises(ConfigError, match="no host name or address"):
        check_host(host)


def test_a_port_that_is_taken_is_found_before_anything_is_written(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as probe:
        free, port = probe.getsockname()[1], taken.getsockname()[1]
        probe.close()
        here = place(listen="127.0.0.1", api_port=free, ledger_port=port)
        with pytest.raises(ConfigError, match=f"the ledger cannot listen on 127.0.0.1:{port}"):
            check_ports(here, None)
        with pytest.raises(ConfigError, match="the API cannot listen on 192"):
            check_ports(msgspec.structs.replace(here, listen="192.0.2.1"), None)
        check_ports(msgspec.structs.replace(here, ledger_port=free, api_port=free), None)
    assert not home.state.exists()


def test_who_was_taken_in_by_nobody_may_become_somebody_else(home: Home) -> None:
    first = give_identity(home, place("m2", "10.0.0.9"))
    assert give_identity(home, place("m2", "10.0.0.9")) == first
    second = give_identity(home, place("m3", "10.0.0.2"))
    assert (second.id, second.address, second.api) == ("m3", "10.0.0.2:7444", "10.0.0.2:7443")


def test_the_only_member_may_move_and_one_of_several_may_not(home: Home, tmp_path: Path) -> None:
    me = give_identity(home, place())
    with_a_ledger(home)
    moved = give_identity(home, place(address="10.0.0.7", ledger_port=7555))
    assert (moved.address, moved.api) == ("10.0.0.7:7555", "10.0.0.7:7443")
    assert (moved.incarnation, moved.recipient) == (me.incarnation, me.recipient), "it is the same member"
    with pytest.raises(ConfigError, match="is the member m1"):
        give_identity(home, place("m2", "10.0.0.7", ledger_port=7555))
    other = Home(data=tmp_path / "e", run=tmp_path / "s")
    give_identity(other, place())
    with_a_ledger(other, "m2")
    with pytest.raises(ConfigError, match="is the member m1"):
        give_identity(other, place(address="10.0.0.7"))


def test_who_must_not_serve_is_said_at_once_where_the_api_is_waited_for(home: Home) -> None:
    home.state.mkdir(parents=True)
    fence.refuse_for_good(home.state, "this member is fenced", REJOIN)
    with pytest.raises(Refusal, match="is fenced") as raised:
        boot.wait_for_api(home)
    assert raised.value.exit_code == 7
