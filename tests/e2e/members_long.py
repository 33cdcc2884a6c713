"""More of test_members.py, which takes longer: `make test-members` runs both. All off at once; one goes on alone."""

from __future__ import annotations

from members_support import (
    ALL_HEALTHY,
    MARKS,
    Cluster,
    Host,
    is_whole,
    phases,
    pid_of_hello,
    until,
)

pytestmark = MARKS


def test_all_off_at_once_and_on_again(cluster: Cluster) -> None:
    hosts = [cluster.hosts[name] for name in cluster.members]
    before = pid_of_hello(cluster, cluster.hosts["t1"])
    revision = cluster.slum(hosts[0], "status", "--json").json["revision"]
    cluster.power_off(*hosts)
    cluster.boot(*hosts)
    until(lambda: is_whole(cluster), 40, "a whole cluster")
    assert cluster.slum(hosts[1], "status", "--json").json["revision"] == revision
    until(lambda: phases(cluster, hosts[0]) == ALL_HEALTHY, 30, "all services")
    assert pid_of_hello(cluster, cluster.hosts["t1"]) == before
    for host in hosts:
        cluster.slum(host, "down")
    for host in hosts:
        cluster.slum(host, "up")
    until(lambda: is_whole(cluster), 30, "a whole cluster")


def test_one_goes_on_alone_and_the_fenced_join_again(cluster: Cluster) -> None:
    survivor, *others = [cluster.hosts[name] for name in cluster.members]
    assert survivor.name == "m1"
    revision = cluster.slum(survivor, "status", "--json").json["revision"]
    before = pid_of_hello(cluster, cluster.hosts["t1"])
    refused = cluster.slum(survivor, "server", "recover", "--yes", check=False)
    assert refused.code == 4, refused
    until(lambda: is_whole(cluster), 30, "a whole cluster, unharmed by the refusal")
    cluster.power_off(*others)
    asks = cluster.slum(survivor, "server", "recover", check=False)
    assert (asks.code, "may be lost" in asks.err) == (2, True), asks
    cluster.slum(survivor, "server", "recover", "--yes")
    assert "paused" in cluster.slum(survivor, "status").out
    cluster.slum(survivor, "resume", "--yes", timeout=60)
    assert cluster.slum(survivor, "status", "--json").json["revision"] == revision
    cluster.slum(survivor, "restart", "hello", "--tenement", "m1")
    cluster.boot(*others)

    def is_fenced(host: Host) -> bool:
        ran = cluster.slum(host, "status", "--cluster", check=False, timeout=40)
        return ran.code == 7 and "fenced" in ran.err

    for host in others:
        until(lambda at=host: is_fenced(at), 40, f"{host.name} to say that it is fenced")
        assert list((host.data / "state").glob("replaced-*.jsonl")), "the end of its log is saved"
    cluster.members = [survivor.name]
    for host in others:
        words = ["server", "join", survivor.api, "--token-file", "-", "--address", host.address, "--member", host.name]
        cluster.slum(host, *words, "--yes", input=cluster.token_of(survivor, "member"), timeout=180)
        cluster.members.append(host.name)
    until(lambda: is_whole(cluster), 30, "a whole cluster again")
    until(lambda: phases(cluster, others[0])["t1"] == "healthy", 30)
    assert pid_of_hello(cluster, cluster.hosts["t1"]) == before
