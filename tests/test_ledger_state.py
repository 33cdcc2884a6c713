"""state.apply: what each command does, that it is the same everywhere, and that nothing a client says can break it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_support import Scribe, desired, fleet, new_state, note, proposal, scribe, service

from slum.ledger import schema
from slum.ledger.commands import (
    PROTOCOL,
    AnyCommand,
    Barrier,
    ForgetHost,
    Intent,
    LeaderStarted,
    Member,
    NoteEvent,
    Outcome,
    PinHost,
    Record,
    Rejected,
    Seal,
    SetDesired,
    SetOverride,
    SetProtocol,
)
from slum.ledger.perform import StateFailed
from slum.ledger.reader import Reader
from slum.ledger.state import State
from slum.model import EnvVar


def kinds(reader: Reader) -> list[str]:
    return [event.kind for event in reader.events(limit=1000)]


def intent(action: str, machine: str = "here", kind: str = "create", incarnation: int = 1, **fields: Any) -> Intent:
    values: dict[str, Any] = {"tenement": "here", "operator": "local", "deadline_at": 1060.0, **fields}
    return Intent(action=action, kind=kind, machine=machine, incarnation=incarnation, **values)


# --- desired fleets ---------------------------------------------------------------------------------------------------


def test_each_change_of_a_fleet_is_one_event(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        reader = Reader(tmp_path)
        (tmp_path / "CURRENT").write_text("state.db\n")
        web = service("web", env=(EnvVar(name="KEY", value="s3cret"),))
        assert s.done(desired(fleet(web, service("db")), 0)).value == 1
        changed = service("web", memory_limit_mb=64, env=(EnvVar(name="KEY", value="n3w"),))
        assert s.done(desired(fleet(changed, service("cache")), 1)).value == 2
        assert kinds(reader) == [
            "cluster_created",
            "leader_started",
            *("fleet_applied", "operator_added", "tenement_added", "service_added", "service_added"),
            *("fleet_applied", "service_added", "service_removed", "service_changed"),
        ]
        last = reader.events(newest=True, limit=1)[0]
        assert (last.subject, last.actor, last.why) == ("service:web", "root@test", "apply")
        assert last.before["memory_limit_mb"] is None
        assert last.after["memory_limit_mb"] == 64
        assert last.before["env"]["KEY"].startswith("sha256:")
        assert last.before["env"] != last.after["env"]
        assert "s3cret" not in str(reader.events(limit=1000))
        found = reader.fleet()
        assert found is not None
        assert (found[0], found[1]) == (2, fleet(changed, service("cache")))
        assert reader.revisions()[0].summary == "1 service added, 1 changed, 1 removed"
        assert reader.verify().ok
        reader.close()


def test_the_same_digest_again_changes_nothing(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        wanted = desired(fleet(service("web")), 0)
        s.done(wanted)
        before = s.state.position.events
        assert s.done(wanted).value == 1
        assert s.state.position.events == before


def test_a_stale_revision_is_a_conflict_that_names_what_changed(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(desired(fleet(service("web", memory_limit_mb=256)), 0))
        s.apply(proposal(desired(fleet(service("web", memory_limit_mb=512)), 1), actor="root@ops"))
        found = s.rejected(desired(fleet(service("mine")), 1), "conflict")
        assert found.why == "revision is 2, your plan was made on 1"
        assert found.details == ("root@ops changed service web.memory_limit_mb 256 -> 512",)


def test_one_control_plane_holds_one_fleet(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(desired(fleet(service("web")), 0))
        assert "holds fleet 'quick'" in s.rejected(desired(fleet(name="other"), 1), "conflict").why


@pytest.mark.parametrize("packed", [b"", b"junk", b"\x28\xb5\x2f\xfd" + bytes(20)])
def test_a_fleet_that_cannot_be_read_is_invalid(tmp_path: Path, packed: bytes) -> None:
    with scribe(tmp_path) as s:
        s.rejected(SetDesired(fleet_zstd=packed, digest="d", base_revision=0), "invalid")


def test_a_fleet_that_unpacks_too_large_is_invalid(tmp_path: Path) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(65 << 20))
    assert len(bomb) < 10_000
    with scribe(tmp_path) as s:
        assert "at most" in s.rejected(SetDesired(fleet_zstd=bomb, digest="d", base_revision=0), "invalid").why


def test_twenty_revisions_are_kept_and_all_events(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        for n in range(25):
            s.done(desired(fleet(service("web", bundle=f"{n:064x}")), n))
        reader = Reader(tmp_path)
        assert [revision.revision for revision in reader.revisions()] == list(range(25, 5, -1))
        assert reader.fleet(5) is None
        assert reader.fleet(6) is not None
        assert reader.blobs_named() == {f"{n:064x}" for n in range(5, 25)}
        assert len(reader.events(kind="fleet_applied")) == 25
        reader.close()


def test_what_was_asked_of_instances(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        reader = Reader(tmp_path)
        s.done(desired(fleet(service("web", instances=("a", "b")), service("db")), 0))
        s.done(SetOverride(verb="stop", instances=(("here", "web", "a"), ("here", "db", "main"))))
        s.done(SetOverride(verb="restart", instances=(("here", "web", "b"),)))
        s.done(SetOverride(verb="start", instances=(("here", "db", "main"),)))
        found = {(o.service, o.id): (o.stopped, o.restarts) for o in reader.overrides()["here"]}
        assert found == {("web", "a"): (True, 0), ("web", "b"): (False, 1), ("db", "main"): (False, 0)}
        assert len(reader.events(service="web", kind="override_set")) == 2
        s.rejected(SetOverride(verb="stop", instances=(("here", "web", "a"), ("here", "no", "main"))), "missing")
        s.rejected(SetOverride(verb="fly", instances=()), "invalid")
        s.done(desired(fleet(service("web", instances=("b",))), 1))
        assert [(o.service, o.id) for o in reader.overrides()["here"]] == [("web", "b")]
        reader.close()


def test_an_override_that_is_so_already_is_no_event(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(desired(fleet(service("web")), 0))
        stop = SetOverride(verb="stop", instances=(("here", "web", "main"),))
        s.done(stop)
        before = s.state.position.events
        s.done(stop)
        assert s.state.position.events == before


# --- machines ---------------------------------------------------------------------------------------------------------


def test_a_machine_from_intent_to_destroyed(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        reader = Reader(tmp_path)
        s.done(intent("a1"))
        assert [(row.action, row.kind) for row in reader.open_intents()] == [("a1", "create")]
        assert reader.machines()[0].state == "creating"
        s.done(Outcome(action="a1", ok=True, machine_id="local:m1"))
        s.done(Outcome(action="a1", ok=True, machine_id="local:m1"))
        assert (reader.machines()[0].state, reader.machines()[0].machine_id) == ("created", "local:m1")
        s.rejected(Outcome(action="a1", ok=False), "invalid")
        s.rejected(Outcome(action="zz", ok=True), "missing")
        s.rejected(intent("a1"), "invalid")
        s.rejected(intent("d0", kind="destroy", machine_id="other"), "fenced")
        s.done(intent("d1", kind="destroy", machine_id="local:m1"))
        s.done(Outcome(action="d1", ok=False, error="locked"))
        assert reader.machines()[0].state == "destroying"
        s.done(intent("d2", kind="destroy"))
        s.done(Outcome(action="d2", ok=True))
        assert reader.machines()[0].state == "destroyed"
        assert reader.open_intents() == ()
        assert kinds(reader)[2:] == [
            *("machine_create_intended", "machine_created", "machine_destroy_intended", "machine_destroy_failed"),
            *("machine_destroy_intended", "machine_destroyed"),
        ]
        reader.close()


def test_a_destroy_is_irrevocable(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(intent("a1", incarnation=2))
        s.done(Outcome(action="a1", ok=True, machine_id="i-1"))
        s.done(intent("d1", kind="destroy", incarnation=2))
        assert "is dead" in s.rejected(intent("a2", incarnation=2), "fenced").why
        assert "is over" in s.rejected(intent("a3", incarnation=1), "fenced").why
        s.done(intent("a4", incarnation=3))
        s.rejected(intent("d9", kind="destroy", machine="none"), "missing")


def test_another_leaders_open_intent_holds_what_contradicts_it_until_its_deadline(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(intent("a1", deadline_at=1060.0))
        s.lead(run="r2")
        s.at = 1059.0
        why = s.rejected(intent("d1", kind="destroy"), "fenced").why
        assert "create a1 of an earlier leader may still arrive for 1.0 s" in why
        s.rejected(intent("a9", incarnation=2), "fenced")
        s.done(intent("b1", machine="other"))
        s.done(intent("a2", deadline_at=2000.0))
        s.rejected(intent("d1", kind="destroy"), "fenced")
        s.at = 1061.0
        s.done(intent("d1", kind="destroy"))


def test_a_leader_that_goes_on_in_the_next_epoch_is_not_held_by_itself(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(intent("a1"))
        s.apply(Seal(members=s.state.position.members))
        s.lead(run="r1")
        s.done(intent("d1", kind="destroy"))


def test_a_late_outcome_of_a_superseded_create_gives_the_destroy_its_machine(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        s.done(intent("a1"))
        s.done(intent("d1", kind="destroy"))
        s.done(Outcome(action="a1", ok=True, machine_id="i-7"))
        reader = Reader(tmp_path)
        assert (reader.machines()[0].state, reader.machines()[0].machine_id) == ("destroying", "i-7")
        reader.close()


# --- who may write ----------------------------------------------------------------------------------------------------


def test_an_older_header_never_takes_effect(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.lead(run="r2")
        before = s.state.position
        for how in ({"term": 1}, {"term": 3}, {"epoch": 0}, {"epoch": 2}):
            applied = s.apply(note(), Barrier(), **how)
            assert applied.stale
            assert {result.code for result in applied.results if isinstance(result, Rejected)} == {"stale"}
        assert s.apply(LeaderStarted(member="m9", run="old"), term=2).stale
        now = s.state.position
        assert (now.events, now.results, now.leader, now.term) == (before.events, before.results, "m1/r2", 2)
        assert now.seq == before.seq + 5
        assert now.chain != before.chain


def test_a_stale_request_can_be_made_again(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        again = proposal(note())
        s.lead()
        assert s.apply(again, term=1).stale
        s.done(again)
        assert s.state.position.events == 4


def test_a_seal_begins_an_epoch_in_which_the_old_header_is_stale(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        members = (Member(id="m1", incarnation="x"),)
        applied = s.apply(Seal(members=members))
        assert applied.sealed is not None
        at = s.state.position
        assert (at.epoch, at.term, at.applied, at.members) == (2, 0, 0, members)
        assert (applied.sealed.chain0, applied.sealed.seq0) == (at.chain, at.seq)
        assert s.apply(note(), epoch=1, term=1).stale
        s.lead()
        s.done(note())
        assert s.state.position.applied == 3


def test_the_next_journal_is_made_before_the_next_epoch_is_committed(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        reader = Reader(tmp_path)
        seen = []
        s.apply(Seal(members=s.state.position.members), before_commit=lambda _: seen.append(reader.cluster().epoch))
        assert (seen, reader.cluster().epoch) == ([1], 2)
        reader.close()


def test_among_several_only_a_seal_is_synced_at_once(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        levels: list[int] = []

        def apply(command: AnyCommand) -> None:
            s.apply(
                command, before_commit=lambda _: levels.extend(s.state._db.execute("PRAGMA synchronous").fetchone())
            )

        full, normal = 2, 1
        apply(note())
        s.state.sync_all(False)
        apply(note())
        apply(Seal(members=s.state.position.members))
        s.lead()
        apply(note())
        assert levels == [full, normal, full, normal]


def test_what_is_held_is_committed_together_and_by_a_seal(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        reader = Reader(tmp_path)
        begun = s.state.position.seq
        s.state.hold()
        s.apply(note())
        s.apply(note())
        assert (s.state.position.seq, reader.cluster().seq) == (begun + 2, begun)
        s.state.commit()
        assert reader.cluster().seq == begun + 2
        s.state.hold()
        s.apply(note())
        s.apply(Seal(members=s.state.position.members))
        assert reader.cluster().seq == begun + 4, "the next epoch's journal hangs on it"
        s.state.commit()
        reader.close()


@pytest.mark.parametrize("members", [(), (Member(id="a", incarnation="1"), Member(id="a", incarnation="2"))])
def test_an_epoch_needs_members(tmp_path: Path, members: tuple[Member, ...]) -> None:
    with scribe(tmp_path) as s:
        assert s.apply(Seal(members=members)).sealed is None
        assert s.state.position.epoch == 1


def test_a_seal_stands_alone(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        applied = s.apply(note(), Seal(members=s.state.position.members))
        assert applied.sealed is None
        assert isinstance(applied.results[1], Rejected)


def test_protocols(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        s.done(SetProtocol(version=1))
        s.rejected(SetProtocol(version=0), "invalid")
        s.done(SetProtocol(version=PROTOCOL))
        with pytest.raises(StateFailed, match=f"protocol {PROTOCOL + 1}, this slum speaks {PROTOCOL}"):
            s.apply(SetProtocol(version=PROTOCOL + 1))


def test_an_entry_of_a_newer_slum_ends_the_process(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        data = msgspec.msgpack.decode(s.entries[-1])
        data["proposals"][0]["command"]["c"] = "FromTheFuture"
        with pytest.raises(StateFailed) as caught:
            s.state.apply(msgspec.msgpack.encode(data))
        assert "install the version" in caught.value.hint


# --- request ids ------------------------------------------------------------------------------------------------------


def test_a_repeated_request_gets_its_first_answer(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        made = proposal(desired(fleet(service("web")), 0))
        first = s.one(made)
        s.done(desired(fleet(service("other")), 1))
        assert s.one(made) == first
        applied = s.apply(made, made)
        assert applied.results == (first, first)
        assert s.state.position.revision == 2


def test_an_id_from_before_the_kept_answers_is_too_old(tmp_path: Path) -> None:
    with scribe(tmp_path, results_kept=5) as s:
        first = proposal(note(), seen=s.state.position.seq)
        s.done(first)
        kept = [proposal(note(), seen=s.state.position.seq + n) for n in range(5)]
        for made in kept:
            s.done(made)
        events = s.state.position.events
        s.rejected(first, "too_old")
        assert s.state.position.events == events
        # The refusal itself is no kept answer, so those that were kept still are.
        for made in kept:
            s.done(made)
        assert s.state.position.events == events


@pytest.mark.parametrize("request_id", ["", "x", "0" * 32, "0" * 31 + ":1", "0" * 32 + ":-1", "0" * 32 + ":999999"])
def test_what_is_no_request_id_is_refused(tmp_path: Path, request_id: str) -> None:
    with scribe(tmp_path) as s:
        s.rejected(msgspec.structs.replace(proposal(note()), request_id=request_id), "invalid")


# --- events -----------------------------------------------------------------------------------------------------------


def test_large_bodies_become_their_size_and_digest(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        s.done(note(after={"text": "x" * 10_000}, why="y" * 5000))
        reader = Reader(tmp_path)
        event = reader.events(newest=True, limit=1)[0]
        assert event.after["too_large"] > 10_000
        assert len(event.why) == 2000
        reader.close()


def test_at_most_200_notes_at_once_and_only_kinds(tmp_path: Path) -> None:
    with scribe(tmp_path) as s:
        events = tuple(NoteEvent(kind="k", subject="s", at=1.0) for _ in range(201))
        s.rejected(Record(events=events), "invalid")
        s.done(Record(events=events[:200]))
        s.rejected(note(kind="Not A Kind"), "invalid")


EVENT_CHANGES = [
    "UPDATE events SET why = 'x' WHERE number = 3",
    "UPDATE events SET service = 'x' WHERE number = 3",
    "UPDATE events SET at = at + 1 WHERE number = 5",
    "DELETE FROM events WHERE number = 4",
    "DELETE FROM events WHERE number = (SELECT max(number) FROM events)",
    "INSERT INTO events SELECT max(number) + 1, seq, at, actor, kind, subject, service, why, before, after, hash FROM events",
]


@pytest.mark.parametrize("change", EVENT_CHANGES)
def test_a_changed_event_is_found(tmp_path: Path, change: str) -> None:
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:
        for _ in range(4):
            s.done(note())
    reader = Reader(tmp_path)
    assert reader.verify().ok
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute(change)
    db.close()
    found = reader.verify()
    reader.close()
    assert not found.ok
    assert found.first_bad is not None
    assert found.why


# --- the same everywhere ----------------------------------------------------------------------------------------------


def play(s: Scribe) -> None:
    """A bit of everything."""
    s.done(desired(fleet(service("web"), service("db")), 0))
    s.apply(note(), note(kind="strange kind"), SetOverride(verb="stop", instances=(("here", "web", "main"),)))
    s.one(desired(fleet(name="other"), 1))
    s.done(intent("a1"))
    s.done(Outcome(action="a1", ok=True, machine_id="i-1"))
    s.apply(Seal(members=s.state.position.members))
    s.apply(note(), term=1, epoch=1)
    s.lead(run="r2")
    s.done(desired(fleet(service("web", memory_limit_mb=1)), 1))
    s.done(intent("d1", kind="destroy"))
    s.apply(Barrier())


def test_the_same_entries_make_the_same_rows(tmp_path: Path) -> None:
    with scribe(tmp_path, "a.db") as s:
        play(s)
        state = new_state(tmp_path / "b.db")
        for number, entry in enumerate(s.entries):
            if number % 5 == 2:
                state.close()
                state = State.open(tmp_path / "b.db")
            state.apply(entry)
        assert state.position == s.state.position
        state.close()
        hashes = []
        for name in ("a.db", "b.db"):
            db = sqlite3.connect(tmp_path / name)
            hashes.append(schema.row_hash(db))
            db.close()
        assert hashes[0] == hashes[1]
        s.done(note())
        db = sqlite3.connect(tmp_path / "a.db")
        assert schema.row_hash(db) != hashes[1]
        db.close()


def test_members_that_disagree_about_an_answer_find_out(tmp_path: Path) -> None:
    with scribe(tmp_path, "a.db") as s:
        s.done(note())
        other = new_state(tmp_path / "b.db", results_kept=0)
        for entry in s.entries:
            other.apply(entry)
        again = msgspec.msgpack.encode(msgspec.msgpack.decode(s.entries[-1]))
        s.state.apply(again)
        other.apply(again)
        assert other.position.chain != s.state.position.chain
        other.close()


@pytest.mark.parametrize(
    "command",
    [
        note(at=float("nan")),
        Record(events=tuple(NoteEvent(kind="k", subject="s", at=at) for at in (1.0, float("nan")))),
        intent("a", deadline_at=float("nan")),
        intent("a", incarnation=2**64 - 1),
        note(after={1: 2, "a": 3}),
        note(before={"a": {None: 1}}),
    ],
)
def test_what_makes_no_sense_is_undone_and_answered(tmp_path: Path, command: Any) -> None:
    with scribe(tmp_path) as s:
        before = s.state.position
        assert "cannot be applied" in s.rejected(command, "invalid").why
        now = s.state.position
        assert (now.events, now.events_hash) == (before.events, before.events_hash)
        s.done(note())


def test_what_makes_no_sense_takes_nothing_with_it_that_came_in_the_same_entry(tmp_path: Path) -> None:
    together, alone = scribe(tmp_path, "a.db"), scribe(tmp_path, "b.db")
    with together as s, alone as other:
        good, bad = note(why="good"), note(at=float("nan"))
        results = s.apply(good, bad, desired(fleet(service("web")), 0), good).results
        assert [type(result).__name__ for result in results] == ["Done", "Rejected", "Done", "Done"]
        for command in (good, bad, desired(fleet(service("web")), 0), good):
            other.apply(command)
        written = "SELECT kind, subject, why FROM events ORDER BY number"
        assert s.state._db.execute(written).fetchall() == other.state._db.execute(written).fetchall()
        assert s.state.position.events == other.state.position.events
        assert s.state.position.results == other.state.position.results


few = st.sampled_from(["a", "b", "here", "web"])
words = few | st.text(max_size=12)
numbers = st.integers(0, 3) | st.integers(-(2**63), 2**64 - 1)
floats = st.sampled_from([1.0, float("nan"), float("inf"), -1e308]) | st.floats()
bodies = st.recursive(
    st.none() | st.booleans() | numbers | floats | words | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | numbers, inner, max_size=3),
    max_leaves=6,
)
keys = st.tuples(words, words, words)
commands = st.one_of(
    st.builds(SetDesired, fleet_zstd=st.binary(max_size=30), digest=words, base_revision=numbers, why=words),
    st.builds(SetOverride, verb=st.sampled_from(["stop", "start", "fly"]), instances=st.tuples(keys)),
    st.builds(
        Intent,
        action=words,
        kind=st.sampled_from(["create", "destroy", "neither"]),
        machine=words,
        tenement=words,
        operator=words,
        incarnation=numbers,
        deadline_at=floats,
        machine_id=words,
    ),
    st.builds(Outcome, action=words, ok=st.booleans(), machine_id=words, error=words),
    st.builds(
        Record,
        events=st.tuples(
            st.builds(
                NoteEvent,
                kind=st.sampled_from(["k", "K"]),
                subject=words,
                at=floats,
                why=words,
                before=bodies,
                after=bodies,
            )
        ),
    ),
    st.builds(Seal, members=st.tuples(), why=words),
    st.builds(SetProtocol, version=st.integers(-5, PROTOCOL)),
    st.builds(PinHost, host=words, key=words | st.just(f"ssh-ed25519 {'AAAAC3NzaC1lZDI1NTE5' + 'A' * 48}")),
    st.builds(ForgetHost, host=words),
)


def test_no_command_can_break_it(tmp_path: Path) -> None:
    """Whatever a client manages to say has an answer, leaves the chain of events whole, and is the same on replay."""
    (tmp_path / "CURRENT").write_text("state.db\n")
    with scribe(tmp_path) as s:

        @settings(max_examples=250, deadline=None)
        @given(st.lists(commands, min_size=1, max_size=3))
        def say(said: list[Any]) -> None:
            s.apply(*said)

        say()
        other = new_state(tmp_path / "other.db")
        for entry in s.entries:
            other.apply(entry)
        assert other.position == s.state.position
        other.close()
    reader = Reader(tmp_path)
    assert reader.verify().ok
    reader.close()
