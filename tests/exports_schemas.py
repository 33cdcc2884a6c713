"""What Terraform's two providers know, as data for exports_provider.

hcloud: read from the installed PyPI package pulumi-hcloud, whose classes are generated from terraform-provider-hcloud; only
its names for repeated blocks are plural. fly: the resource pages of registry provider stategraph/fly 0.2.3
(docs/resources/*.md of its repository), restated here.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

Table = dict[str, Any]
HCLOUD = {
    "hcloud_server": "server",
    "hcloud_firewall": "firewall",
    "hcloud_network": "network",
    "hcloud_network_subnet": "network_subnet",
    "hcloud_placement_group": "placement_group",
    "hcloud_ssh_key": "ssh_key",
    "hcloud_volume": "volume",
}
SINGULAR = {"networks": "network", "public_nets": "public_net", "rules": "rule", "apply_tos": "apply_to"}


def hcloud() -> Table:
    spec = importlib.util.find_spec("pulumi_hcloud")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    inputs = _classes(folder / "_inputs.py")
    resources = {}
    for name, module in HCLOUD.items():
        classes = _classes(folder / f"{module}.py")
        title = "".join(part.title() for part in module.split("_"))
        table = _table(classes[f"{title}Args"], inputs)
        table["attributes"]["id"] = ("string", "computed")
        state = classes[f"_{title}State"]
        for key, (kind, _) in _table(state, inputs)["attributes"].items():
            table["attributes"].setdefault(key, (kind, "computed"))
        resources[name] = table
    provider = {"token": ("string", "optional"), "endpoint": ("string", "optional")}
    return {
        "name": "hcloud",
        "source": "registry.terraform.io/hetznercloud/hcloud",
        "provider": provider,
        "resources": resources,
    }


def _classes(file: Path) -> dict[str, ast.ClassDef]:
    return {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}


def _table(node: ast.ClassDef, inputs: dict[str, ast.ClassDef]) -> Table:
    init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    attributes: Table = {}
    blocks: Table = {}
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        assert argument.annotation is not None
        kind = ast.unparse(argument.annotation)
        if "Args'" in kind:
            inner = kind[kind.index("'") + 1 : kind.rindex("'")]
            blocks[SINGULAR.get(argument.arg, argument.arg)] = _table(inputs[inner], inputs)
        else:
            attributes[argument.arg] = (_kind(kind), "required" if default is None else "optional")
    return {"attributes": attributes, "blocks": blocks}


def _kind(text: str) -> str:
    word = next(w for w in ("str", "int", "bool", "float") if f"_builtins.{w}" in text)
    if "Mapping" in text:
        return "map"
    if "Sequence" in text:
        return "strings" if word == "str" else "numbers"
    return {"str": "string", "int": "number", "float": "number", "bool": "bool"}[word]


def _need(required: str = "", optional: str = "", computed: str = "") -> Table:
    """Names with an optional ":type" each; string without one."""
    found: Table = {}
    for need, names in (("required", required), ("optional", optional), ("computed", computed)):
        for name in names.split():
            key, _, kind = name.partition(":")
            found[key] = (kind or "string", need)
    return found


FLY: Table = {
    "name": "fly",
    "source": "registry.terraform.io/stategraph/fly",
    "provider": _need(optional="api_token api_url flyctl_path org_slug"),
    "resources": {
        "fly_app": {"attributes": _need("name org_slug", "network", "app_url id status")},
        "fly_volume": {
            "attributes": _need(
                "app name region size_gb:number",
                "auto_backup_enabled:bool encrypted:bool require_unique_zone:bool snapshot_id snapshot_retention:number",
                "id state created_at zone attached_machine_id",
            )
        },
        "fly_secret": {"attributes": _need("app key value", "", "created_at digest id")},
        "fly_ip_address": {"attributes": _need("app type", "region", "address created_at id")},
        "fly_machine": {
            "attributes": _need(
                "app image region",
                "auto_destroy:bool cmd:strings cordoned:bool desired_status entrypoint:strings env:map metadata:map name "
                "schedule skip_launch:bool",
                "created_at id instance_id private_ip state updated_at",
            ),
            "blocks": {
                "check": {"attributes": _need("name type", "interval method path port:number timeout")},
                "guest": {"attributes": _need("", "cpu_kind cpus:number gpu_kind gpus:number memory_mb:number")},
                "metrics": {"attributes": _need("", "path port:number")},
                "mount": {
                    "attributes": _need(
                        "", "add_size_gb:number extend_threshold_percent:number path size_gb_limit:number volume"
                    )
                },
                "restart": {"attributes": _need("", "max_retries:number policy")},
                "service": {
                    "attributes": _need(
                        "internal_port:number protocol",
                        "autostart:bool autostop:bool force_https:bool min_machines_running:number",
                    ),
                    "blocks": {
                        "concurrency": {"attributes": _need("", "hard_limit:number soft_limit:number type")},
                        "port": {"attributes": _need("", "force_https:bool handlers:strings port:number")},
                    },
                },
            },
        },
    },
}
