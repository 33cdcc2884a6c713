"""Compress rotated log files, as a program: ``python -m slum.node.logcompress FOLDER``, niced to the last."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from slum.node.logfiles import compress_all


def main(arguments: list[str]) -> int:
    """Compress what is below the one folder named; 0, or 1 with the reason as the last line of stderr."""
    os.nice(19)
    try:
        compress_all(Path(arguments[0]))
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
