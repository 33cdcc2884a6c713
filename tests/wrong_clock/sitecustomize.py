"""For programs under libfaketime: it breaks clock_nanosleep to a monotonic time (EINVAL), by which time.sleep sleeps."""

import threading
import time


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)


time.sleep = _sleep
