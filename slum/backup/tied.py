"""Run a program that dies with whoever started it: ``python tied.py PARENT_PID PROGRAM ARGUMENTS...``.

The kernel sends SIGKILL when the parent's thread ends (prctl(2), PR_SET_PDEATHSIG), however it ends: no Litestream of a
killed backup process goes on writing beside the next one's. Set here, after fork, because code between fork and exec in
a process with threads may hang. Standard library only: it is run as a file, by a bare interpreter.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    parent, *command = arguments
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(parent):
        sys.exit("the parent ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
