"""What all tests share: CI turns a skip for want of a tool into a failure, and every run prints its seed."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import httpx
    from server_support import Plane

SEED = int(os.environ.get("SLUM_TEST_SEED") or random.SystemRandom().randrange(2**32))


def pytest_report_header() -> str:
    return f"slum seed: {SEED} (set SLUM_TEST_SEED to replay)"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed; shown with a failing test because captured output is."""
    sys.stdout.write(f"seed {SEED}\n")
    return SEED


@pytest.fixture
def plane() -> Iterator[Plane]:
    """A ledger and a server of their own, for one test."""
    from server_support import a_plane  # what most tests do without

    with a_plane() as made:
        yield made


@pytest.fixture
async def http(plane: Plane) -> AsyncIterator[httpx.AsyncClient]:
    """The API of *plane*, once it answers."""
    await plane.ready()
    async with plane.http() as client:
        yield client


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where every tool must be there: {report.longrepr}"
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("needs root")
