"""The Dockerfile of a machine that is a container, such as Fly's: one text for the example, the docs and exports. Pure."""

from __future__ import annotations

from slum.cloudinit import PACKAGES

_TEMPLATE = """\
# A machine that is a container: it joins the control plane that its environment names, and is a tenement from then on.
#   docker build --tag registry.example.com/slum-node:{version} .
# Services run on what is installed here: add the programs that yours need.
FROM debian:bookworm-slim
ARG SLUM="slum=={version}"
RUN apt-get update \\
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends {packages} \\
 && rm -rf /var/lib/apt/lists/*
# Wheels in a folder beside this file count as well: so a slum of your own gets in.
COPY Dockerfile wheel[s]/ /tmp/slum/
RUN python3 -m venv /opt/slum \\
 && /opt/slum/bin/pip install --no-cache-dir --disable-pip-version-check --find-links /tmp/slum "$SLUM" \\
 && rm -rf /tmp/slum
ENV PATH="/opt/slum/bin:$PATH"
# Data, the machine's key and what it shall run: must outlive the container.
VOLUME /var/lib/slum
# SLUM_SERVER, SLUM_MACHINE, and SLUM_JOIN_TOKEN or SLUM_JOIN_TOKEN_FILE, until it has joined.
ENTRYPOINT ["/opt/slum/bin/python", "-P", "-m", "slum.node.container"]
"""


def node_image(version: str) -> str:
    """Return the Dockerfile of a node with slum *version*."""
    return _TEMPLATE.format(version=version, packages=" ".join(PACKAGES))
