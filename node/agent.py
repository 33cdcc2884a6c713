"""The agent: ``python -m slum.node.agent --data-dir D --run-dir R``, kept alive by the keeper, which it guards in turn.

This is its start; machine.py is what it does. It may be killed at any moment: services do not notice, and the next one
takes over what runs. Must never import what the agent does not use: it shares a machine with hundreds of services.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

LEFT_OUT = ("rich",)
"""What structlog would load when it is there."""
LEFT_OUT_AT_HOME = ("ssl",)
"""What asyncio would load: an agent beside its own control plane speaks to unix sockets only, which saves 5 MB."""


def run(arguments: list[str]) -> int:
    """Parse *arguments*, be the agent, and return the exit status: 0 after SIGTERM, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="slum-agent", description="slum's node agent; started by the keeper")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--run-dir", required=True, type=Path)
    options = parser.parse_args(arguments)
    is_node = (options.data_dir / "agent" / "home.json").exists()
    for name in LEFT_OUT if is_node else LEFT_OUT + LEFT_OUT_AT_HOME:
        sys.modules[name] = None  # type: ignore[assignment]  # documented: makes the import fail

    import asyncio

    from slum import log
    from slum.alive import Alive
    from slum.node.machine import live
    from slum.paths import checked_home

    logger = log.start("agent")
    home = checked_home(options.data_dir, options.run_dir)
    os.umask(0o022)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(live(home), name="agent")
        _alive = loop.create_task(Alive().keep_telling(), name="alive")
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            logger.info("agent_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
