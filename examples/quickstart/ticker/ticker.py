"""A worker: one line every five seconds, and a clean end on SIGTERM."""

import signal
import sys
import time

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
count = 0
while True:
    count += 1
    print(f"tick {count}")
    time.sleep(5)
