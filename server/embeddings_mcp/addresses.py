"""What a host's name or address says of where it is."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine."""
    name = host.lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = numeric_address(host)
    return address is not None and address.is_loopback


def numeric_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The numeric address that `host` is; None where it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
