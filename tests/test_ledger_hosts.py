"""What the ledger makes of hosts' keys: the first one stands on every member, until somebody says forget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import asyncssh
import pytest
from ledger_support import Scribe, new_state, scribe

from slum.ledger.commands import ForgetHost, PinHost, SetProtocol
from slum.ledger.hosts import fingerprint
from slum.ledger.reader import Reader

HOST = "203.0.113.9:22"
SOME = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKntEnaClcGnd9umM64rwBEYFapEf3s0wfkC5x2o+fZs"


def a_key(kind: str = "ssh-ed25519") -> str:
    made = asyncssh.generate_private_key(kind)
    return " ".join(made.export_public_key().decode().split()[:2])


@pytest.fixture
def s(tmp_path: Path) -> Iterator[Scribe]:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as made:
        made.done(SetProtocol(version=2))
        yield made


@pytest.fixture
def reader(s: Scribe, tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path)
    yield made
    made.close()


def known(reader: Reader) -> dict[str, str]:
    return {row.host: row.key for row in reader.hosts()}


def test_the_first_key_stands_until_it_is_forgotten(s: Scribe, reader: Reader) -> None:
    first, second = a_key(), a_key("ecdsa-sha2-nistp256")
    s.done(PinHost(host=HOST, key=first))
    s.done(PinHost(host=HOST, key=first))
    refused = s.rejected(PinHost(host=HOST, key=second), "conflict")
    assert fingerprint(first) in refused.why
    assert known(reader) == {HOST: first}
    s.done(ForgetHost(host=HOST))
    s.done(ForgetHost(host=HOST))
    assert known(reader) == {HOST: ""}, "what members remember from before must not count"
    s.done(PinHost(host=HOST, key=second))
    assert known(reader) == {HOST: second}
    said = [(one.kind, one.subject, one.before, one.after) for one in reader.events(limit=100)][-3:]
    about = f"host:{HOST}"
    assert said == [
        ("host_pinned", about, None, {"fingerprint": fingerprint(first)}),
        ("host_forgotten", about, {"fingerprint": fingerprint(first)}, None),
        ("host_pinned", about, None, {"fingerprint": fingerprint(second)}),
    ]


def test_fingerprints_are_those_of_ssh_keygen() -> None:
    for kind in ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"):
        key = a_key(kind)
        assert fingerprint(key) == asyncssh.import_public_key(key).get_fingerprint()


@pytest.mark.parametrize(
    "key", ["", "ssh-ed25519", "ssh-ed25519 AAAA", "nonsense", f"ssh-rsa {SOME.split()[1]}", f"{SOME} a comment"]
)
def test_what_is_no_key_is_not_pinned(s: Scribe, reader: Reader, key: str) -> None:
    s.rejected(PinHost(host=HOST, key=key), "invalid")
    s.rejected(PinHost(host="", key=a_key()), "invalid")
    assert known(reader) == {}


def test_an_older_ledger_has_the_rows_of_its_protocol(tmp_path: Path) -> None:
    """Members of two versions side by side have equal rows, before the protocol is raised and after."""
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        reader = Reader(tmp_path)
        s.rejected(PinHost(host=HOST, key=a_key()), "invalid")
        s.rejected(ForgetHost(host=HOST), "invalid")
        tables = "SELECT name FROM sqlite_schema WHERE name = 'hosts'"
        assert s.state._db.execute(tables).fetchall() == []
        assert reader.hosts() == ()
        assert reader.host(HOST) is None
        s.done(SetProtocol(version=2))
        key = a_key()
        s.done(PinHost(host=HOST, key=key))
        assert known(reader) == {HOST: key}
        reader.close()
        other = new_state(tmp_path / "other.db")
        for entry in s.entries:
            other.apply(entry)
        assert other.row_hash() == s.state.row_hash()
        other.close()
