"""`python -m tests.simulation.mutate`: switch each protection off in turn, and see that the simulation notices."""

from __future__ import annotations

import argparse
import subprocess
import sys

from tests.simulation.mutations import ALL


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.mutate")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    missed = 0
    for mutation in ALL:
        command = [sys.executable, "-m", "tests.simulation", "--without", mutation.name, "--seed", str(given.seed)]
        missed += subprocess.run(command, check=False).returncode != 0
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
