"""A running site for each test that asks for one; what failed is printed from its logs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_site import Site
from members_support import Cluster, members_and_more


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        yield site
    finally:
        report = request.node.stash.get(FAILED, False)
        if report:
            for log in sorted(site.data.glob("logs/*/*/current")):
                tail = log.read_text(errors="replace").splitlines()[-25:]
                print(f"--- {log.relative_to(site.data)}", *tail, sep="\n")
        site.close()


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Several members, shared by the tests of a file; when one of them failed, the logs are printed at the end."""
    failed = request.session.testsfailed
    with members_and_more() as made:
        yield made
        if request.session.testsfailed > failed:
            made.show_logs()


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.when == "call" and report.failed:
        item.stash[FAILED] = True
    return report
