"""Some dozens of simulated schedules, and proof that they would notice: protections are switched off, and something must break.

`make simulate` runs as many as you like, `make simulate-mutations` tries every protection.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNT = 15
QUICK = ("sync-alone", "sync-before-send", "one-vote", "overlap")
"""Those that are noticed within two dozen schedules."""


def simulate(*options: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because the simulation takes the engine's clock and dice."""
    command = [sys.executable, "-m", "tests.simulation", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("part", range(4))
def test_schedules_lose_double_and_reorder_nothing(seed: int, part: int) -> None:
    first = random.Random(seed + part).randrange(1 << 31)
    done = simulate("--count", str(COUNT), "--seed", str(first))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.parametrize("protection", QUICK)
def test_a_protection_that_is_missing_is_noticed(protection: str) -> None:
    done = simulate("--without", protection, "--seed", "1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "noticed in schedule" in done.stdout
