"""Three members and tenements elsewhere, in network namespaces, by the command line alone: made, used, broken and mended.

The tests of this file share one control plane and run in their order; each leaves it whole. members_long.py goes on.
"""

from __future__ import annotations

import pytest
from members_support import (
    ALL_HEALTHY,
    MARKS,
    Cluster,
    is_whole,
    phases,
    pid_of_hello,
    states,
    until,
)

pytestmark = MARKS


def test_every_member_answers_for_all_of_the_fleet(cluster: Cluster) -> None:
    until(lambda: is_whole(cluster), 20, "a whole cluster")
    for name in cluster.members:
        host = cluster.hosts[name]
        until(lambda at=host: phases(cluster, at) == ALL_HEALTHY, 20, f"{name} to have heard of all services")
        until(lambda at=host: set(states(cluster, at).values()) == {"ready"}, 20, "machines that are ready")
    asked = cluster.hosts["m3"]
    for machine in ALL_HEALTHY:
        ran = cluster.slum(asked, "exec", "hello", "--tenement", machine, "-T", "--", "printenv", "SLUM_TENEMENT")
        assert ran.out.strip() == machine
        assert f"{machine}/main" in cluster.slum(asked, "logs", "hello", "--tail", "1").out
    assert "hello" in cluster.slum(asked, "explain", "hello").out
    restarted = cluster.slum(asked, "restart", "hello")
    assert "restarted: hello, hello, hello" in restarted.out


def test_a_killed_leader_costs_no_write_and_no_service(cluster: Cluster) -> None:
    services = {name: pid_of_hello(cluster, cluster.hosts[name]) for name in ALL_HEALTHY}
    leader = cluster.leader()
    cluster.kill(leader, "ledger", "server", "front")
    other = next(cluster.hosts[name] for name in cluster.members if name != leader.name)
    assert cluster.slum(other, "stop", "hello", "--tenement", "m2").code == 0
    assert cluster.slum(other, "start", "hello", "--tenement", "m2").code == 0
    until(lambda: is_whole(cluster), 20, "a whole cluster")
    until(lambda: phases(cluster, leader) == ALL_HEALTHY, 20, "all that runs, as the killed one knows it")
    for name in ("m1", "t1"):
        assert pid_of_hello(cluster, cluster.hosts[name]) == services[name]


def test_a_minority_refuses_at_once_and_says_how_old_it_is(cluster: Cluster) -> None:
    leader = cluster.leader()
    others = [name for name in cluster.members if name != leader.name]
    cluster.cut(leader)
    try:
        assert cluster.leader(among=others).name in others
        until(lambda: cluster.view(leader)["age_s"] > 2, 20, "a while without the others")
        refused = cluster.slum(leader, "restart", "hello", "--tenement", "t1", check=False, timeout=20)
        assert refused.code == 7, refused
        assert "reaches 1 of 3 members" in refused.err
        view = cluster.view(leader)
        assert (view["majority"], view["leader"]) == (False, None)
        assert {row["id"]: row["role"] for row in view["members"] if row["id"] in others} == dict.fromkeys(
            others, "down"
        )
        said = cluster.slum(leader, "status").out
        assert "cut off" in said
        until(lambda: phases(cluster, leader)["t1"] == "unknown", 20, "what is not heard of to be unknown")
        assert cluster.slum(cluster.hosts[others[0]], "restart", "hello", "--tenement", "t1").code == 0
    finally:
        cluster.heal()
    until(lambda: is_whole(cluster), 20, "a whole cluster")
    until(lambda: phases(cluster, leader) == ALL_HEALTHY, 20)


def test_an_agent_goes_to_another_member_when_its_own_is_gone(cluster: Cluster) -> None:
    tenement = cluster.hosts["t1"]
    server = cluster.slum(tenement, "status", "--json").json["connected"]
    own = next(host for host in cluster.hosts.values() if host.api == server)
    before = pid_of_hello(cluster, tenement)
    cluster.power_off(own)
    others = [cluster.hosts[name] for name in cluster.members if name != own.name]
    until(lambda: phases(cluster, others[0])["t1"] == "healthy" and phases(cluster, others[1])["t1"] == "healthy", 30)
    assert cluster.slum(others[0], "exec", "hello", "--tenement", "t1", "-T", "--", "echo", "there").out == "there\n"
    assert pid_of_hello(cluster, tenement) == before
    assert cluster.slum(tenement, "status", "--json").json["connected"] != server
    cluster.boot(own)
    until(lambda: is_whole(cluster), 30, "a whole cluster")
    until(lambda: phases(cluster, own) == ALL_HEALTHY, 30, "the services of the one that was off")


def test_what_is_no_member_token_lets_nobody_in(cluster: Cluster) -> None:
    at, stranger = cluster.hosts["m1"], cluster.host("x1")
    join = ["server", "join", at.api, "--token-file", "-", "--address", stranger.address, "--timeout", "10"]
    token = cluster.token_of(at, "member")
    wrong = {
        "no token": ("hello", 2),
        "an unknown one": (token[:-1] + ("a" if token[-1] != "a" else "b"), 2),
        "one of another fleet": ("0" * 64 + token[64:], 2),
        "a user's": (cluster.token_of(at, "user", "ana", "--role", "read"), 2),
    }
    for what, (text, code) in wrong.items():
        ran = cluster.slum(stranger, *join, "--member", "m9", input=text, check=False)
        assert ran.code == code, (what, ran)
    taken = cluster.slum(stranger, *join, "--member", "m2", input=token, check=False)
    assert taken.code == 2, taken
    assert not (stranger.data / "state" / "CURRENT").exists()
    assert {row["id"] for row in cluster.view(at)["members"]} == set(cluster.members)


@pytest.mark.long
def test_one_that_is_lost_is_replaced_and_another_leaves(cluster: Cluster) -> None:
    lost = cluster.hosts["m3"]
    cluster.power_off(lost)
    ran = cluster.slum(cluster.hosts["m1"], "server", "members", "--replace", "m3")
    assert "--replace m3" in ran.out
    cluster.join(cluster.host("m4"), replace="m3")
    until(lambda: is_whole(cluster), 30, "a whole cluster")
    assert cluster.members == ["m1", "m2", "m4"]
    # Whoever led hands over and goes; the two that stay go on, then one more joins.
    refused = cluster.slum(cluster.hosts["m1"], "server", "leave", "--yes", check=False)
    assert refused.code == 4, refused
    cluster.slum(cluster.hosts["m4"], "server", "leave", "--yes")
    cluster.members.remove("m4")
    until(lambda: is_whole(cluster), 30, "the two that stay")
    assert not (cluster.hosts["m4"].data / "state").exists()
    cluster.join(cluster.host("m5"))
    until(lambda: is_whole(cluster), 30, "a whole cluster")
    events = cluster.slum(cluster.hosts["m1"], "events", "--kind", "certificate_revoked", "--json").json
    assert {event["subject"] for event in events} >= {"member:m3", "member:m4"}
    # The lost one comes back: it does no harm, says so, and one command ends it.
    cluster.boot(lost)
    until(lambda: "removed" in {alarm["kind"] for alarm in cluster.view(lost)["alarms"]}, 30, "m3 to say so")
    refused = cluster.slum(lost, "token", "new", "member", check=False)
    assert (refused.code, "was removed from the members" in refused.err) == (7, True), refused
    refused = cluster.slum(lost, "server", "recover", "--yes", check=False)
    assert (refused.code, "know no such member any more" in refused.err) == (4, True), refused
    cluster.slum(lost, "server", "leave", "--yes")
    assert not (lost.data / "state").exists()
    assert is_whole(cluster)
