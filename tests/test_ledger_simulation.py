"""Some hundreds of simulated schedules: the real engine and files under a simulated clock, network, dice and power."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COUNT = 25


@pytest.mark.parametrize("part", range(4))
def test_schedules_lose_double_and_reorder_nothing(seed: int, part: int) -> None:
    """In a process of its own, because the simulation takes the engine's clock and dice."""
    first = random.Random(seed + part).randrange(1 << 31)
    command = [sys.executable, "-m", "tests.simulation", "--count", str(COUNT), "--seed", str(first)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
