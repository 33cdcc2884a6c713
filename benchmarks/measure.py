"""What the benchmarks share: medians, waiting for a first byte, and one way to print a ratio against its bound."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE_S = 5.0


def first_byte(path: Path, *, since: float) -> float:
    """Return the seconds from *since* (perf_counter) until the socket at *path* gave a byte."""
    deadline = time.perf_counter() + PATIENCE_S
    while time.perf_counter() < deadline:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
                if client.recv(1):
                    return time.perf_counter() - since
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.0002)
    raise TimeoutError(f"no byte from {path} within {PATIENCE_S} s")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """CPU seconds that *pid* has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(
    what: str, ours: Sequence[float], peers: Sequence[float], *, bound: float, unit: str = "ms", scale: float = 1000
) -> bool:
    """Print medians, spread and ratio of *ours* to *peers*; return whether the ratio is within *bound*."""
    mine, theirs = statistics.median(ours), statistics.median(peers)
    ratio = mine / theirs
    verdict = "ok" if ratio <= bound else "OVER"
    print(
        f"{what:34} slum {mine * scale:8.2f} {unit} [{min(ours) * scale:.2f}..{max(ours) * scale:.2f}]"
        f"   peer {theirs * scale:8.2f} {unit} [{min(peers) * scale:.2f}..{max(peers) * scale:.2f}]"
        f"   ratio {ratio:.2f} (bound {bound})  {verdict}"
    )
    return ratio <= bound
