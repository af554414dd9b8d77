"""A port where the ranks of one machine meet."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)  # below those that Linux gives to connections


def free_port() -> int:
    """One of PORTS that nobody listens on: it stays free for the seconds until rank 0 is there. OSError if none is."""
    for port in random.SystemRandom().sample(PORTS, 100):  # a seed would send all runs of a machine to one port
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"found no free port on 127.0.0.1 between {PORTS.start} and {PORTS.stop}; set MASTER_PORT")
