"""Terraform's own judgement: fmt, validate and plan by the real binary, HashiCorp's parser, and texts that stay texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from exports_support import HOSTILE, ROOT, Terraform, fleets, hcl2json, lay, run, terraform, tool  # noqa: F401
from hypothesis import HealthCheck, given, settings

from slum.cloudinit import BYTES_MAX, cloud_init, quoted
from slum.exports import hcl
from slum.exports.base import File, Site
from slum.exports.terraform import export_terraform
from slum.fleetfile import load
from slum.model import (
    Fleet,
    FlyOperator,
    HetznerOperator,
    HostKeyPolicy,
    Label,
    SshHost,
    SshOperator,
    Tenement,
)

TOKEN = "0123abcd::s3cret-canary"
VARIABLES: dict[str, object] = {
    "hcloud_token": "h-canary",
    "hcloud_token_1st": "one-canary",
    "hcloud_token_2nd": "two-canary",
    "fly_token": "f-canary",
    "slum_server": "https://slum.example.com",
    "fly_image": "registry.fly.io/slum:1",
    "ssh_public_keys": {"laptop": "ssh-ed25519 AAAA me"},
    "admin_cidrs": ["203.0.113.0/24"],
}


def example() -> Fleet:
    return load(ROOT / "slum.toml.example").fleet


def tokens(fleet: Fleet) -> dict[str, str]:
    return {machine: TOKEN for tenement in fleet.tenements for machine in tenement.machine_names}


def write(folder: Path, fleet: Fleet, **site: Any) -> Path:
    return lay(folder, export_terraform(fleet, Site(version="0.1.0", **site)).files)


def planned(terraform: Terraform, folder: Path, fleet: Fleet) -> dict[str, Any]:  # noqa: F811
    """Return address -> planned values of all resources."""
    terraform(folder, "get")
    terraform(folder, "validate")
    variables = VARIABLES | {"join_tokens": tokens(fleet)}
    plan = folder / "plan.out"
    terraform(folder, "plan", "-input=false", "-refresh=false", f"-out={plan}", variables=variables)
    shown = json.loads(terraform(folder, "show", "-json", str(plan)))
    found: dict[str, Any] = {"": shown}
    for module in shown["planned_values"]["root_module"].get("child_modules", ()):
        found |= {resource["address"]: resource["values"] for resource in module["resources"]}
    return found


def many() -> Fleet:
    """Several accounts, more than ten machines, labels, names that start with a digit, texts that want to be templates."""
    hosts = (
        SshHost(host="2001:db8::1", port=2222, labels=(Label(name="disk", value="nvme"),)),
        SshHost(host="h.example.com"),
    )
    return Fleet(
        name="shop",
        operators=(
            HetznerOperator(
                name="1st", location="ash", server_type="cpx22", ssh_keys=('a"${x}%{y}\\b', "ops"), token_env="ONE"
            ),
            HetznerOperator(
                name="2nd", location="fsn1", server_type="cx23", token_env="TWO", secrets_ref="file:/etc/t"
            ),
            FlyOperator(name="fly", org="o", region="iad", image="registry.fly.io/x:1"),
            SshOperator(name="vps", hosts=hosts, key="/k/$${x}%%{", jump="a@b:22", host_key=HostKeyPolicy.ACCEPT_NEW),
        ),
        tenements=(
            Tenement(
                name="a-b",
                operator="1st",
                count=12,
                routing_listen=("0.0.0.0:80", "[::]:443"),
                labels=(Label(name="tier", value="x"),),
            ),
            Tenement(name="b", operator="2nd"),
            Tenement(name="c", operator="fly", routing_listen=("0.0.0.0:8080",)),
            Tenement(name="d", operator="vps"),
        ),
    )


def test_the_real_terraform_formats_validates_and_plans_the_example(terraform: Terraform, tmp_path: Path) -> None:  # noqa: F811
    fleet = example()
    folder = write(tmp_path, fleet)
    terraform(folder, "fmt", "-check", "-recursive", "-diff")
    found = planned(terraform, folder, fleet)
    server = found['module.hetzner-eu.hcloud_server.this["workers-2"]']
    assert (server["name"], server["location"], server["server_type"]) == ("example-workers-2", "fsn1", "cx23")
    assert server["labels"] == {"slum-fleet": "example", "slum-tenement": "workers", "slum-machine": "workers-2"}
    assert found['module.fly-prod.fly_machine.this["api-prod"]']["guest"][0]["memory_mb"] == 512
    assert found['module.vps.terraform_data.host["203.0.113.8:2222"]']["input"]["user"] == "deploy"
    assert 'module.hetzner-eu.hcloud_placement_group.this["workers-1"]' in found


def test_accounts_chunks_ports_and_hostile_texts_in_a_plan(terraform: Terraform, tmp_path: Path) -> None:  # noqa: F811
    fleet = many()
    folder = write(tmp_path, fleet)
    found = planned(terraform, folder, fleet)
    server = found['module._1st.hcloud_server.this["a-b-12"]']
    assert server["ssh_keys"] == ['a"${x}%{y}\\b', "ops", "laptop"]
    assert server["network"][0]["alias_ips"] == []
    groups = [address for address in found if "placement_group" in address]
    assert groups == [
        'module._1st.hcloud_placement_group.this["a-b-1"]',
        'module._1st.hcloud_placement_group.this["a-b-2"]',
    ]
    rules = found['module._1st.hcloud_firewall.this["a-b"]']["rule"]
    assert sorted(str(rule["port"]) for rule in rules) == ["22", "443", "80", "None"]
    assert found["module._1st.hcloud_network_subnet.this"]["network_zone"] == "us-east"
    assert found['module.fly.fly_machine.this["c"]']["service"][0]["internal_port"] == 8080
    outputs = found[""]["planned_values"]["outputs"]
    assert "vps" in outputs
    whole = (folder / "main.tf").read_text()
    assert '"/k/$\\u0024{x}%\\u0025{"' in whole


def test_machines_that_exist_are_taken_over(terraform: Terraform, tmp_path: Path) -> None:  # noqa: F811
    fleet = example()
    folder = write(
        tmp_path, fleet, machines={"workers-1": "4711", "workers-2": "a-name", "api-prod": "example-api-prod/148ed"}
    )
    terraform(folder, "fmt", "-check", "-recursive", "-diff")
    terraform(folder, "get")
    terraform(folder, "validate")
    text = (folder / "imports.tf").read_text()
    assert 'to = module.hetzner-eu.hcloud_server.this["workers-1"]' in text
    assert 'id = "4711"' in text
    assert 'id = "example-api-prod/148ed"' in text
    assert 'id = var.machine_ids["workers-2"]' in text, "a name is nothing that the provider could import"
    assert '"workers-1"' not in (folder / "variables.tf").read_text(), "a machine that exists needs no token"


def test_what_is_missing_or_wrong_is_said_before_anything_is_made(terraform: Terraform, tmp_path: Path) -> None:  # noqa: F811
    fleet = example()
    folder = write(tmp_path, fleet)
    terraform(folder, "get")
    for change, says in (
        ({"join_tokens": {"workers-1": TOKEN}}, "Each new machine needs a token"),
        ({"join_tokens": dict.fromkeys(tokens(fleet), "nonsense")}, "A join token is"),
        ({"slum_server": "http://plain"}, "It must be an https URL"),
        ({"admin_cidrs": ["everywhere"]}, "Each must be a network"),
    ):
        variables = VARIABLES | {"join_tokens": tokens(fleet)} | change
        with pytest.raises(AssertionError, match=says):
            terraform(folder, "plan", "-input=false", "-no-color", variables=variables)


def test_user_data_installs_slum_and_joins(terraform: Terraform, tmp_path: Path) -> None:  # noqa: F811
    fleet = example()
    found = planned(terraform, write(tmp_path, fleet), fleet)
    user_data = found['module.hetzner-eu.hcloud_server.this["workers-3"]']["user_data"]
    assert user_data.startswith("#cloud-config\n")
    assert len(user_data.encode()) < BYTES_MAX
    document = yaml.safe_load(user_data)
    (token,) = document["write_files"]
    assert (token["content"], token["permissions"], token["owner"]) == (TOKEN, "0600", "root:root")
    (command,) = document["runcmd"]
    assert command[:2] == ["sh", "-euc"]
    assert command[3:] == ["slum-join", "0.1.0", "https://slum.example.com", "workers-3"]
    assert TOKEN not in json.dumps(document["runcmd"]), "a token is never an argument"
    same = cloud_init(
        server=quoted("https://slum.example.com"),
        machine=quoted("workers-3"),
        token=quoted(TOKEN),
        version=quoted("0.1.0"),
    )
    assert yaml.safe_load(same) == document, "an operator's user data is the export's"


def test_the_join_script_does_what_it_says(tmp_path: Path) -> None:
    hostile = "x'; touch /tmp/pwned; $(false) \"${y}"
    values = {"server": quoted("https://s"), "machine": quoted(hostile), "token": quoted("t"), "version": quoted("9.9")}
    (command,) = yaml.safe_load(cloud_init(**values))["runcmd"]
    log = tmp_path / "log"
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    python = bin_ / "python3"
    python.write_text(
        '#!/bin/sh\nmkdir -p "$3/bin"\nfor p in pip slum; do printf \'#!/bin/sh\\nfor a in "$0" "$@"; do echo "$a" >> %s; done\\n\' '
        f'{log} > "$3/bin/$p"; chmod 755 "$3/bin/$p"; done\n'
    )
    python.chmod(0o755)
    script = command[2].replace("/opt/slum", str(tmp_path / "opt"))
    run("sh", "-euc", script, *command[3:], env={"PATH": f"{bin_}:/usr/bin:/bin"})
    lines = log.read_text().splitlines()
    assert "slum==9.9" in lines
    assert lines[-7:] == ["https://s", "--tenement", hostile, "--token-file", "/etc/slum/join-token", "--wait", "3600"]


def test_every_text_survives_terraform_unchanged(terraform: Terraform, tmp_path: Path) -> None:  # noqa: F811
    texts = [a + b for a in HOSTILE for b in ("", "{", "x", '"', "${y}")] + ["$" * n + "{" for n in range(6)]
    texts = [text for text in dict.fromkeys(texts) if hcl.is_exact(text)]
    body = hcl.document([hcl.block("output", "texts", value=texts)])
    lay(tmp_path, [File(path="main.tf", text=body)])
    terraform(tmp_path, "fmt", "-check", "-diff")
    terraform(tmp_path, "apply", "-auto-approve", "-input=false")
    assert json.loads(terraform(tmp_path, "output", "-json", "texts")) == texts
    assert not hcl.is_exact("e\u0301")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(fleet=fleets())
def test_generated_fleets_are_formatted_as_terraform_does(
    tmp_path_factory: pytest.TempPathFactory, fleet: Fleet
) -> None:
    folder = write(tmp_path_factory.mktemp("tf"), fleet)
    run(tool("terraform"), f"-chdir={folder}", "fmt", "-check", "-recursive", "-diff", env={"TF_CLI_CONFIG_FILE": ""})


def test_hashicorps_parser_reads_it_and_no_resource_or_provider_is_unknown(tmp_path: Path) -> None:
    parsed = hcl2json(write(tmp_path, many()))
    kinds = {kind for item in parsed.values() for kind in item.get("resource", {})}
    assert kinds == {
        *("hcloud_server", "hcloud_firewall", "hcloud_network", "hcloud_network_subnet", "hcloud_placement_group"),
        *("hcloud_ssh_key", "fly_app", "fly_volume", "fly_secret", "fly_machine", "fly_ip_address", "terraform_data"),
    }
    for path, item in parsed.items():
        for name, (variable,) in item.get("variable", {}).items():
            assert variable["type"], (path, name)
            assert variable["description"], (path, name)
            assert variable.get("sensitive", False) is ("token" in name), (path, name)
    pins = [
        p
        for item in parsed.values()
        for t in item.get("terraform", ())
        for r in t.get("required_providers", ())
        for p in r.values()
    ]
    assert pins
    assert all(re.fullmatch(r"~> \d+\.\d+", pin["version"]) for pin in pins)


def test_the_package_brings_the_modules() -> None:
    rendered = export_terraform(example(), Site(version="1"))
    paths = {file.path for file in rendered.files}
    assert {"modules/hetzner/cloud-init.yaml.tftpl", "modules/fly/main.tf", "modules/ssh/main.tf", "README.md"} <= paths
