"""One example of each document that the API takes or gives; shown in the OpenAPI page, held valid by a test."""

from __future__ import annotations

from typing import Any

from slum import __version__, api, wire
from slum.model import Fleet, LocalOperator, Service, Stamp, Tenement
from slum.server.routes_read import Health

_FLEET = Fleet(
    name="quickstart",
    operators=(LocalOperator(name="local"),),
    tenements=(
        Tenement(
            name="here",
            operator="local",
            services=(Service(name="notes", command=("python3", "app.py"), health="/healthz", memory_limit_mb=256),),
        ),
    ),
)
_REPORT = wire.InstanceReport(
    service="notes",
    id="main",
    phase=wire.Phase.HEALTHY,
    release="9f2c" * 16,
    serving=1,
    serving_release="9f2c" * 16,
    health="GET /healthz -> 200 in 2 ms",
    pid=4121,
    since=1795000000.4,
    memory_bytes=21_000_000,
    url="http://notes.localhost:8080",
)
_INSTANCE = api.InstanceView(tenement="here", isolation="namespace", report=_REPORT)
_TENEMENT = api.TenementView(
    name="here",
    tenement="here",
    operator="local",
    state="ready",
    machine="local:m1",
    stamp=Stamp(generation=1, seq=12),
    version=__version__,
    host="box",
    contact_s=0.4,
    instances=1,
)
_LEDGER = api.LedgerView(
    cluster="6f1d0c2a9b3e4f58",
    generation=1,
    epoch=1,
    term=1,
    seq=14,
    leader="m1",
    members=(api.MemberView(id="m1", role="leader"),),
)
_EVENT = api.Event(
    seq=12,
    number=31,
    at=1795000000.1,
    actor="root@laptop",
    kind="service_changed",
    subject="service:notes",
    why="apply",
    before={"memory_limit_mb": 128},
    after={"memory_limit_mb": 256},
    hash="c0ffee" + "0" * 58,
)
_REVISION = api.Revision(
    revision=1, at=1795000000.1, actor="root@laptop", why="apply", summary="1 service added", digest="ab12" * 16
)
_LINE = api.LogLine(tenement="here", service="notes", id="main", at=1795000000.5, text="listening")
_REQUEST_ID = "0f" * 16 + ":12"

_PEM = "-----BEGIN CERTIFICATE-----\nMIIB...\n-----END CERTIFICATE-----\n"
_CSR = "-----BEGIN CERTIFICATE REQUEST-----\nMIHo...\n-----END CERTIFICATE REQUEST-----\n"
_CERTIFICATE = api.CertificateView(
    serial="3dd2e9247984429fef3761547a6a8cc7d40d2c15",
    subject="user/ana",
    role="admin",
    state="valid",
    made_at=1795000000.0,
    not_after=1802776000.0,
)

EXAMPLES: dict[Any, object] = {
    api.Authority: api.Authority(certificate=_PEM, cluster="6f1d0c2a-9b3e-4f58-8a1b-000000000000"),
    api.JoinRequest: api.JoinRequest(secret="q4z7" * 8, csr=_CSR, host="box"),
    api.JoinAnswer: api.JoinAnswer(
        kind="node",
        subject="node/workers-1/workers-1.1",
        cluster="6f1d0c2a-9b3e-4f58-8a1b-000000000000",
        certificate=_PEM,
        ca=_PEM,
        not_after=1802776000.0,
        servers=("https://10.0.0.1:7443",),
        machine="workers-1",
        key="workers-1.1",
        tenement="workers",
        fleet="quickstart",
    ),
    api.RenewRequest: api.RenewRequest(certificate=_PEM, csr=_CSR, host="box"),
    api.TokenRequest: api.TokenRequest(kind="user", subject="ana", role="admin", host="laptop"),
    api.NewToken: api.NewToken(
        id="3f9a01bc",
        token=f"{'ab12' * 16}::{'q4z7' * 8}",
        kind="user",
        subject="ana",
        expires_at=1795003600.0,
        servers=("https://10.0.0.1:7443",),
    ),
    tuple[api.TokenView, ...]: (
        api.TokenView(
            id="3f9a01bc",
            kind="user",
            subject="ana",
            role="admin",
            state="open",
            made_at=1795000000.0,
            made_by="root@box",
            expires_at=1795003600.0,
        ),
    ),
    tuple[api.UserView, ...]: (api.UserView(name="ana", role="admin", certificates=(_CERTIFICATE,)),),
    tuple[api.CertificateView, ...]: (_CERTIFICATE,),
    api.RevokeRequest: api.RevokeRequest(subject="user/ana", why="left", host="laptop"),
    api.Revoked: api.Revoked(seq=15, certificates=1),
    tuple[api.HostKey, ...]: (
        api.HostKey(
            host="203.0.113.9:22",
            key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            fingerprint="SHA256:7nQ6oB0wGWYdBvCTn0mHq1yW1HVKvGGbg8tUeJ9vT4k",
            at=1795000000.0,
            actor="slum@m1",
        ),
    ),
    api.Forgotten: api.Forgotten(seq=15, host="203.0.113.9:22"),
    Health: Health(ok=True, ledger=True),
    api.Status: api.Status(
        version=__version__,
        fleet="quickstart",
        domain="localhost",
        revision=1,
        pid=4100,
        data_dir="/var/lib/slum",
        started_at=1794999990.0,
        now=1795000010.0,
        ledger=_LEDGER,
        tenements=(_TENEMENT,),
        counts={"healthy": 1},
    ),
    api.ClusterView: api.ClusterView(
        member="m1",
        cluster="0a1b2c3d",
        role="leader",
        leader="m1",
        generation=1795000000000,
        epoch=3,
        term=1,
        seq=14,
        age_s=0.0,
        majority=True,
        protocol=1,
        members=(
            api.ClusterMember(
                id="m1",
                role="leader",
                address="10.0.0.1:7444",
                api="10.0.0.1:7443",
                epoch=3,
                seq=14,
                lag=0,
                contact_s=0.0,
                clock_off_s=0.0,
                protocol=1,
                certificate_s=7776000.0,
                followed=True,
            ),
        ),
    ),
    api.MembersRequest: api.MembersRequest(remove="m3", host="laptop"),
    api.MembersChanged: api.MembersChanged(members=("m1", "m2", "m4")),
    api.State: api.State(
        revision=1,
        fleet=_FLEET,
        seq=14,
        tenements=(_TENEMENT,),
        instances=(_INSTANCE,),
        overrides={"here": (wire.Override(service="notes", id="main", restarts=1),)},
    ),
    api.FleetDoc: api.FleetDoc(revision=1, fleet=_FLEET, digest="ab12" * 16, at=1795000000.1, actor="root@laptop"),
    api.ApplyRequest: api.ApplyRequest(fleet=_FLEET, base_revision=0, request_id=_REQUEST_ID, host="laptop"),
    api.Applied: api.Applied(revision=1, seq=12, changed=True),
    api.PauseView: api.PauseView(
        paused=True,
        since=1_800_000_000.0,
        actor="root@m1",
        why="restored sequence 48211 from s3://my-backups/fleet",
        steps=(api.PauseStep(what="stop", machine="here", service="notes", id="main"),),
        waiting=("operator eu has not been seen",),
    ),
    api.ResumeRequest: api.ResumeRequest(request_id=_REQUEST_ID, host="laptop"),
    api.Resumed: api.Resumed(seq=48215, changed=True),
    api.FleetCheck: api.FleetCheck(
        problems=('operators.eu.server_type: "cx21" is not known; there is cx23, cx33, cx43',)
    ),
    Fleet: _FLEET,
    tuple[api.MachineView, ...]: (
        api.MachineView(
            name="here",
            tenement="here",
            operator="local",
            id="local:m1",
            incarnation=1,
            state="created",
            seen_s=2.5,
        ),
    ),
    tuple[api.Revision, ...]: (_REVISION,),
    api.ActionRequest: api.ActionRequest(verb="restart", service="notes", request_id=_REQUEST_ID),
    api.Acted: api.Acted(seq=15, instances=("here/notes/main",)),
    tuple[api.InstanceView, ...]: (_INSTANCE,),
    api.Explanation: api.Explanation(
        service="notes",
        instances=(_INSTANCE,),
        events=(_EVENT,),
        logs=(_LINE,),
        desired="revision 1, release 9f2c9f2c9f2c, by root@laptop at 2026-11-18T12:26:40Z",
    ),
    tuple[api.Event, ...]: (_EVENT,),
    api.Verified: api.Verified(ok=True, events=31, seq=14),
    api.Progress: api.Progress(
        what="instance", name="here/notes/main", service="notes", state="healthy", took_s=0.3, final=True, serving=1
    ),
    api.LogLine: _LINE,
}
