"""The commands that the ledger can commit, and what each one answers.

An entry is a Header and one to many Proposals; state.apply turns it into rows, results and events, the same on every
member. Time, ids and randomness stand in the header or the command, never come from the member that applies. A command
that cannot be applied yields a Rejected, which is a result like any other. Encoded as msgpack; unknown fields are
ignored, a new command is gated by SetProtocol.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from slum.frozen import Sparse
from slum.model import Fleet

PROTOCOL = 1
ENTRY_BYTES_MAX = 1 << 20
PROPOSAL_BYTES_MAX = ENTRY_BYTES_MAX - 1024
"""The rest is for the entry's header."""
FLEET_BYTES_MAX = 64 << 20
"""Of an unpacked fleet; 10,000 instances take some 3 MB."""
REVISIONS_KEPT = 20
RESULTS_KEPT = 200_000


class Command(Sparse, tag_field="c"):
    pass


# --- what users ask ---------------------------------------------------------------------------------------------------


class SetDesired(Command):
    """Replace the desired fleet. Rejected "conflict" when *base_revision* is not the newest, or the name is another's."""

    fleet_zstd: bytes
    """msgpack of a model.Fleet, zstd-compressed (see pack_fleet)."""
    digest: str
    base_revision: int
    why: str = "apply"


class SetOverride(Command):
    """Stop, start or restart instances: each is (machine, service, id). Rejected "missing" when one is not desired."""

    verb: str
    instances: tuple[tuple[str, str, str], ...]


# --- what the reconciler records --------------------------------------------------------------------------------------


class Intent(Command):
    """Committed before an operator is called. *action* is unique; *key* is the machine's name with its incarnation.

    A destroy intent is irrevocable: that incarnation of the machine is dead for ever. Rejected "fenced" when it is dead,
    or when another leader's open intent on the machine, of another verb or incarnation, has not passed its deadline.
    """

    action: str
    kind: str
    """"create" or "destroy"."""
    machine: str
    """The machine's name in the fleet: "here", "workers-2"."""
    tenement: str
    operator: str
    incarnation: int
    deadline_at: float
    machine_id: str = ""


class Outcome(Command):
    """Committed after the call of intent *action*; an unknown outcome (a time-out) leaves the intent open instead."""

    action: str
    ok: bool
    machine_id: str = ""
    error: str = ""


class NoteEvent(Sparse):
    kind: str
    subject: str
    at: float
    why: str = ""
    before: Any = None
    after: Any = None


class Record(Command):
    """Events that must outlive the leader (what agents noted), batched by the server: at most 200 each."""

    events: tuple[NoteEvent, ...]


# --- what the ledger itself commits -----------------------------------------------------------------------------------


class Barrier(Command):
    """Changes nothing; its seq is a linearizable read point."""


class LeaderStarted(Command):
    """The first entry of each leader; its term fences every older header."""

    member: str
    run: str = ""
    """Random, one a process: a leader that goes on in the next epoch is the same one, a restarted one is not."""


class Member(Sparse):
    id: str
    incarnation: str
    public_key: str = ""
    address: str = ""
    """host:port where the other members find its ledger."""
    front: str = ""
    """host:port where agents, users and the other members' servers find its API."""
    recipient: str = ""
    """Its age recipient: what only this member shall read is encrypted to it."""


class Seal(Command):
    """The last entry of an epoch: the next one starts with *members*."""

    members: tuple[Member, ...]
    why: str = "compaction"


class SetProtocol(Command):
    version: int


AnyCommand = SetDesired | SetOverride | Intent | Outcome | Record | Barrier | LeaderStarted | Seal | SetProtocol


# --- answers ----------------------------------------------------------------------------------------------------------


class Done(Sparse, tag="done", tag_field="r"):
    """Applied at ledger sequence *seq*. *value* depends on the command: SetDesired -> the revision."""

    seq: int
    value: int | None = None


class Rejected(Sparse, tag="rejected", tag_field="r"):
    """Not applied, for good. *code*: "conflict", "missing", "fenced", "too_old", "invalid".

    "stale" (a header of an older leader) never reaches a caller: its leader proposes again, or answers QuorumLost.
    """

    seq: int
    code: str
    why: str
    details: tuple[str, ...] = ()


Result = Done | Rejected


class Proposal(Sparse):
    """One command as a client gives it. *request_id* is ``<32 hex>:<ledger seq that the client last saw>``."""

    command: AnyCommand
    request_id: str
    actor: str


class Header(Sparse):
    """Set by the leader on each entry."""

    generation: int
    epoch: int
    term: int
    member: str
    at: float


class Entry(Sparse):
    header: Header
    proposals: tuple[Proposal, ...]


class LeaderInfo(Sparse):
    member: str | None
    """None while there is no leader."""
    address: str
    is_self: bool
    generation: int
    epoch: int
    term: int
    seq: int


class Ledger(Protocol):
    """All that the rest of slum sees of the ledger. slum.ledger.client.connect(socket) gives one; deadlines in seconds.

    Raises QuorumLost when the deadline passes or there is no leader (safe to repeat with the same request id), and
    Unreachable when the ledger process does not answer.
    """

    async def propose(self, proposal: Proposal, *, deadline_s: float) -> Result:
        """Commit and apply; returns after state.db has it. Repeating a request id gives the first answer again."""
        ...

    async def barrier(self, *, deadline_s: float) -> int: ...

    async def wait(self, seq: int, *, deadline_s: float) -> int:
        """Return the applied seq as soon as it is above *seq*, or *seq* itself when the deadline passes."""
        ...

    async def leader(self) -> LeaderInfo: ...

    async def members(self) -> tuple[Member, ...]: ...


def new_request_id(random_hex: str, seen_seq: int) -> str:
    return f"{random_hex}:{seen_seq}"


def size_problem(encoded_bytes: int) -> str:
    """Return why a proposal of so many bytes fits no entry, or "" when it does."""
    if encoded_bytes <= PROPOSAL_BYTES_MAX:
        return ""
    return f"the command takes {encoded_bytes} bytes compressed, an entry of the ledger holds {PROPOSAL_BYTES_MAX}"


def pack_fleet(fleet: Fleet) -> bytes:
    """Return the fleet as zstd-compressed msgpack, for SetDesired."""
    import zstandard

    return zstandard.ZstdCompressor(level=3).compress(msgspec.msgpack.encode(fleet))


def unpack_fleet(data: bytes) -> Fleet:
    """Return the fleet that pack_fleet packed; raise ValueError when *data* is something else or unpacks too large."""
    import zstandard

    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= FLEET_BYTES_MAX:
            raise ValueError(f"a fleet of {size} bytes; at most {FLEET_BYTES_MAX} are taken")
        raw = zstandard.ZstdDecompressor().decompress(data)
        return msgspec.msgpack.decode(raw, type=Fleet)
    except (zstandard.ZstdError, msgspec.MsgspecError) as error:
        raise ValueError(f"not a packed fleet: {error}") from error
