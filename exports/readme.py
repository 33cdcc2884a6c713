"""The README of each export: how to run it, in the order in which one does. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from slum.exports.base import LOSSES, Loss
from slum.model import Fleet, Tenement


def losses_note(losses: Sequence[Loss]) -> str:
    """Return the README's last paragraph: what was not said, and where it is listed."""
    if not losses:
        return "Everything that slum.toml says of these services is in these files.\n"
    count = f"{len(losses)} thing{'s' if len(losses) > 1 else ''}"
    return (
        f"{count} that slum.toml says could not be said here: see `{LOSSES}`, with the reason and what to do instead.\n"
    )


def compose_readme(fleet: Fleet, tenements: Sequence[Tenement], losses: Sequence[Loss]) -> str:
    """Return how to run the Compose files of *tenements*."""
    lines = [f"# {fleet.name}: Docker Compose", "", "One folder a tenement, each for one machine:", ""]
    lines += [f"    docker compose --project-directory {t.name} up --build --detach" for t in tenements[:10]]
    lines += ["    ..."] if len(tenements) > 10 else []
    lines += [
        "",
        "`caddy` serves the host names that slum serves; set `DOMAIN` in compose.yaml to serve them under another one.",
        "The services of a tenement share its network, so they find each other on 127.0.0.1 as before. Each instance has a",
        "volume for its data, mounted at /data.",
        "",
        "- Needs Docker Compose 2.24 or newer with BuildKit.",
        "- The images in the Dockerfiles were chosen by the commands: put the programs in that your services need.",
        "- A secret's file must be readable by user 10001; `environment` secrets are read from your shell.",
        "- A `.slumignore` is not read by Docker: copy it to `.dockerignore`.",
        "- `runtime: runsc` needs gVisor, `runtime: io.containerd.kata.v2` Kata Containers on the machine.",
        "",
    ]
    return "\n".join(lines) + losses_note(losses)


def fly_readme(fleet: Fleet, apps: Sequence[tuple[str, str, str, Sequence[str]]], losses: Sequence[Loss]) -> str:
    """Return how to deploy *apps*: (folder, app name, build context, further commands)."""
    lines = [f"# {fleet.name}: Fly.io", "", "One folder an app: its fly.toml and its Dockerfile. For each, once:", ""]
    lines += [
        "    fly apps create APP",
        "    fly secrets set NAME=VALUE --app APP",
        "    fly deploy CONTEXT --config FOLDER/fly.toml",
        "    fly certs add HOST --app APP",
        "",
        "CONTEXT is the folder that is sent to the builder; the first line of each Dockerfile names it.",
        "",
    ]
    for folder, app, context, more in apps:
        lines += [f"## {app}", "", f"    fly apps create {app}", *(f"    {command}" for command in more)]
        lines += [f"    fly deploy {shlex.quote(context)} --config {folder}/fly.toml", ""]
    lines += [
        "The images in the Dockerfiles were chosen by the commands: put the programs in that your services need.",
        "",
    ]
    return "\n".join(lines) + losses_note(losses)


def terraform_readme(fleet: Fleet, variables: Sequence[tuple[str, str]], losses: Sequence[Loss]) -> str:
    """Return how to plan and apply; *variables* are (name, meaning) of those that have no default."""
    lines = [
        f"# {fleet.name}: Terraform",
        "",
        "Makes the machines of the fleet; each joins the control plane by itself.",
        "",
    ]
    lines += ["    terraform init", "    terraform plan", "    terraform apply", ""]
    if variables:
        lines += ["Give these first, as `TF_VAR_name` or in a `.tfvars` file that is not committed:", ""]
        lines += [f"- `{name}`: {meaning}" for name, meaning in variables]
        lines.append("")
    lines += [
        "Machines that Terraform makes are not slum's to make: in the slum.toml that you apply, their operators become",
        '`type = "join"`, which makes nothing. Then `slum apply --no-wait`, a token for each machine, and `terraform apply`;',
        "each machine is sent its services as soon as it has joined. `terraform destroy` removes the machines with their data.",
        "",
    ]
    return "\n".join(lines) + losses_note(losses)
