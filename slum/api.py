"""What the HTTP API says, as types: shared by the server's route table, its OpenAPI page and the client.

JSON, snake_case, times in unix seconds (UTC). Errors are ``{"error": Problem}`` with the HTTP status of STATUS. Every
mutation takes a request id (see ledger), so that a client may repeat it safely. Server-sent events carry one JSON
document each; an event's id is its number, so that Last-Event-ID resumes.
"""

from __future__ import annotations

from typing import Any

from slum.frozen import Frozen
from slum.model import Fleet, Stamp
from slum.wire import InstanceReport, LevelStatus, Override

STATUS: dict[str, int] = {
    "internal": 500,
    "bad_input": 400,
    "conflict": 409,
    "operator": 502,
    "unreachable": 504,
    "no_quorum": 503,
    "unhealthy": 500,
}
"""HTTP status for each SlumError.code; the client raises the same class again."""


class Problem(Frozen):
    code: str
    message: str
    hint: str = ""
    details: tuple[str, ...] = ()
    """ConfigError.problems or Conflict.changes."""
    lasting: bool = False
    """QuorumLost.lasting: another member may answer otherwise, this one will not soon."""


class MemberView(Frozen):
    id: str
    role: str
    """"leader", "follower", "down", "learner", "fenced"."""
    address: str = ""
    lag: int = 0
    contact_s: float | None = None
    certificate_s: float | None = None


class LedgerView(Frozen):
    cluster: str
    generation: int
    epoch: int
    term: int
    seq: int
    leader: str | None
    members: tuple[MemberView, ...]
    majority: bool = True
    """False while the member that answers reaches no majority: nothing can be changed from here."""
    age_s: float = 0.0
    """How old what it knows may be: since it last heard a leader."""
    silent_s: float | None = None
    """None while the ledger process answers; else since when it has not: all that is shown may be so old, no change possible."""


class TenementView(Frozen):
    """One machine of the fleet as the control plane sees it."""

    name: str
    tenement: str
    """The [tenement.X] it belongs to (same as name when count is 1)."""
    operator: str
    state: str
    """"pending", "creating", "joining", "ready", "drained", "unknown", "draining", "destroying"."""
    machine: str = ""
    detail: str = ""
    stamp: Stamp = Stamp()
    version: str = ""
    host: str = ""
    contact_s: float | None = None
    levels: tuple[LevelStatus, ...] = ()
    limits: str = ""
    cpus: int = 0
    memory_bytes: int = 0
    load: float = 0.0
    memory_available_bytes: int = 0
    agent_rss_bytes: int = 0
    instances: int = 0


class Status(Frozen):
    version: str
    fleet: str
    domain: str
    revision: int
    pid: int
    data_dir: str
    started_at: float
    now: float
    ledger: LedgerView
    tenements: tuple[TenementView, ...] = ()
    counts: dict[str, int] = {}
    """Instances by phase."""
    paused: str = ""
    """Why machines and services are left as they are since a restore, until `slum resume`; empty when they are not."""


class InstanceView(Frozen):
    """A row of `slum ps`: the report, and where it is. *stale_s* is set when its agent is not connected."""

    tenement: str
    isolation: str
    report: InstanceReport
    stale_s: float | None = None


class MachineView(Frozen):
    """A machine that an operator has, or that the ledger says it should have."""

    name: str
    """Its name in the fleet; of a stray, what its label says."""
    tenement: str
    operator: str
    id: str
    """The provider's; empty while it is not known."""
    incarnation: int = 0
    """0 for a stray."""
    state: str = ""
    """As the ledger has it: "creating", "created", "failed", "destroying"; empty for a stray."""
    drift: str = ""
    """"gone" (made, but its operator does not see it), "left" (destroyed, but still seen), "stray" (carries our label, was
    never asked for), or empty."""
    created_at: float | None = None
    """Unix seconds."""
    seen_s: float | None = None
    """How long ago its operator was asked; None when it did not answer."""
    detail: str = ""


class HostKey(Frozen):
    """The key that a host with SSH is known by to the fleet."""

    host: str
    """As in the ids of machines: "203.0.113.9:22"."""
    key: str
    """"ssh-ed25519 AAAA..."; empty when it was forgotten: the next one that the host shows is pinned."""
    fingerprint: str
    at: float
    """Since when, unix seconds."""
    actor: str


class Forgotten(Frozen):
    """Committed: the next key that a host shows is the one that is believed from then on."""

    seq: int
    host: str


class PauseStep(Frozen):
    """One thing that would be done on `resume`. *what*: "create", "destroy", "start", "change", "stop", "leave"."""

    what: str
    machine: str
    service: str = ""
    id: str = ""
    detail: str = ""


class PauseView(Frozen):
    """Whether machines and services are left as they are, since when and why, and what resuming would do to them."""

    paused: bool
    since: float = 0.0
    actor: str = ""
    why: str = ""
    steps: tuple[PauseStep, ...] = ()
    waiting: tuple[str, ...] = ()
    """What has not been seen yet, so that the steps may be more: operators, machines whose agents have not reported."""


class ResumeRequest(Frozen):
    request_id: str
    host: str = ""


class Resumed(Frozen):
    seq: int
    changed: bool
    """False when it was not paused."""


class FleetCheck(Frozen):
    """What the operators' providers say to a fleet that is not applied yet."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """Providers that could not be asked."""


class Revision(Frozen):
    revision: int
    at: float
    actor: str
    why: str
    summary: str
    digest: str


class FleetDoc(Frozen):
    revision: int
    fleet: Fleet
    digest: str = ""
    at: float = 0.0
    actor: str = ""


class State(Frozen):
    """What a plan is made from: the desired fleet and what is known to run. One consistent answer."""

    revision: int
    fleet: Fleet
    seq: int
    tenements: tuple[TenementView, ...] = ()
    instances: tuple[InstanceView, ...] = ()
    overrides: dict[str, tuple[Override, ...]] = {}
    """By machine name."""


class ApplyRequest(Frozen):
    fleet: Fleet
    base_revision: int
    request_id: str
    why: str = "apply"
    host: str = ""
    """The name of the machine that the request comes from, for the event's actor."""


class Applied(Frozen):
    revision: int
    seq: int
    changed: bool
    """False when the fleet was the same: nothing was committed."""


class ActionRequest(Frozen):
    """stop, start or restart *service*, where *id* and *tenement* narrow it; or drain or undrain *tenement* as a whole."""

    verb: str
    request_id: str
    service: str = ""
    id: str | None = None
    tenement: str | None = None
    host: str = ""


class Acted(Frozen):
    seq: int
    instances: tuple[str, ...]
    """"tenement/service/id" of each instance concerned."""


class Event(Frozen):
    """One entry of the audit trail. *before* and *after* are small JSON documents; env values appear as digests."""

    seq: int
    """Of the ledger entry; several events may share one."""
    number: int
    """Counts events from 1 without gaps: the cursor for `after`."""
    at: float
    actor: str
    kind: str
    """snake_case, past: fleet_applied, service_changed, instance_failed, machine_created, leader_started, ..."""
    subject: str
    """What it is about: "service:notes", "instance:here/notes/main", "tenement:here", "member:m1"."""
    why: str = ""
    before: Any = None
    after: Any = None
    hash: str = ""


class Verified(Frozen):
    ok: bool
    events: int
    seq: int
    first_bad: int | None = None
    why: str = ""


class Progress(Frozen):
    """One step of an apply, as SSE: *what* is "tenement" or "instance"; the stream ends with what = "done".

    done: *ok* tells whether all is as asked; *failed* names what is not.
    """

    what: str
    name: str = ""
    """Tenement machine, or tenement/service/id."""
    service: str = ""
    state: str = ""
    detail: str = ""
    took_s: float = 0.0
    ok: bool = True
    final: bool = False
    """True when this one needs no more waiting."""
    serving: int | None = None
    logs: tuple[str, ...] = ()
    """Last log lines of the failed generation."""
    failed: tuple[str, ...] = ()


class LogLine(Frozen):
    tenement: str
    service: str
    id: str
    at: float
    text: str


class Explanation(Frozen):
    """Everything known about one service, for `slum explain`."""

    service: str
    instances: tuple[InstanceView, ...]
    events: tuple[Event, ...]
    """Oldest first: of the service, its instances and its tenement; at most 50."""
    logs: tuple[LogLine, ...]
    """The last lines of the generations that are not well; at most 20."""
    desired: str = ""
    """"revision 2, release ab12..., by root@laptop at ..."; empty when the service is not declared."""


# --- who may come in --------------------------------------------------------------------------------------------------


class Authority(Frozen):
    """What anybody may know: the certificate (PEM) that every other one of this cluster is signed by."""

    certificate: str
    cluster: str


class MemberOffer(Frozen):
    """A member as the others must know it; who joins says it of itself. As slum.ledger.commands.Member."""

    id: str
    incarnation: str
    public_key: str
    address: str
    recipient: str
    api: str = ""


class JoinRequest(Frozen):
    """A join token's secret (what stands after ``::``), and a certificate request for a key that was made here."""

    secret: str
    csr: str
    """PEM, PKCS #10; only its key is looked at."""
    host: str = ""
    """The name of the machine that asks, for the event's actor."""
    member: MemberOffer | None = None
    """With a member's token."""

    def __repr__(self) -> str:
        """Without the secret, wherever it is shown by accident."""
        return f"JoinRequest(host={self.host!r})"


class JoinAnswer(Frozen):
    """A certificate and what goes with it. The same token and key give the same one again."""

    kind: str
    """"node", "member" or "user"."""
    subject: str
    """Of the certificate: "node/MACHINE/KEY", "member/ID", "user/NAME"."""
    cluster: str
    certificate: str
    ca: str
    not_after: float
    servers: tuple[str, ...] = ()
    """Where the API is reached: "https://host:port", verified as the name "slum.internal"."""
    role: str = ""
    """A user's: "admin" or "read"."""
    machine: str = ""
    """A node's machine name; it is also what its agent calls its tenement."""
    key: str = ""
    """A node's "machine.incarnation"."""
    tenement: str = ""
    """The [tenement.X] that the machine is one of, as far as the fleet says so now."""
    fleet: str = ""
    members: tuple[MemberOffer, ...] = ()
    """The members of now, for one that joins them."""


class RenewRequest(Frozen):
    """The certificate of now, expired or not, and a request that proves that its key is here."""

    certificate: str
    csr: str
    host: str = ""


class TokenRequest(Frozen):
    """*subject*: a user's name; a machine's name or key ("machine.incarnation"); a member's id, or "" for any.

    Sent again it makes another token: the first one's secret was said once, and it expires.
    """

    kind: str
    subject: str = ""
    role: str = ""
    ttl_s: float = 3600.0
    host: str = ""


class NewToken(Frozen):
    """The only time that a token is said: the ledger keeps a hash of its secret."""

    id: str
    token: str
    kind: str
    subject: str
    expires_at: float
    servers: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"NewToken(id={self.id!r})"


class TokenView(Frozen):
    id: str
    kind: str
    subject: str
    role: str
    state: str
    """"open", "used" or "expired"."""
    made_at: float
    made_by: str
    expires_at: float
    used_at: float = 0.0


class CertificateView(Frozen):
    """*state*: "valid", "expired" or "revoked"."""

    serial: str
    subject: str
    role: str
    state: str
    made_at: float
    not_after: float


class UserView(Frozen):
    """A user by name, with every certificate on record; *role* is that of the newest valid one, "" without one."""

    name: str
    role: str
    certificates: tuple[CertificateView, ...]


class RevokeRequest(Frozen):
    """*subject* ("user/ana", "node/workers-1", "member/m2") or *serial*. What is revoked already is 404."""

    subject: str = ""
    serial: str = ""
    why: str = ""
    host: str = ""


class Revoked(Frozen):
    seq: int
    certificates: int
    """How many were revoked; unused tokens of the subject went too."""


# --- several members --------------------------------------------------------------------------------------------------


class ClusterMember(Frozen):
    """One member of the control plane as the one that answers knows it; None is: not known."""

    id: str
    role: str
    """"leader", "follower", "learner" (follows, has no vote), "down", "fenced" (of a generation that was replaced), "refused"."""
    address: str
    api: str = ""
    epoch: int | None = None
    seq: int | None = None
    lag: int | None = None
    """Entries that it lacks."""
    contact_s: float | None = None
    """How long ago it was last heard; 0 for the one that answers."""
    clock_off_s: float | None = None
    protocol: int | None = None
    certificate_s: float | None = None
    """How long its front's certificate is still good; negative when it has expired."""
    followed: bool = False
    """Whether what its agents say is heard here."""


class ClusterAlarm(Frozen):
    """Something that somebody should look at; docs/ledger.md lists the kinds."""

    kind: str
    member: str
    why: str
    hint: str = ""


class ClusterView(Frozen):
    """How the control plane stands, as one member sees it."""

    member: str
    """The one that answers."""
    cluster: str
    role: str
    leader: str | None
    generation: int
    epoch: int
    term: int
    seq: int
    age_s: float
    """How old what this member knows may be: since it last heard a leader."""
    majority: bool
    """Whether changes can be committed from here."""
    protocol: int
    members: tuple[ClusterMember, ...]
    alarms: tuple[ClusterAlarm, ...] = ()


class MembersRequest(Frozen):
    """Add a member that joined with a token (it asks itself), or remove one: one of the two."""

    add: MemberOffer | None = None
    remove: str | None = None
    host: str = ""


class MembersChanged(Frozen):
    members: tuple[str, ...]
    """Who votes from now on."""
