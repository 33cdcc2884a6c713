"""What a store holds and who may write there: the HEAD manifest, claims, and the pure rules about both.

    HEAD.json                     where the backup stands: moved by compare-and-swap only
    claims/<name>/claim.json      made by a create, once: whose the prefix is
    claims/<name>/db/...          what Litestream writes
    blobs/<sha256>                bundles

A claim is one writer's right to one prefix. A leader claims a new one when HEAD is not its own; the former claimant
finds that out at its next move of HEAD, and until then has written below its own prefix only, which nothing names any
more. What HEAD names was uploaded before it moved: blobs first, then the database's segments, then HEAD.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote

import msgspec

from slum.errors import ConfigError
from slum.frozen import Frozen

FORMAT = 1
HEAD = "HEAD.json"
CLAIMS = "claims"
BLOBS = "blobs"
HINT = "is this the right address? If it is, remove the file: the leader's next claim makes it anew"
NOT_JSON = (msgspec.MsgspecError, UnicodeDecodeError)
"""What decoding raises; the second where a name of a field is not UTF-8."""
_CLAIM = re.compile(r"[0-9]{1,18}-[0-9]{6,12}")


class NotReadable(ConfigError):
    """HEAD is there, and is not what slum writes."""


class Span(Frozen):
    """What a claim holds: the ledger's sequence and time, from and to."""

    claim: str
    generation: int
    first_seq: int
    last_seq: int
    first_at: float
    last_at: float


class Verified(Frozen):
    """How the last restore that was tried went."""

    at: float
    seq: int
    ok: bool
    why: str = ""
    hint: str = ""
    took_s: float = 0.0


class Head(Frozen):
    """All up to *seq* is in the store, below *claim*."""

    format: int
    cluster: str
    generation: int
    lineage: str
    claim: str
    member: str
    schema: int
    version: str
    seq: int
    chain: str
    revision: int
    at: float
    txid: int
    """Litestream's number of the transaction that holds *seq*."""
    bytes: int
    rows: str
    """The hash over all rows at *rows_seq*."""
    rows_seq: int
    first_seq: int
    first_at: float
    former: tuple[Span, ...] = ()
    """Claims before this one that still are in the store, oldest first."""
    verified: Verified | None = None

    @property
    def span(self) -> Span:
        return Span(
            claim=self.claim,
            generation=self.generation,
            first_seq=self.first_seq,
            last_seq=self.seq,
            first_at=self.first_at,
            last_at=self.at,
        )

    @property
    def spans(self) -> tuple[Span, ...]:
        return (*self.former, self.span)


class Claim(Frozen):
    """The first object of a prefix. *token* is random: only the process that made it goes on below it."""

    format: int
    cluster: str
    generation: int
    member: str
    token: str
    at: float
    seq: int


def decode_head(data: bytes) -> Head:
    """Return the manifest; NotReadable when it is none, ConfigError when it is of a newer slum."""
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        number = msgspec.json.decode(found.get("format", b"0"), type=int)
        if number > FORMAT:
            raise ConfigError(
                f"the backup has format {number}, this slum knows {FORMAT}", hint="install the slum that wrote it"
            )
        head = msgspec.json.decode(data, type=Head)
    except NOT_JSON as error:
        raise NotReadable(f"{HEAD} in the store is no manifest of slum: {error}", hint=HINT) from error
    strange = next((span.claim for span in head.spans if not _CLAIM.fullmatch(span.claim)), None)
    if strange is not None:
        raise NotReadable(f"{HEAD} in the store names the claim {strange[:60]!r}, which slum never makes", hint=HINT)
    return head


def decode_claim(data: bytes) -> Claim | None:
    """Return what a claim says of itself; None when it cannot be read."""
    try:
        return msgspec.json.decode(data, type=Claim)
    except NOT_JSON:
        return None


def encode(document: Head | Claim) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document))


def why_not(head: Head | None, *, cluster: str, generation: int, lineage: str) -> str:
    """Return why the ledger of these may not write where *head* is, or ""."""
    if head is None:
        return ""
    if head.cluster != cluster:
        return f"the store holds the backup of cluster {head.cluster[:8]}, this is {cluster[:8]}"
    if head.generation > generation:
        return (
            f"generation {head.generation} is backed up there, which has replaced {generation}, the one of this ledger"
        )
    if head.generation == generation and head.lineage != lineage:
        return f"generation {generation} began twice, and the other one is backed up there"
    return ""


def claim_name(generation: int, number: int) -> str:
    return f"{generation}-{number:06d}"


def number_of(claim: str) -> int:
    return int(claim.rpartition("-")[2])


def is_claim(name: str) -> bool:
    return _CLAIM.fullmatch(name) is not None


def order_of(claim: str) -> tuple[int, int]:
    """Return what sorts claims by age; what is none comes first."""
    return (int(claim.partition("-")[0]), number_of(claim)) if is_claim(claim) else (-1, -1)


def next_claim(head: Head | None, generation: int, names: Iterable[str]) -> str:
    """Return the first name of *generation* that is above all that are taken."""
    taken = [number_of(name) for name in names if name.startswith(f"{generation}-")]
    if head is not None and head.generation == generation:
        taken.append(number_of(head.claim))
    return claim_name(generation, max(taken, default=0) + 1)


def former_of(head: Head | None, now: float, keep_s: float) -> tuple[Span, ...]:
    """Return the claims that a new one keeps beside itself: those whose last moment is not older than *keep_s*."""
    return () if head is None else kept(head.spans, now, keep_s)


def kept(spans: tuple[Span, ...], now: float, keep_s: float) -> tuple[Span, ...]:
    return tuple(span for span in spans if now - span.last_at <= keep_s)


def span_for(spans: tuple[Span, ...], *, seq: int | None = None, at: float | None = None) -> Span | None:
    """Return the claim that holds a point; the newest one that does, since a restore may have begun a new history.

    A moment between two claims belongs to the earlier one, whose end it then is.
    """
    for span in reversed(spans):
        if seq is not None and span.first_seq <= seq <= span.last_seq:
            return span
        if at is not None and span.first_at <= at:
            return span
    if seq is not None:
        # Between two claims nothing was backed up: the earlier one's end is the nearest that there is before it.
        return next((span for span in reversed(spans) if span.last_seq < seq), None) if seq <= _end(spans) else None
    return None


def _end(spans: tuple[Span, ...]) -> int:
    return max((span.last_seq for span in spans), default=0)


def prefix_of(claim: str) -> str:
    return f"{CLAIMS}/{quote(claim, safe='')}"
