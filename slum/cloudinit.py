"""The user data with which a new machine installs slum and joins home: one template for the operator and for exports.

Pure text. The values arrive as YAML scalars that are ready to stand there: quoted values from an operator, expressions
from a Terraform template. They reach the script as its arguments and never become part of it; the token is in a file
that root alone may read, never in an argument.
"""

from __future__ import annotations

import json

BYTES_MAX = 32 << 10
"""Hetzner's limit of user data."""
TOKEN_FILE = "/etc/slum/join-token"
PACKAGES = ("bubblewrap", "ca-certificates", "nftables", "python3", "python3-venv")

_JOIN = (
    'home=/opt/slum/$1; python3 -m venv "$home"; '
    '"$home/bin/pip" install --quiet --disable-pip-version-check --retries 10 "slum==$1"; '
    f'exec "$home/bin/slum" join "$2" --tenement "$3" --token-file {TOKEN_FILE} --wait 3600'
)

_TEMPLATE = """\
#cloud-config
# Installs slum and joins its control plane with a token for this machine alone.
package_update: true
packages: [{packages}]
write_files:
  - path: {token_file}
    owner: "root:root"
    permissions: "0600"
    content: {token}
runcmd:
  - [sh, -euc, {join}, slum-join, {version}, {server}, {machine}]
"""


def cloud_init(*, server: str, machine: str, token: str, version: str) -> str:
    """Return user data for *machine* (its name in the fleet); all four are YAML scalars, as quoted() gives them.

    *server* is the control plane's URL (or several, a blank between two), *version* that of slum, *token* a join token for this machine.
    """
    return _TEMPLATE.format(
        packages=", ".join(PACKAGES),
        token_file=TOKEN_FILE,
        join=quoted(_JOIN),
        version=version,
        server=server,
        machine=machine,
        token=token,
    )


def quoted(value: str) -> str:
    """Return *value* as a YAML scalar, whatever it holds: JSON is YAML."""
    return json.dumps(value)
