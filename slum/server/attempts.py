"""How often strangers may try to join or renew: a bucket for each address and one for all, bounded; pure but for its memory.

Nobody guesses 160 bits; this bounds what trying costs us (a signature, an entry of the ledger, a line of the log).
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict

A_SECOND, AT_ONCE = 2.0, 40.0
"""Of one address: forty machines behind one may join at once."""
ALL_A_SECOND, ALL_AT_ONCE = 50.0, 400.0
ADDRESSES_MAX = 2000


class Attempts:
    def __init__(self) -> None:
        self._all = (ALL_AT_ONCE, 0.0)
        self._by_source: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str, now: float) -> bool:
        """Return whether one more attempt from *address* is taken at *now* (monotonic seconds), and count it."""
        source = source_of(address)
        left, at = self._by_source.pop(source, (AT_ONCE, now))
        mine = min(AT_ONCE, left + (now - at) * A_SECOND)
        left, at = self._all
        everybody = min(ALL_AT_ONCE, left + (now - at) * ALL_A_SECOND)
        taken = mine >= 1 and everybody >= 1
        self._by_source[source] = (mine - taken, now)
        self._all = (everybody - taken, now)
        if len(self._by_source) > ADDRESSES_MAX:
            self._by_source.popitem(last=False)
        return taken


def source_of(address: str) -> str:
    """Return what counts as one source: an IPv4 address, or the /64 of an IPv6 one, which one customer is given."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ip.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)
