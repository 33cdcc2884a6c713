"""Run in a network namespace of its own: put a server on the metadata addresses and try it before and after the rules."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from walls_support import PYTHON, open_yard, some_uid

from slum.model import Level
from slum.node import metadata
from slum.node.types import Available

TRY = """
import socket, sys
for family, address, port in ((2, "169.254.169.254", int(sys.argv[1])), (10, "fd00:ec2::254", int(sys.argv[1]))):
    with socket.socket(family) as client:
        client.settimeout(5)
        try:
            client.connect((address, port))
            print("answered")
        except OSError:
            print("refused")
"""


def main() -> None:
    level = Level(sys.argv[1])
    for command in (
        "ip link set lo up",
        "ip addr add 169.254.169.254/32 dev lo",
        "ip -6 addr add fd00:ec2::254/128 dev lo nodad",
    ):
        subprocess.run(command.split(), check=True)
    with ExitStack() as held:
        yard = held.enter_context(open_yard())
        for port in (80, 53):
            held.enter_context(socket.create_server(("169.254.169.254", port)))
            held.enter_context(socket.create_server(("fd00:ec2::254", port), family=socket.AF_INET6))

        def as_service(port: int) -> list[str]:
            made = yard.instance("curious", (PYTHON, "-c", TRY, str(port)), uid=some_uid())
            return yard.run(level, made)[1].split()

        seen: dict[str, object] = {"before": as_service(80)}
        for _ in range(2):
            assert isinstance(metadata.install(), Available)
        seen["after"] = as_service(80)
        seen["resolver"] = as_service(53)[0]
        outside = subprocess.run([PYTHON, "-c", TRY, "80"], capture_output=True, text=True, check=True)
        seen["root"] = outside.stdout.split()
        print(json.dumps(seen))


if __name__ == "__main__":
    main()
