"""The journal: what was synced is there after any crash, what was not is cut, and damage is never taken for either."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_support import flip

from slum.errors import InvariantError
from slum.ledger import frames, journal
from slum.ledger.frames import JournalId
from slum.ledger.journal import Journal, create, open_journal
from slum.ledger.refusal import Damaged, Refusal

ID = JournalId(cluster="c", generation=1, epoch=2, lineage="l", salt=b"saltsalt")
ROOM = 1 << 12

Model = tuple[list[tuple[bytes, int, int]], int, str | None]


def new(path: Path) -> Journal:
    return create(path, ID, ROOM)


def content(log: Journal) -> Model:
    return list(log[0:]), log.getCurrentTerm(), log.getVotedForNodeId()


def fill(log: Journal, count: int, size: int = 40, term: int = 1) -> None:
    for _ in range(count):
        log.add(bytes([65 + len(log) % 20]) * size, len(log) + 1, term)


def small_copy(path: Path, end: int) -> bytes:
    """The file's content with little of the zeros behind *end*: these tests write it hundreds of times."""
    return path.read_bytes()[: end + 2048]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.binary(max_size=700)),
        st.tuples(st.just("cut"), st.integers(0, 8)),
        st.tuples(st.just("vote"), st.sampled_from([None, "m1", "m2"])),
        st.tuples(st.just("commit"), st.integers(1, 9)),
        st.tuples(st.just("sync"), st.none()),
        st.tuples(st.just("reopen"), st.none()),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(operations)
def test_what_was_synced_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, does: list[tuple[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("j") / "journal"
    log = new(path)
    entries: list[tuple[bytes, int, int]] = []
    term, vote = 0, None
    durable: Model = ([], 0, None)
    for name, value in does:
        if name == "add":
            assert isinstance(value, bytes)
            entries.append((value, len(entries) + 1, term))
            log.add(*entries[-1])
        elif name == "cut":
            assert isinstance(value, int)
            del entries[value:]
            log.deleteEntriesFrom(value)
        elif name == "vote":
            term, vote = term + 1, value
            log.setCurrentTerm(term, vote)  # type: ignore[arg-type]
        elif name == "commit":
            log.setRaftCommitIndex(value)  # type: ignore[arg-type]
        elif name == "sync":
            log.sync()
            durable = (list(entries), term, vote)  # type: ignore[assignment]
        else:
            log.close()
            log = open_journal(path, ROOM)
            entries, term, vote = list(durable[0]), durable[1], durable[2]
            assert not log.torn
        assert content(log) == (entries, term, vote)
        assert len(log) == len(entries)
        if entries:
            assert (log[0], log[-1]) == (entries[0], entries[-1])
            assert list(log[1:3]) == entries[1:3]
            assert list(log[-2:]) == entries[-2:]
    log.close()


@pytest.mark.parametrize("tear", ["short", "zeros"])
def test_a_last_frame_torn_at_any_byte_is_cut(tmp_path: Path, tear: str) -> None:
    path = tmp_path / "journal"
    log = new(path)
    fill(log, 2)
    log.sync()
    before, start = content(log), log.size_bytes
    fill(log, 2, size=200)
    log.setCurrentTerm(5, "m1")
    log.sync()
    after, end = content(log), log.size_bytes
    log.close()
    whole = small_copy(path, end)
    for at in range(start, end + 1):
        path.write_bytes(whole[:at] + (bytes(len(whole) - at) if tear == "zeros" else b""))
        log = open_journal(path, ROOM)
        assert content(log) == (after if at == end else before), at
        if at % 20:
            log.close()
            continue
        # What comes next must not be mixed up with what was cut.
        fill(log, 1, size=3)
        log.sync()
        again = content(log)
        log.close()
        log = open_journal(path, ROOM)
        assert content(log) == again
        log.close()


def test_a_last_frame_that_lacks_whole_sectors_is_cut(tmp_path: Path) -> None:
    """A power cut may keep any of a frame's sectors from the disk, not only the last ones."""
    path = tmp_path / "journal"
    log = new(path)
    fill(log, 1)
    log.sync()
    before, start = content(log), log.size_bytes
    fill(log, 1, size=3000)
    log.sync()
    end = log.size_bytes
    log.close()
    whole = small_copy(path, end)
    first, last = start // frames.SECTOR_BYTES, (end - 1) // frames.SECTOR_BYTES
    for missing in range(1, 1 << (last - first + 1)):
        torn = bytearray(whole)
        for sector in range(first, last + 1):
            if missing & (1 << (sector - first)):
                low, high = max(start, sector * 512), min(end, (sector + 1) * 512)
                torn[low:high] = bytes(high - low)
        path.write_bytes(torn)
        log = open_journal(path, ROOM)
        assert content(log) == before
        assert log.torn == any(torn[start:end])
        log.close()


def test_any_flipped_bit_refuses_with_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    log = new(path)
    for count in (1, 2, 1):
        fill(log, count, size=20)
        log.sync()
    end = log.size_bytes
    log.close()
    whole = small_copy(path, end)
    for offset in [*range(80), *range(frames.HEAD_BYTES - 4, end)]:
        for bit in range(8):
            path.write_bytes(whole)
            flip(path, offset, bit)
            with pytest.raises(Damaged) as caught:
                open_journal(path, ROOM)
            assert "offset" in caught.value.message or "journal of this version" in caught.value.message
            assert "recover" in caught.value.hint
            assert path.stat().st_size == len(whole), "a refusal must change nothing"


def test_a_zeroed_frame_in_the_middle_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    log = new(path)
    ends = []
    for _ in range(3):
        fill(log, 1, size=600)
        log.sync()
        ends.append(log.size_bytes)
    log.close()
    data = bytearray(path.read_bytes())
    data[ends[0] : ends[1]] = bytes(ends[1] - ends[0])
    path.write_bytes(data)
    with pytest.raises(Damaged, match="but frame 3 follows"):
        open_journal(path, ROOM)


def test_content_cannot_pass_for_a_frame(tmp_path: Path) -> None:
    """An entry that holds a copy of a frame, torn after it: still only a torn frame, as frames are salted."""
    path = tmp_path / "journal"
    log = new(path)
    fill(log, 1)
    log.sync()
    before, start = content(log), log.size_bytes
    forged = frames.encode_frame(3, b"", b"another!") + bytes(40)
    log.add(forged * 30, 2, 1)
    log.sync()
    log.close()
    data = bytearray(path.read_bytes())
    data[start + 900 :] = bytes(len(data) - start - 900)
    path.write_bytes(data)
    log = open_journal(path, ROOM)
    assert (content(log), log.torn) == (before, True)
    log.close()


def test_a_journal_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="forget a vote"):
        open_journal(tmp_path / "journal", ROOM)


def test_a_failed_write_is_never_repeated(tmp_path: Path) -> None:
    log = new(tmp_path / "journal")
    fill(log, 1)
    log.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        log.sync()
    with pytest.raises(InvariantError, match="failed write"):
        log.sync()


def test_nothing_compacts_it(tmp_path: Path) -> None:
    log = new(tmp_path / "journal")
    fill(log, 3)
    for attempt in (log.clear, lambda: log.deleteEntriesTo(1)):
        with pytest.raises(InvariantError, match="never compacted"):
            attempt()
    log.close()


def test_only_the_newest_commands_stay_in_memory(tmp_path: Path) -> None:
    log = new(tmp_path / "journal")
    for _ in range(40):
        fill(log, 1, size=100_000)
        log.sync()
    assert log._tail_bytes <= journal.TAIL_BYTES
    assert [len(command) for command, _, _ in log[0:]] == [100_000] * 40
    log.close()
