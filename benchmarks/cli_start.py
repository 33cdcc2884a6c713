"""`slum --help` against `python -c "import click"`: whole processes, alternating; medians. Takes some 10 s."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from measure import row

ROUNDS = int(os.environ.get("ROUNDS", "40"))


def timed(*argv: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    ours, peers = [], []
    for _ in range(ROUNDS):
        ours.append(timed("-m", "slum.cli.main", "--help"))
        peers.append(timed("-c", "import click"))
    return 0 if row("slum --help, import click", ours, peers, bound=1.5) else 1


if __name__ == "__main__":
    sys.exit(main())
