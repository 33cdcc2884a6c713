"""`python -m tests.chaos --minutes 5 --seed 1 [--members 3|5] [--epoch-entries N|default] [--seeds 20]`: break a cluster, and see what it costs.

Status 1 when something acknowledged was lost, doubled or reordered, members differ, a history is not linearizable, a service was
disturbed, or the cluster did not mend itself. docs/chaos.md says what is done and checked.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import traceback
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster_site import missing_tools

from chaos.run import Plan, Report, run
from chaos.schedule import schedule
from chaos.site import remove_left

SHOWN = 12
"""Steps of the schedule that are printed before; a run does as many as it has time for."""


def main() -> int:
    given = _parse()
    if os.geteuid() != 0 or missing_tools():
        print(f"needs root, and {', '.join(missing_tools()) or 'nothing else'}", file=sys.stderr)
        return 2
    if given.remove:
        remove_left(given.remove)
        return 0
    os.nice(given.nice)
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignore ctrl-C
        signal.signal(number, lambda *_: _interrupt())
    reports = []
    for seed in range(given.seed, given.seed + given.seeds):
        try:
            reports.append(_one(given, seed))
        except KeyboardInterrupt:
            print("interrupted: all that was made is gone", flush=True)
            return 130
    failed = [report.seed for report in reports if report.problems]
    print(f"{len(reports) - len(failed)} of {len(reports)} runs clean" + (f"; failed: {failed}" if failed else ""))
    return 1 if failed else 0


def _one(given: argparse.Namespace, seed: int) -> Report:
    epochs = None if given.epoch_entries == "default" else int(given.epoch_entries)
    words = f"--minutes {given.minutes:g} --members {given.members} --epoch-entries {given.epoch_entries}"
    print(f"== seed {seed}; again: python -m tests.chaos --seed {seed} {words}")
    for step in islice(schedule(seed), SHOWN):
        print(f"   {step}")
    keep = given.keep / f"{seed}-{given.epoch_entries}"
    plan = Plan(
        seed=seed, seconds=given.minutes * 60, members=given.members, epoch_entries=epochs, steps=given.steps, keep=keep
    )
    try:
        report = run(plan, lambda text: print(text, flush=True))
    except Exception as error:  # noqa: BLE001  one bad run is a result; the next seed is tried
        traceback.print_exc()
        report = Report(seed, [f"{type(error).__name__}: {error}"])
    print(report, flush=True)
    if report.problems:
        print(f"   logs and history: {keep}")
    else:
        shutil.rmtree(keep, ignore_errors=True)
    return report


def _interrupt() -> None:
    """Once: while all is being removed nothing may interrupt that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description="Break a cluster; check what it promised."
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults, a run")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--seeds", type=int, default=1, help="so many runs, with the seeds from --seed on")
    parser.add_argument("--members", type=int, choices=(3, 5), default=3)
    parser.add_argument("--epoch-entries", default="50", metavar="N", help="seal after so many, or `default`")
    parser.add_argument("--steps", type=int, help="at most so many steps")
    parser.add_argument("--keep", type=Path, default=Path("/tmp/slum-chaos"), help="where logs of a failure go")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument(
        "--remove", metavar="TOKEN", help="remove what a run that was killed has left, and do nothing else"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
