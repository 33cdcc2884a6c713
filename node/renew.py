"""Renew this machine's certificate: ``python -m slum.node.renew --data-dir D --run-dir R``, a child of the agent.

The key stays: a request signed by it and the old certificate are all that is asked with, so an expired one renews as well.
A process of its own because what makes requests takes 9 MB. Its last line on stderr says why it failed.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import msgspec

from slum import api
from slum.errors import SlumError, Unreachable
from slum.node import home as homes
from slum.node.front import ask
from slum.node.join import keep_answer
from slum.paths import Home, checked_home
from slum.pki.request import make_request

ASK_S = 10.0


def renew(home: Home) -> homes.HomeFile:
    """Have a new certificate on disk and return home.json as it is then; SlumError when no member gives one."""
    told = homes.read_home(home)
    if told is None:
        raise SlumError(f"{homes.files(home).home} is not there: this machine has joined no fleet")
    of = homes.files(home)
    tls = homes.trusting(of.authority.read_text())
    request = api.RenewRequest(
        certificate=of.certificate.read_text(), csr=make_request(of.key.read_bytes()), host=homes.host_name()
    )
    whys: list[SlumError] = []
    for url in (*random.sample(told.servers, len(told.servers)), *told.joined):
        try:
            answer = ask(url, "POST", "/v1/renew", kind=api.JoinAnswer, tls=tls, timeout_s=ASK_S, body=request)
        except SlumError as error:
            whys.append(error)
            continue
        return keep_answer(home, answer, msgspec.structs.replace(told, servers=answer.servers or told.servers))
    raise next((why for why in whys if not isinstance(why, Unreachable)), whys[0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m slum.node.renew", description="Renew this node's certificate.")
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--run-dir", required=True, type=Path)
    options = parser.parse_args(arguments)
    try:
        renew(checked_home(options.data_dir, options.run_dir))
    except (SlumError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
