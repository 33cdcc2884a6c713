"""`python -m tests.simulation --count N --seed S [--members 3|5] [--trace]`: run N schedules from seed S on."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != "0":
    # The order of sets is part of a schedule.
    os.execve(
        sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"}
    )

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulation.schedule import run_one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--members", type=int, default=0, help="3 or 5; else one in four schedules has 5")
    parser.add_argument("--troubles", type=int, default=12)
    parser.add_argument("--trace", action="store_true")
    given = parser.parse_args()
    began, failed = time.monotonic(), 0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="sim", dir=memory if memory.is_dir() else None) as folder:
        for seed in range(given.seed, given.seed + given.count):
            members = given.members or (5 if seed % 4 == 0 else 3)
            try:
                line = run_one(Path(folder), seed, members=members, troubles=given.troubles, trace=given.trace)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                traceback.print_exc(limit=None if given.trace else -6)
                print(f"seed {seed} FAILED: {type(error).__name__}: {error}", flush=True)
            else:
                if given.trace or given.count < 5:
                    print(f"seed {seed}: {line}")
    took = time.monotonic() - began
    print(f"{given.count} schedules from seed {given.seed}: {failed} failed, {took:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
