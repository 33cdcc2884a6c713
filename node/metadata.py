"""Keep services away from the cloud's metadata address, which hands out the machine's own credentials.

One nftables table, `slum`, refuses 169.254.169.254 and fd00:ec2::254 to the uids that services have; everyone else, and
other addresses, are untouched. Port 53 stays open, since on Google's cloud that address is the resolver. Needs root
and nft; without root services share a uid with the user, so nothing can be refused to them alone. Must touch no other table.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from slum.node.types import Available, Unavailable
from slum.node.uids import UID_FIRST, UID_LAST

ADDRESSES = (("ip", "169.254.169.254"), ("ip6", "fd00:ec2::254"))
TIMEOUT_S = 5.0
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
RULES = "\n".join(
    (
        "add table inet slum",
        "add chain inet slum metadata { type filter hook output priority filter; policy accept; }",
        "flush chain inet slum metadata",
        *(
            f"add rule inet slum metadata meta skuid {UID_FIRST}-{UID_LAST} {family} daddr {address} {what}"
            for family, address in ADDRESSES
            for what in ("meta l4proto { tcp, udp } th dport 53 accept", "counter reject")
        ),
    )
)


def install() -> Available | Unavailable:
    """Put the rules in place, all or none; the same again when they are there already."""
    if missing := obstacle():
        return missing
    done = _nft("-f", "-", rules=RULES)
    if done.returncode:
        return _refused(done)
    return Available(how="169.254.169.254 is refused to services (nftables table slum)")


def check() -> Available | Unavailable:
    """Return whether the rules are in place, or (changing nothing) whether the kernel would take them."""
    if missing := obstacle():
        return missing
    there = _nft("list", "chain", "inet", "slum", "metadata")
    if there.returncode == 0 and all(address in there.stdout for _, address in ADDRESSES):
        return Available(how="169.254.169.254 is refused to services (nftables table slum)")
    tried = _nft("--check", "-f", "-", rules=RULES)
    if tried.returncode:
        return _refused(tried)
    return Available(how="169.254.169.254 will be refused to services (nftables takes the rules)")


def obstacle() -> Unavailable | None:
    """Return what stands in the way before anything is tried."""
    if os.geteuid() != 0:
        why = "the metadata address cannot be refused to services alone: without root they share your uid"
        return Unavailable(why=why, fix="run slum as root")
    if shutil.which("nft", path=_PATH) is None:
        return Unavailable(
            why="nft is not installed, so services reach the metadata address", fix="apt install nftables"
        )
    return None


def _refused(done: subprocess.CompletedProcess[str]) -> Unavailable:
    why = (done.stderr.strip().splitlines() or ["no reason given"])[0]
    return Unavailable(
        why=f"services reach the metadata address, nftables does not take the rules: {why}",
        fix="allow netfilter (a VM, or a container with CAP_NET_ADMIN)",
    )


def _nft(*words: str, rules: str | None = None) -> subprocess.CompletedProcess[str]:
    argv = [shutil.which("nft", path=_PATH) or "nft", *words]
    return subprocess.run(argv, input=rules, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
