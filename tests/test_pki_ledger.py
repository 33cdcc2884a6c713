"""What the ledger makes of tokens, certificates and the authority: the same on every member, and nothing for nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from ledger_support import Scribe, new_state, scribe

from slum.ledger.access import A_KEY_MAX, FORGOTTEN_S, KEPT_S, fits
from slum.ledger.commands import (
    AddToken,
    NoteCertificate,
    RemoveToken,
    Revoke,
    SetAuthority,
    UseToken,
)
from slum.ledger.reader import Reader
from slum.ledger.state import State

HOUR, DAY = 3600.0, 86_400.0
KEY, OTHER = "aa" * 32, "bb" * 32


@pytest.fixture
def s(tmp_path: Path) -> Iterator[Scribe]:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as made:
        yield made


@pytest.fixture
def reader(s: Scribe, tmp_path: Path) -> Iterator[Reader]:
    made = Reader(tmp_path)
    yield made
    made.close()


def a_token(s: Scribe, id: str = "t1", kind: str = "user", subject: str = "ana", role: str = "read") -> AddToken:
    return AddToken(
        id=id, hash=sha256(id.encode()).digest(), kind=kind, subject=subject, role=role, expires_at=s.at + HOUR
    )


def used(
    s: Scribe, id: str = "t1", key: str = KEY, subject: str = "user/ana", serial: str = "01", lasts: float = 90 * DAY
) -> UseToken:
    return UseToken(id=id, key_hash=key, subject=subject, serial=serial, certificate="PEM", not_after=s.at + lasts)


def noted(s: Scribe, serial: str, key: str = KEY, subject: str = "user/ana", role: str = "read") -> NoteCertificate:
    return NoteCertificate(serial=serial, subject=subject, role=role, key_hash=key, not_after=s.at + 90 * DAY)


def test_a_token_binds_to_the_first_key_by_the_headers_time(s: Scribe, reader: Reader) -> None:
    s.done(a_token(s))
    s.done(used(s))
    s.done(used(s, serial="02"))
    assert "another key" in s.rejected(used(s, key=OTHER, serial="03"), "invalid").why
    assert [row.serial for row in reader.certificates()] == ["01"]
    s.at += 2 * HOUR
    s.done(used(s, serial="04"))
    s.done(a_token(s, "t2"))
    s.at += HOUR + 1
    assert "expired" in s.rejected(used(s, "t2", key=OTHER, serial="05"), "invalid").why
    s.rejected(used(s, "t9"), "missing")
    assert reader.verify().ok


@pytest.mark.parametrize(
    ("kind", "subject", "certificate", "may"),
    [
        ("user", "ana", "user/ana", True),
        ("user", "ana", "user/bob", False),
        ("user", "ana", "member/ana", False),
        ("user", "ana", "user/ana/x", False),
        ("node", "workers-1.2", "node/workers-1/workers-1.2", True),
        ("node", "workers-1.2", "node/workers-1/workers-1.3", False),
        ("node", "workers-1.2", "node/workers-2/workers-1.2", False),
        ("member", "", "member/m2", True),
        ("member", "", "member/", False),
        ("member", "", "member/m2/x", False),
        ("member", "m2", "member/m3", False),
    ],
)
def test_a_token_allows_one_name(kind: str, subject: str, certificate: str, may: bool) -> None:
    assert fits(kind, subject, certificate) is may


def test_a_token_for_one_lets_in_nobody_else(s: Scribe) -> None:
    s.done(a_token(s))
    assert "somebody else" in s.rejected(used(s, subject="user/root"), "invalid").why
    s.done(used(s))


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "king"},
        {"role": "root"},
        {"subject": ""},
        {"kind": "node", "subject": "here", "role": ""},
        {"id": ""},
        {"id": "x" * 33},
    ],
)
def test_tokens_that_make_no_sense_are_rejected(s: Scribe, fields: dict[str, str]) -> None:
    s.rejected(a_token(s, **fields), "invalid")


def test_a_renewal_needs_a_certificate_of_this_key_that_holds(s: Scribe, reader: Reader) -> None:
    s.rejected(noted(s, "01"), "missing")
    s.done(a_token(s))
    s.done(used(s))
    s.rejected(noted(s, "02", key=OTHER), "missing")
    s.rejected(noted(s, "02", role="admin"), "missing")
    s.rejected(noted(s, "02", subject="user/bob"), "missing")
    s.done(noted(s, "02"))
    s.rejected(noted(s, "02"), "invalid")  # a serial is one certificate's
    s.done(Revoke(subject="user/ana"))
    s.rejected(noted(s, "03"), "missing")
    assert reader.revoked() == {"01", "02"}
    s.done(noted(s, "10", subject="member/m1", role=""))
    s.done(Revoke(subject="member/m1"))
    s.rejected(noted(s, "11", subject="member/m1", role=""), "missing")
    s.done(noted(s, "12", key=OTHER, subject="member/m1", role=""))


def test_revoking_reaches_all_of_a_subject_and_its_open_tokens(s: Scribe, reader: Reader) -> None:
    for n, machine in enumerate(("w-1", "w-1", "w-10")):
        key = f"{machine}.{n}"
        s.done(a_token(s, f"t{n}", "node", key, ""))
        s.done(used(s, f"t{n}", f"{n:064x}", f"node/{machine}/{key}", f"0{n}"))
    s.done(a_token(s, "open", "node", "w-1.7", ""))
    s.done(a_token(s, "else", "node", "w-10.7", ""))
    assert s.done(Revoke(subject="node/w-1", why="stolen")).value == 2
    assert reader.revoked() == {"00", "01"}
    assert {row.id for row in reader.tokens()} == {"t0", "t1", "t2", "else"}
    s.rejected(Revoke(subject="node/w-1"), "missing")
    s.rejected(Revoke(), "invalid")
    assert s.done(Revoke(serial="02")).value == 1
    events = [(one.kind, one.subject, one.why) for one in reader.events(kind="certificate_revoked")]
    assert events[0] == ("certificate_revoked", "node:w-1/w-1.0", "stolen")


def test_what_nobody_can_use_any_more_is_dropped(s: Scribe, reader: Reader) -> None:
    s.done(a_token(s))
    s.done(used(s))
    for n in range(2, A_KEY_MAX + 4):
        s.done(noted(s, f"{n:02}"))
    assert len(reader.certificates()) == A_KEY_MAX
    s.at += HOUR + KEPT_S + 1
    s.done(a_token(s, "t2", subject="bob"))
    assert [row.id for row in reader.tokens()] == ["t2"]
    s.at += 91 * DAY
    newest = reader.certificates()[-1].serial
    s.done(noted(s, "99"))
    assert [row.serial for row in reader.certificates()] == ["99"], newest
    s.at += FORGOTTEN_S + 91 * DAY
    s.done(a_token(s, "t3", subject="eve"))
    s.done(used(s, "t3", OTHER, "user/eve", "aa"))
    assert [row.serial for row in reader.certificates()] == ["aa"]


def test_the_authority_is_sealed_anew_only_from_the_box_that_stands(s: Scribe, reader: Reader) -> None:
    first = SetAuthority(certificate="CA", box=b"1", recovery="r", recipients=("a",))
    s.done(first)
    s.rejected(first, "conflict")
    again = SetAuthority(
        certificate="CA", box=b"2", recovery="r", recipients=("a", "b"), replaces=sha256(b"1").hexdigest()
    )
    s.done(again)
    s.rejected(again, "conflict")
    other = SetAuthority(
        certificate="other", box=b"3", recovery="r", recipients=("a",), replaces=sha256(b"2").hexdigest()
    )
    s.rejected(other, "invalid")
    row = reader.authority()
    assert row is not None
    assert (row.box, row.recipients) == (b"2", ("a", "b"))
    assert [one.kind for one in reader.events(limit=100)][-2:] == ["authority_made", "authority_sealed"]


def test_a_removed_token_is_gone(s: Scribe) -> None:
    s.done(a_token(s))
    s.done(RemoveToken(id="t1"))
    s.rejected(RemoveToken(id="t1"), "missing")
    s.rejected(used(s), "missing")


def test_an_older_state_gets_the_tables_that_it_lacks(tmp_path: Path) -> None:
    new_state(tmp_path / "old.db").close()
    with sqlite3.connect(tmp_path / "old.db") as db:
        for table in ("authority", "tokens", "certificates"):
            db.execute(f"DROP TABLE {table}")
    db.close()
    opened = State.open(tmp_path / "old.db")
    fresh = new_state(tmp_path / "new.db")
    try:
        assert opened.row_hash() == fresh.row_hash()
        assert opened._db.execute("SELECT count(*) FROM tokens").fetchone() == (0,)
    finally:
        opened.close()
        fresh.close()
