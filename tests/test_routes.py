"""Routes are symlinks that change atomically and that only slum can write."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from slum.node.routes import Route, Routes, ports_socket
from slum.node.uids import ROUTER_UID
from slum.paths import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    run = tmp_path / "run"
    run.mkdir(mode=0o711)
    return Home(data=tmp_path / "data", run=run)


@pytest.fixture
def routes(home: Home) -> Routes:
    return Routes(home)


def test_the_first_instance_also_gets_the_services_own_name(home: Home, routes: Routes) -> None:
    routes.publish("web", "main", Path("/s/main"), first=True)
    routes.publish("web", "acme", Path("/s/acme"), first=False)
    assert os.readlink(home.routes / "web.sock") == "/s/main"
    assert os.readlink(home.routes / "web" / "acme.sock") == "/s/acme"
    assert routes.published() == (
        Route(service="web", id=None, target=Path("/s/main")),
        Route(service="web", id="acme", target=Path("/s/acme")),
        Route(service="web", id="main", target=Path("/s/main")),
    )


def test_unpublishing_the_first_withdraws_the_services_name_and_repeats_harmlessly(home: Home, routes: Routes) -> None:
    routes.publish("web", "main", Path("/s/main"), first=True)
    routes.publish("web", "acme", Path("/s/acme"), first=False)
    routes.unpublish("web", "main")
    routes.unpublish("web", "main")
    assert [route.id for route in routes.published()] == ["acme"]
    routes.unpublish("web", "acme")
    assert routes.published() == ()
    assert os.listdir(home.routes) == []


def test_unpublishing_another_instance_leaves_the_services_name(routes: Routes) -> None:
    routes.publish("web", "main", Path("/s/main"), first=True)
    routes.publish("web", "acme", Path("/s/acme"), first=False)
    routes.unpublish("web", "acme")
    assert routes.target("web") == Path("/s/main")


def test_prune_keeps_what_is_wanted_and_removes_leftovers(home: Home, routes: Routes) -> None:
    routes.publish("web", "main", Path("/s/main"), first=True)
    routes.publish("web", "old", Path("/s/old"), first=False)
    routes.publish("gone", "main", Path("/s/gone"), first=True)
    (home.routes / ".new-web.sock").symlink_to("/s/half")
    (home.routes / "web" / ".new-main.sock").symlink_to("/s/half")
    withdrawn = routes.prune({"web": ["main"]})
    assert {(route.service, route.id) for route in withdrawn} == {("web", "old"), ("gone", None), ("gone", "main")}
    assert sorted(os.listdir(home.routes)) == ["web", "web.sock"]
    assert os.listdir(home.routes / "web") == ["main.sock"]


def test_a_first_instance_that_is_gone_takes_the_services_name_with_it(routes: Routes) -> None:
    routes.publish("web", "main", Path("/s/main"), first=True)
    routes.publish("web", "acme", Path("/s/acme"), first=False)
    routes.prune({"web": ["acme"]})
    assert routes.target("web") is None


def test_a_leftover_of_a_crash_does_not_stop_the_next_publishing(home: Home, routes: Routes) -> None:
    routes.publish("web", "main", Path("/s/1"), first=True)
    (home.routes / ".new-web.sock").symlink_to("/s/half")
    routes.publish("web", "main", Path("/s/2"), first=True)
    assert routes.target("web") == routes.target("web", "main") == Path("/s/2")


def test_a_port_is_the_name_of_the_one_file_beside_the_link(home: Home, routes: Routes) -> None:
    routes.publish_port("old", "main", 8001, first=True)
    routes.publish_port("old", "main", 8002, first=True)
    assert routes.target("old") == routes.target("old", "main") == ports_socket(home)
    assert os.listdir(home.routes / "old.port") == os.listdir(home.routes / "old" / "main.port") == ["8002"]
    assert routes.prune({"old": ["main"]}) == ()
    routes.publish("old", "main", Path("/s/main"), first=True)
    assert sorted(os.listdir(home.routes)) == ["old", "old.sock"]
    routes.publish_port("old", "main", 8002, first=True)
    routes.unpublish("old", "main")
    assert os.listdir(home.routes) == []
    routes.publish_port("old", "main", 8002, first=True)
    routes.prune({})
    assert os.listdir(home.routes) == []


def test_no_folder_means_no_routes(routes: Routes) -> None:
    assert routes.published() == ()
    assert routes.prune({}) == ()
    routes.unpublish("web", "main")


def test_a_relative_target_is_refused(routes: Routes) -> None:
    with pytest.raises(ValueError, match="absolute"):
        routes.publish("web", "main", Path("s/main"), first=True)


def test_a_flip_is_never_seen_half_done(tmp_path: Path, home: Home, routes: Routes) -> None:
    listeners = []
    for name in ("1", "2"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / name))
        listener.listen(512)
        listeners.append(listener)
    routes.publish("web", "main", tmp_path / "1", first=True)
    failed: list[OSError] = []
    done = threading.Event()

    def connect() -> None:
        while not done.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(str(home.routes / "web.sock"))
                except OSError as error:
                    failed.append(error)
                    return
            for listener in listeners:
                listener.setblocking(False)
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    continue

    thread = threading.Thread(target=connect)
    thread.start()
    for number in range(400):
        routes.publish("web", "main", tmp_path / str(1 + number % 2), first=True)
    done.set()
    thread.join()
    for listener in listeners:
        listener.close()
    assert failed == []


@pytest.mark.root
def test_the_router_may_pass_and_nobody_else(home: Home, routes: Routes) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    routes.publish("web", "main", Path("/s/main"), first=True)
    for folder in (home.routes, home.routes / "web"):
        status = folder.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, ROUTER_UID, 0o750)
