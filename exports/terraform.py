"""Terraform files: the machines of a fleet, which join its control plane by themselves; one module an operator type.

The modules are the same for every fleet and lie beside this file as they are; what a fleet says stands in main.tf as their
arguments. What runs on the machines is the control plane's to send. No token is ever written: they are sensitive
variables. Pure, but for the modules' own text, which is a part of this package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from slum.cloudinit import cloud_init
from slum.exports.base import File, Losses, Rendered, Site
from slum.exports.hcl import OMIT, Attribute, Block, Item, Raw, Value, block, document, identifier, is_exact
from slum.exports.readme import terraform_readme
from slum.model import (
    Fleet,
    FlyOperator,
    HetznerOperator,
    JoinOperator,
    Label,
    LocalOperator,
    Operator,
    Settings,
    SshOperator,
    Tenement,
    operator_type,
)
from slum.nodeimage import node_image

MODULE_FILES = ("main.tf", "variables.tf", "outputs.tf", "versions.tf")
PROVIDERS: Mapping[str, tuple[str, str, str]] = {
    "hetzner": ("hcloud", "hetznercloud/hcloud", "~> 1.54"),
    "fly": ("fly", "stategraph/fly", "~> 0.2"),
}
TOKENS: Mapping[str, tuple[str, str]] = {"hetzner": ("hcloud_token", "token"), "fly": ("fly_token", "api_token")}
"""Operator type -> the variable of its token, and the provider's argument for it."""
RESOURCES: Mapping[str, str] = {"hetzner": "hcloud_server", "fly": "fly_machine"}
IMPORT_IDS = {"hetzner": re.compile(r"[0-9]+"), "fly": re.compile(r"[a-z0-9-]+/[a-z0-9]+")}
"""By what each provider's `import` finds a machine."""


def export_terraform(fleet: Fleet, site: Site) -> Rendered:
    """Return the root module, the modules that it uses, and what Terraform does not say."""
    losses = Losses()
    used = [o for o in fleet.operators if not isinstance(o, LocalOperator | JoinOperator)]
    by_operator = {o.name: [t for t in fleet.tenements if t.operator == o.name] for o in used}
    kinds = [kind for kind in ("hetzner", "fly", "ssh") if any(operator_type(o) == kind for o in used)]
    aliased = {kind for kind in PROVIDERS if len({_token_source(o) for o in used if operator_type(o) == kind}) > 1}
    out = [
        File(path="versions.tf", text=document(_versions(kinds))),
        *_file("providers.tf", _providers(used, aliased)),
        *_file("variables.tf", _variables(used, by_operator, aliased, site)),
        *_file("main.tf", [_module(fleet, o, by_operator[o.name], site, losses, aliased) for o in used]),
        *_file("imports.tf", _imports(used, by_operator, site)),
        *_file("outputs.tf", _outputs(used)),
        *(file for kind in kinds for file in module_files(kind)),
        *([File(path="node-image/Dockerfile", text=node_image(site.version))] if "fly" in kinds else []),
    ]
    _losses(fleet, losses)
    out.append(File(path="README.md", text=terraform_readme(fleet, _asked(used, aliased), losses.all())))
    return Rendered(files=tuple(out), losses=losses.all())


@cache
def module_files(kind: str) -> tuple[File, ...]:
    """Return the module for operators of type *kind*."""
    folder = files("slum.exports").joinpath("modules", kind)
    found = [
        File(path=f"modules/{kind}/{name}", text=folder.joinpath(name).read_text(encoding="utf-8"))
        for name in MODULE_FILES
    ]
    if kind == "hetzner":
        words = {name: f"${{jsonencode({name})}}" for name in ("server", "machine", "token", "version")}
        found.append(File(path=f"modules/{kind}/cloud-init.yaml.tftpl", text=cloud_init(**words)))
    return tuple(found)


def _file(path: str, items: Sequence[Item]) -> list[File]:
    return [File(path=path, text=document(items))] if items else []


def _versions(kinds: Sequence[str]) -> list[Item]:
    required = [
        Attribute(PROVIDERS[kind][0], {"source": PROVIDERS[kind][1], "version": PROVIDERS[kind][2]})
        for kind in kinds
        if kind in PROVIDERS
    ]
    body: tuple[Item, ...] = ("", Block("required_providers", (), tuple(required))) if required else ()
    return [block("terraform", required_version=">= 1.11", body=body)]


def _token_source(operator: Operator) -> tuple[str, str | None]:
    return (
        (operator.token_env, operator.secrets_ref)
        if isinstance(operator, HetznerOperator | FlyOperator)
        else ("", None)
    )


def _token_variable(operator: Operator, aliased: set[str]) -> str:
    kind = operator_type(operator)
    return TOKENS[kind][0] + (f"_{operator.name}" if kind in aliased else "")


def _providers(used: Sequence[Operator], aliased: set[str]) -> list[Item]:
    """One configuration for each account: by default one a provider, with several token sources one an operator."""
    found: dict[str, Item] = {}
    for operator in used:
        kind = operator_type(operator)
        if kind in PROVIDERS:
            token = f"var.{_token_variable(operator, aliased)}"
            own = [Attribute("alias", identifier(operator.name))] if kind in aliased else []
            body = [*own, Attribute(TOKENS[kind][1], Raw(token))]
            found.setdefault(token, block("provider", PROVIDERS[kind][0], body=body))
    return list(found.values())


def _variables(
    used: Sequence[Operator], by_operator: Mapping[str, Sequence[Tenement]], aliased: set[str], site: Site
) -> list[Item]:
    found: dict[str, Item] = {}
    for operator in used:
        if operator_type(operator) in PROVIDERS:
            name = _token_variable(operator, aliased)
            env, elsewhere = _token_source(operator)
            where = f"the variable {env}" if elsewhere is None else f"the secrets_ref of {operator.name}"
            found[name] = _variable(name, f"API token; slum finds it in {where}.", sensitive=True)
    if found:
        joining = [
            machine
            for operator in used
            if operator_type(operator) in PROVIDERS
            for tenement in by_operator[operator.name]
            for machine in tenement.machine_names
            if machine not in site.machines
        ]
        found |= _joining(joining)
    if any(isinstance(o, HetznerOperator) for o in used):
        found["ssh_public_keys"] = _variable(
            "ssh_public_keys", "SSH keys to add to the project: name to public key.", type="map(string)", default={}
        )
        check = Raw("alltrue([for cidr in var.admin_cidrs : can(cidrhost(cidr, 0))])")
        found["admin_cidrs"] = _variable(
            "admin_cidrs",
            "Networks that may use SSH, e.g. 203.0.113.0/24.",
            type="list(string)",
            default=[],
            body=(
                "",
                block("validation", condition=check, error_message="Each must be a network such as 203.0.113.0/24."),
            ),
        )
    if _needs_ids(used, by_operator, site):
        text = "Machines to take over: name to what the provider imports by, a server's number or APP/MACHINE."
        found["machine_ids"] = _variable("machine_ids", text, type="map(string)")
    if any(isinstance(o, FlyOperator) and o.image is None for o in used):
        found["fly_image"] = _variable(
            "fly_image", "Image with this version of slum inside, e.g. registry.fly.io/slum:1."
        )
    return list(found.values())


def _joining(machines: Sequence[str]) -> dict[str, Item]:
    """The variables with which machines join; each new one needs a token of its own."""
    url = Raw('can(regex("^https://[^/ ]+$", var.slum_server))')
    shape = Raw('alltrue([for token in values(var.join_tokens) : can(regex("^[^:\\\\s]+::\\\\S+$", token))])')
    checks: list[Item] = ["", block("validation", condition=shape, error_message="A join token is CA-HASH::SECRET.")]
    if machines:
        names = _joined(machines)
        every = Raw(f"alltrue([for machine in [{names}] : contains(keys(var.join_tokens), machine)])")
        message = "Each new machine needs a token of its own; see README.md."
        checks += ["", block("validation", condition=every, error_message=message)]
    return {
        "slum_server": _variable(
            "slum_server",
            "URL of the control plane that the machines join, e.g. https://slum.example.com.",
            body=("", block("validation", condition=url, error_message="It must be an https URL without a path.")),
        ),
        "join_tokens": _variable(
            "join_tokens", "Machine to join token.", type="map(string)", sensitive=True, body=tuple(checks)
        ),
    }


def _joined(machines: Sequence[str]) -> str:
    return ", ".join(f'"{machine}"' for machine in machines)


def _variable(
    name: str,
    description: str,
    *,
    type: str = "string",
    default: Value = OMIT,
    sensitive: bool = False,
    body: Sequence[Item] = (),
) -> Block:
    marked = sensitive or OMIT
    return block(
        "variable", name, description=description, type=Raw(type), default=default, sensitive=marked, body=body
    )


def _module(
    fleet: Fleet, operator: Operator, tenements: Sequence[Tenement], site: Site, losses: Losses, aliased: set[str]
) -> Block:
    kind = operator_type(operator)
    arguments: dict[str, Value] = {"source": f"./modules/{kind}"}
    body: list[Item] = []
    if kind in aliased:
        provider = PROVIDERS[kind][0]
        body += ["", Attribute("providers", {provider: Raw(f"{provider}.{identifier(operator.name)}")})]
    body.append("")
    match operator:
        case HetznerOperator():
            own = _hetzner(fleet, operator, tenements, site, losses)
        case FlyOperator():
            own = _fly(fleet, operator, tenements)
        case SshOperator():
            own = _ssh(operator, tenements, losses)
        case _:
            own = {}
    body += [Attribute(name, value) for name, value in own.items()]
    return block("module", identifier(operator.name), **arguments, body=body)


def _hetzner(
    fleet: Fleet, operator: HetznerOperator, tenements: Sequence[Tenement], site: Site, losses: Losses
) -> dict[str, Value]:
    for key in operator.ssh_keys:
        _exact(f"operators.{operator.name}.ssh_keys", key, losses)
    return {
        "fleet": fleet.name,
        "operator": operator.name,
        "location": operator.location,
        "server_type": operator.server_type,
        "image": operator.image,
        "ssh_keys": list(operator.ssh_keys),
        "ssh_public_keys": Raw("var.ssh_public_keys"),
        "admin_cidrs": Raw("var.admin_cidrs"),
        "slum_server": Raw("var.slum_server"),
        "slum_version": site.version,
        "join_tokens": Raw("var.join_tokens"),
        "tenements": {
            tenement.name: {
                "machines": list(tenement.machine_names),
                "labels": _hetzner_labels(tenement, losses),
                "ports": list(tenement.public_ports),
            }
            for tenement in tenements
        },
    }


def _hetzner_labels(tenement: Tenement, losses: Losses) -> dict[str, Value]:
    kept: dict[str, Value] = {}
    for label in tenement.labels:
        if not _is_hetzner_label(label):
            why = "Hetzner reserves hetzner.cloud/, takes one slash in a name and none in a value"
            losses.add(f"tenement.{tenement.name}.labels", f"{label.name}={label.value}", why)
        else:
            kept[label.name] = label.value
    return kept


def _is_hetzner_label(label: Label) -> bool:
    owner = label.name.rpartition("/")[0]
    return label.name.count("/") <= 1 and not owner.endswith("hetzner.cloud") and "/" not in label.value


def _fly(fleet: Fleet, operator: FlyOperator, tenements: Sequence[Tenement]) -> dict[str, Value]:
    return {
        "fleet": fleet.name,
        "org": operator.org,
        "region": operator.region,
        "image": Raw("var.fly_image") if operator.image is None else operator.image,
        "cpu_kind": operator.cpu_kind,
        "cpus": operator.cpus,
        "memory_mb": operator.memory_mb,
        "volume_gb": operator.volume_gb,
        "slum_server": Raw("var.slum_server"),
        "join_tokens": Raw("var.join_tokens"),
        "tenements": {
            tenement.name: {
                "machines": list(tenement.machine_names),
                "labels": {label.name: label.value for label in tenement.labels},
                "port": _fly_port(tenement),
            }
            for tenement in tenements
        },
    }


def _fly_port(tenement: Tenement) -> int | None:
    """Return the router's port that Fly's proxy, which speaks TLS itself, sends requests to."""
    return next((port for port in tenement.public_ports if port != 443), None)


def _ssh(operator: SshOperator, tenements: Sequence[Tenement], losses: Losses) -> dict[str, Value]:
    for key in ("key", "known_hosts"):
        _exact(f"operators.{operator.name}.{key}", getattr(operator, key) or "", losses)
    hosts: list[Value] = []
    for host in operator.hosts:
        fields: dict[str, Value] = {"host": host.host, "port": host.port, "user": host.user or operator.user}
        fields["labels"] = {label.name: label.value for label in host.labels}
        hosts.append(fields | ({"fingerprint": host.fingerprint} if host.fingerprint is not None else {}))
    named = {name: getattr(operator, name) for name in ("key", "jump", "jump_fingerprint", "known_hosts")}
    access: dict[str, Value] = {"host_key": str(operator.host_key)}
    return {
        "hosts": hosts,
        "tenements": {tenement.name: tenement.count for tenement in tenements},
        "access": access | {name: value for name, value in named.items() if value is not None},
    }


def _exact(path: str, text: str, losses: Losses) -> None:
    if not is_exact(text):
        losses.add(path, text, "Terraform holds texts in Unicode's normal form C only", "write it so")


def _imports(used: Sequence[Operator], by_operator: Mapping[str, Sequence[Tenement]], site: Site) -> list[Item]:
    """Return an import block for each machine that exists, so that a first apply takes it over instead of making it."""
    found: list[Item] = []
    for operator in used:
        kind = operator_type(operator)
        for tenement in by_operator[operator.name] if kind in RESOURCES else ():
            for machine in tenement.machine_names:
                if machine in site.machines:
                    to = Raw(f'module.{identifier(operator.name)}.{RESOURCES[kind]}.this["{machine}"]')
                    found.append(f"{machine} is {_comment(site.machines[machine])} to slum.")
                    found.append(block("import", to=to, id=_import_id(kind, machine, site.machines[machine])))
    return found


def _import_id(kind: str, machine: str, known: str) -> Value:
    """Return what the provider imports by: a server's number, APP/MACHINE; a variable where slum knows a name only."""
    return known if IMPORT_IDS[kind].fullmatch(known) else Raw(f'var.machine_ids["{machine}"]')


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text[:100])


def _needs_ids(used: Sequence[Operator], by_operator: Mapping[str, Sequence[Tenement]], site: Site) -> bool:
    return any(
        not IMPORT_IDS[kind].fullmatch(site.machines.get(machine, "1/1" if kind == "fly" else "1"))
        for operator in used
        if (kind := operator_type(operator)) in IMPORT_IDS
        for tenement in by_operator[operator.name]
        for machine in tenement.machine_names
    )


def _outputs(used: Sequence[Operator]) -> list[Item]:
    found: list[Item] = []
    for operator in used:
        what = "hosts" if isinstance(operator, SshOperator) else "machines"
        value = Raw(f"module.{identifier(operator.name)}.{what}")
        found.append(
            block("output", identifier(operator.name), description=f"The {what} of {operator.name}.", value=value)
        )
    return found


def _asked(used: Sequence[Operator], aliased: set[str]) -> list[tuple[str, str]]:
    """Return (variable, meaning) of all that a person has to give."""
    found: dict[str, str] = {}
    for operator in used:
        if operator_type(operator) in PROVIDERS:
            found[_token_variable(operator, aliased)] = f"the API token of {operator.name}"
    if found:
        found["slum_server"] = "the URL of the control plane"
        found["join_tokens"] = (
            'a token for each machine, `{ "workers-1" = "..." }`; `slum token new node NAME` makes them'
        )
    if any(isinstance(o, FlyOperator) and o.image is None for o in used):
        found["fly_image"] = "an image with slum inside, built from node-image/Dockerfile and pushed"
    return list(found.items())


def _losses(fleet: Fleet, losses: Losses) -> None:
    if fleet.domain != "localhost":
        losses.add("fleet.domain", fleet.domain, "names are the services', which `slum apply` sends")
    for operator in fleet.operators:
        if isinstance(operator, LocalOperator):
            losses.add(f"operators.{operator.name}", 'type "local"', "this machine exists already", "`slum up` on it")
        if isinstance(operator, JoinOperator):
            losses.add(
                f"operators.{operator.name}", 'type "join"', "its machines are somebody else's", "`slum join` there"
            )
    local = {operator.name for operator in fleet.operators if isinstance(operator, LocalOperator)}
    joined = {operator.name for operator in fleet.operators if isinstance(operator, JoinOperator)}
    for tenement in fleet.tenements:
        at = f"tenement.{tenement.name}"
        if tenement.operator in local:
            losses.add(f"{at}.operator", tenement.operator, "this machine exists already", "`slum up` on it")
        if tenement.operator in joined:
            losses.add(f"{at}.operator", tenement.operator, "its machines are somebody else's", "`slum join` there")
        if tenement.services:
            count = f"{len(tenement.services)} service{'s' if len(tenement.services) > 1 else ''}"
            losses.add(f"{at}.service", count, "Terraform makes machines; services change more often", "`slum apply`")
        if tenement.settings != Settings():
            losses.add(f"{at}.settings", "how services are supervised", "it goes with the services", "`slum apply`")
        if not tenement.public_ports and tenement.routing_listen != _LISTEN:
            losses.add(
                f"{at}.routing.listen", ", ".join(tenement.routing_listen), "it opens no port to others", "`slum apply`"
            )


_LISTEN = Tenement(name="x", operator="x").routing_listen
