"""Machines of a cloud, from `slum apply` to a service that answers: real control plane, agents and TLS; the provider is a fake.

A machine that the provider makes boots here: it joins with what it was given (cloud-init's words, or the environment of the
image), in folders of its own.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e_site import Ran, Site, free_port, until
from fakes.fly import FakeFly
from fakes.hetzner import FakeHetzner

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]
OPERATORS = {
    "hetzner": 'type = "hetzner"\nlocation = "fsn1"\nserver_type = "cx23"',
    "fly": 'type = "fly"\norg = "mine"\nregion = "iad"\nimage = "registry.fly.io/slum:1"',
}
SLUM = (sys.executable, "-m", "slum.cli.main")


@dataclass
class Booted:
    """A machine that the provider made. *token* is what it was given, for looking whether anybody let it out."""

    data: Path
    run: Path
    token: str
    env: dict[str, str]
    joining: subprocess.Popen[bytes]

    def slum(self, *args: str) -> Ran:
        done = subprocess.run([*SLUM, *args], env=self.env, capture_output=True, text=True, timeout=60)
        return Ran(done.returncode, done.stdout, done.stderr)

    def end(self) -> None:
        if self.joining.poll() is None:
            self.joining.kill()
        self.joining.wait()
        self.slum("down", "--services")
        shutil.rmtree(self.data, ignore_errors=True)
        shutil.rmtree(self.run, ignore_errors=True)


@dataclass
class Hall:
    """Where the provider's machines stand."""

    booted: dict[str, Booted] = field(default_factory=dict)
    gone: list[threading.Thread] = field(default_factory=list)

    def boot(self, name: str, given: Any) -> None:
        here = secrets.token_hex(4)
        data, run = Path(f"/tmp/slum-h-{here}"), Path(f"/tmp/sh{here}")
        data.mkdir()
        env = {"PATH": os.environ["PATH"], "SLUM_DATA_DIR": str(data), "SLUM_RUN_DIR": str(run), "NO_COLOR": "1"}
        if isinstance(given, dict):
            argv: list[str] = [*SLUM, "join"]
            env |= {key: value for key, value in given.items() if key.startswith("SLUM_")}
            token = given["SLUM_JOIN_TOKEN"]
        else:
            document = yaml.safe_load(given)
            token = document["write_files"][0]["content"]
            _sh, _flags, _script, _name, _version, server, machine = document["runcmd"][0]
            file = data / "token"
            file.write_text(token)
            argv = [*SLUM, "join", server, "--tenement", machine, "--token-file", str(file)]
        with (data / "join.log").open("wb") as out:
            joining = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.booted[name] = Booted(data, run, token, env, joining)

    def end(self, name: str) -> None:
        if (machine := self.booted.pop(name, None)) is not None:
            thread = threading.Thread(target=machine.end, name=f"end {name}")
            self.gone.append(thread)
            thread.start()

    def close(self) -> None:
        for name in tuple(self.booted):
            self.end(name)
        for thread in self.gone:
            thread.join()


@dataclass
class Cloud:
    site: Site
    fake: FakeHetzner | FakeFly
    hall: Hall
    port: int
    provider: str

    def fleet(self, *, with_far: bool = True, version: str = "v1") -> None:
        app = Path(__file__).parent / "apps" / "echo"
        far = f'''
[tenement.far]
operator = "eu"
[tenement.far.routing]
listen = ["127.0.0.1:{self.port}"]
[tenement.far.service.web]
source = "{app}"
command = "python3 app.py"
health = "/healthz"
isolation = "process"
env = {{ VERSION = "{version}" }}
'''
        text = f'[fleet]\nname = "test"\n[operators.eu]\n{OPERATORS[self.provider]}\n'
        (self.site.folder / "slum.toml").write_text(text + (far if with_far else ""))

    def answer(self) -> str:
        return answer_of(self.port)

    def machines(self) -> list[tuple[str, str, str]]:
        return [(m["name"], m["state"], m["drift"]) for m in self.site.slum("machines", "--json").json]


def answer_of(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/", headers={"Host": "web.localhost"})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def open_to_others(site: Site) -> None:
    """Start the site's control plane so that machines elsewhere can join."""
    ports = (f"--api-port={free_port()}", f"--ledger-port={free_port()}")
    key = str(site.folder / "recovery.key")
    site.slum(
        "server", "init", "--address=127.0.0.1", "--listen=127.0.0.1", *ports, "--recovery-key-file", key, "--yes"
    )


@pytest.fixture(params=sorted(OPERATORS))
def cloud(request: pytest.FixtureRequest, site: Site) -> Iterator[Cloud]:
    with ExitStack() as stack:
        fake: FakeHetzner | FakeFly = FakeHetzner() if request.param == "hetzner" else FakeFly()
        hall = Hall()
        fake.on_boot, fake.on_end = hall.boot, hall.end
        url = stack.enter_context(fake.serving())
        stack.callback(hall.close)
        open_to_others(site)
        names = {"hetzner": ("HCLOUD_TOKEN", "HCLOUD_ENDPOINT"), "fly": ("FLY_API_TOKEN", "FLY_FLAPS_BASE_URL")}
        token, endpoint = names[request.param]
        for name, value in ((token, fake.token), (endpoint, f"{url}/v1" if request.param == "hetzner" else url)):
            done = subprocess.run(
                [*SLUM, "secret", "set", name, "--operator"], env=site.env, input=value, text=True, capture_output=True
            )
            assert done.returncode == 0, done.stderr
        yield Cloud(site, fake, hall, free_port(), request.param)


def test_a_machine_is_made_joins_serves_is_drained_and_goes(cloud: Cloud) -> None:
    site = cloud.site
    cloud.fleet()
    site.slum("apply", "--yes", timeout=120)
    assert cloud.answer().startswith("v1")
    until(lambda: cloud.machines() == [("far", "created", "")], 30)
    assert len(cloud.fake.alive()) == 1
    calls = cloud.fake.mutations()
    assert "nothing to do" in site.slum("apply", "--yes").out
    assert cloud.fake.mutations() == calls

    # Everything that is done on a machine here is done there.
    cloud.fleet(version="v2")
    site.slum("apply", "--yes")
    assert cloud.answer().startswith("v2")
    assert "serving v2" in site.slum("logs", "web").out
    assert site.slum("exec", "web", "--", "echo", "from afar").out.strip() == "from afar"
    site.slum("drain", "far")
    until(lambda: _refused(cloud), 10)
    site.slum("drain", "far", "--undo")
    assert cloud.answer().startswith("v2")

    # The control plane ends; what runs goes on, and comes back to it.
    for name in ("server", "ledger", "front"):
        os.kill(site.pid(name), signal.SIGKILL)
    assert cloud.answer().startswith("v2")
    until(lambda: site.slum("status", "--json").json["tenements"][0]["state"] == "ready", 30)

    _look_for_secrets(cloud)
    cloud.fleet(with_far=False)
    site.slum("apply", "--yes", timeout=120)
    until(lambda: not cloud.fake.alive() and cloud.machines() == [], 60)
    assert cloud.hall.booted == {}


@pytest.mark.long
@pytest.mark.parametrize("cloud", ["hetzner"], indirect=True)
def test_a_machine_that_was_deleted_by_hand_shows_as_drift_and_is_made_again(cloud: Cloud) -> None:
    site = cloud.site
    cloud.fleet()
    site.slum("apply", "--yes", timeout=120)
    until(lambda: cloud.machines() == [("far", "created", "")], 30)
    (name,) = cloud.fake.alive()
    cloud.fake.remove_server(name)
    os.kill(site.pid("server"), signal.SIGKILL)  # the next one looks at once, this one when half a minute is over
    until(lambda: len(site.slum("events", "--json", "--kind", "machine_created").json) == 2, 60)
    until(lambda: cloud.answer().startswith("v1"), 60)
    assert (list(cloud.fake.alive()), cloud.machines()) == ([name], [("far", "created", "")])


def test_a_machine_that_somebody_else_makes_joins_with_a_token_and_is_given_its_services(site: Site) -> None:
    open_to_others(site)
    hall, port = Hall(), free_port()
    app = Path(__file__).parent / "apps" / "echo"
    service = f'source = "{app}"\ncommand = "python3 app.py"\nhealth = "/healthz"\nisolation = "process"\n'
    service += 'env = { VERSION = "v1" }\n'
    (site.folder / "slum.toml").write_text(
        '[fleet]\nname = "test"\n[operators.others]\ntype = "join"\n[tenement.far]\noperator = "others"\n'
        f'[tenement.far.routing]\nlisten = ["127.0.0.1:{port}"]\n[tenement.far.service.web]\n{service}'
    )
    try:
        site.slum("apply", "--yes", "--no-wait")
        until(lambda: site.slum("machines", "--json").json, 10)
        made = site.slum("token", "new", "node", "far", "--json").json
        hall.boot("far", {"SLUM_SERVER": made["servers"][0], "SLUM_MACHINE": "far", "SLUM_JOIN_TOKEN": made["token"]})
        assert "nothing to change" in site.slum("apply", "--yes", timeout=90).out
        assert answer_of(port).startswith("v1")
        assert [(m["id"], m["drift"]) for m in site.slum("machines", "--json").json] == [("node:far.1", "")]
    finally:
        hall.close()


def _refused(cloud: Cloud) -> bool:
    return not cloud.answer().startswith("v")


def _look_for_secrets(cloud: Cloud) -> None:
    """Neither the provider's token nor a join token is in any file but where it belongs, nor in an argument list."""
    site = cloud.site
    (machine,) = cloud.hall.booted.values()
    found: list[str] = []
    for needle in (cloud.fake.token, machine.token.partition("::")[2]):
        for folder in (site.data, site.run, machine.data, machine.run):
            files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("env", "token"))
            found += [str(path) for path in files if needle.encode() in path.read_bytes()]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if needle.encode() in words:
                found.append(words.decode(errors="replace"))
    events = json.dumps(site.slum("events", "--json", "--last", "1000").json)
    assert cloud.fake.token not in events
    assert found == []
