"""Ports for servers that are stopped and started again."""

from __future__ import annotations

import random
import socket

# Below what systems hand out for outgoing connections (from 32768, or 49152): a port of those
# could be taken while its server is down.
_PORTS = range(15000, 32000)
_random = random.SystemRandom()


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port that nothing uses at the moment.

    Raises:
        OSError: a thousand tries found none.
    """
    error = OSError("no free port")
    for _ in range(1000):
        port = _random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as refused:
                error = refused
            else:
                return port
    raise error
