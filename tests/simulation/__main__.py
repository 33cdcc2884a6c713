"""`python -m tests.simulation --count N --seed S [--members 3|5] [--jobs J] [--trace]`: run N schedules from seed S on.

With `--without NAME` a protection is switched off (mutations.py) and schedules run until that is noticed: status 1 if it never is.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
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

from simulation.mutations import ALL, Mutation
from simulation.schedule import run_one
from simulation.witness import Failed

PROGRESS = 1000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--members", type=int, default=0, help="3 or 5; else one in eight schedules has 5")
    parser.add_argument("--troubles", type=int, default=12)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="so many processes, each with its share of the seeds")
    parser.add_argument("--without", choices=[mutation.name for mutation in ALL], help="switch a protection off")
    given = parser.parse_args()
    if given.jobs > 1:
        return _run_jobs(given)
    without = next((mutation for mutation in ALL if mutation.name == given.without), None)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="sim", dir=memory if memory.is_dir() else None) as folder:
        if without is not None:
            return _until_noticed(Path(folder), without, given.seed, given.troubles)
        return _run(Path(folder), given)


def _run_jobs(given: argparse.Namespace) -> int:
    """Run each job's share in a process of its own, which says what comes of it."""
    share, jobs = -(-given.count // given.jobs), []
    for first in range(given.seed, given.seed + given.count, share):
        count = min(share, given.seed + given.count - first)
        command = [sys.executable, "-m", "tests.simulation", "--count", str(count), "--seed", str(first)]
        command += ["--members", str(given.members), "--troubles", str(given.troubles)]
        jobs.append(subprocess.Popen(command))
    return max(job.wait() for job in jobs)


def _run(folder: Path, given: argparse.Namespace) -> int:
    began, failed = time.monotonic(), 0
    for seed in range(given.seed, given.seed + given.count):
        if seed > given.seed and (seed - given.seed) % PROGRESS == 0:
            print(
                f"{seed - given.seed} of {given.count}: {failed} failed, {time.monotonic() - began:.0f} s", flush=True
            )
        members = given.members or _members(seed)
        try:
            line = run_one(folder, seed, members=members, troubles=given.troubles, trace=given.trace)
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


def _until_noticed(folder: Path, without: Mutation, first: int, troubles: int) -> int:
    without.switch_off()
    for number in range(without.schedules):
        seed = first + number
        try:
            run_one(
                folder,
                seed,
                members=without.members or _members(seed),
                troubles=troubles,
                rolling=without.rolling,
                strays=without.strays,
                kinds=without.kinds,
            )
        except Failed as error:
            print(f"{without.name}: noticed in schedule {number + 1} (seed {seed}): {type(error).__name__}: {error}")
            return 0
    print(f"{without.name}: NOT NOTICED in {without.schedules} schedules from seed {first}: {without.protection}")
    return 1


def _members(seed: int) -> int:
    return 5 if seed % 8 == 0 else 3


if __name__ == "__main__":
    sys.exit(main())
