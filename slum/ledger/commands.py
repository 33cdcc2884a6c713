"""The commands that the ledger can commit, and what each one answers.

An entry is a Header and one to many Proposals; state.apply turns it into rows, results and events, the same on every
member. Time, ids and randomness stand in the header or the command, never come from the member that applies. A command
that cannot be applied yields a Rejected, which is a result like any other. Encoded as msgpack; unknown fields are
ignored, a new command is gated by SetProtocol.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from slum.frozen import Sparse
from slum.model import Fleet

if TYPE_CHECKING:
    from slum.ledger.status import LedgerStatus

PROTOCOL = 2
"""2 has PinHost and ForgetHost."""
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
    """Stop, start or restart instances: each is (machine, service, id). Rejected "missing" when one is not desired.

    Drain and undrain take whole machines: each is (machine, "", ""), and holds for what is declared there later, too.
    """

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


class PinHost(Command):
    """The key that a host with SSH showed first: from then on the only one that is believed. Of protocol 2.

    The key that stands is Done. Rejected "conflict" when another one stands, "invalid" before protocol 2.
    """

    host: str
    """As ids have it: "203.0.113.9:22"."""
    key: str
    """The public key: "ssh-ed25519 AAAA..."."""


class ForgetHost(Command):
    """Believe the next key that a host shows, whatever any member has seen before. Rejected as PinHost is."""

    host: str


# --- who may come in --------------------------------------------------------------------------------------------------


class SetAuthority(Command):
    """The fleet's certificate authority, or its key sealed anew. Rejected "conflict" when *replaces* is not what stands.

    The certificate never changes by this: a fleet that needs another authority begins with it.
    """

    certificate: str
    """PEM, in clear."""
    box: bytes
    """The private key, age-encrypted to *recipients* and to *recovery*."""
    recovery: str
    """The recipient of the recovery key, which nobody's machine holds."""
    recipients: tuple[str, ...]
    """The members', and those of whoever is joining. The box itself does not tell whom it is sealed to."""
    replaces: str = ""
    """sha256 of the box that this one was made from; "" for the first."""


class AddToken(Command):
    """A join token, good for one key, once. *hash* is sha256 of its secret, which the ledger never sees."""

    id: str
    hash: bytes
    kind: str
    """"node", "member" or "user"."""
    subject: str
    """A node's "machine.incarnation", a user's name, a member's id ("": any)."""
    role: str
    """A user's: "admin" or "read"; else ""."""
    expires_at: float


class UseToken(Command):
    """Bind token *id* to a key and note the certificate that was made for it.

    The first key binds; the same key again is Done, however late, and the first certificate stands. Rejected "missing" when
    there is no such token, "invalid" for another key, or when it has expired by the header's time.
    """

    id: str
    key_hash: str
    """sha256 of the public key (SubjectPublicKeyInfo), hex."""
    subject: str
    """As in Certificate: "node/MACHINE/KEY", "member/ID", "user/NAME"."""
    serial: str
    certificate: str
    not_after: float


class RemoveToken(Command):
    """Rejected "missing" when there is no such token."""

    id: str


class NoteCertificate(Command):
    """A certificate that was made without a token: a member's own, or a renewal of one with the same key."""

    serial: str
    subject: str
    role: str
    key_hash: str
    not_after: float


class Revoke(Command):
    """Revoke one certificate, or all of a subject; unused tokens of that subject go too.

    *subject* may name more than one: "node/MACHINE" means all its keys. Rejected "missing" when nothing is found.
    """

    subject: str = ""
    serial: str = ""
    why: str = ""


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
    api: str = ""
    """host:port of its front, where agents, users and the other members' servers reach its API; "" without one."""
    recipient: str = ""
    """The age recipient that the authority's key is sealed to; its identity is the member's `member.age`."""


class Seal(Command):
    """The last entry of an epoch: the next one starts with *members*."""

    members: tuple[Member, ...]
    why: str = "compaction"


class SetProtocol(Command):
    version: int


AnyCommand = (
    SetDesired
    | SetOverride
    | Intent
    | Outcome
    | Record
    | PinHost
    | ForgetHost
    | SetAuthority
    | AddToken
    | UseToken
    | RemoveToken
    | NoteCertificate
    | Revoke
    | Barrier
    | LeaderStarted
    | Seal
    | SetProtocol
)


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

    async def status(self, *, deadline_s: float) -> LedgerStatus:
        """Return how the ledger and its members stand, as this one sees them."""
        ...


def new_request_id(seen_seq: int, random_hex: str = "") -> str:
    """Return the id of a new request of somebody who has seen the ledger at *seen_seq*."""
    return f"{random_hex or secrets.token_hex(16)}:{seen_seq}"


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
