"""What makes no sense is refused where it is said, and harms nothing that runs."""

from __future__ import annotations

import math
import socket
from typing import Any

import pytest

from pgstructured.testing import FaultProxy, VirtualClock, virtual_backend


@pytest.fixture
def upstream():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield server


def pass_one_byte(proxy, upstream):
    with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
        with upstream.accept()[0] as server:
            client.sendall(b"x")
            server.settimeout(10)
            assert server.recv(1) == b"x"


def test_a_proxy_outlives_bad_values(upstream):
    text: Any = "COMMIT"
    direction: Any = "sideways"
    with FaultProxy("127.0.0.1", upstream.getsockname()[1]) as proxy:
        for rate in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match="a rate must be"):
                proxy.throttle(rate)
        for seconds in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match="a delay must be"):
                proxy.delay(seconds)
        for hook in (proxy.hold, proxy.cut, proxy.merge):
            with pytest.raises(TypeError, match="a pattern must be bytes, not str"):
                hook(text)
        with pytest.raises(KeyError):
            proxy.freeze(direction)
        pass_one_byte(proxy, upstream)


def test_a_proxy_takes_a_name(upstream):
    with FaultProxy("localhost", upstream.getsockname()[1]) as proxy:
        pass_one_byte(proxy, upstream)
    with pytest.raises(socket.gaierror):
        FaultProxy("nobody.invalid", 5432)


def test_a_proxy_for_ipv6():
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    with server, FaultProxy("::1", server.getsockname()[1]) as proxy:
        server.settimeout(10)
        pass_one_byte(proxy, server)


@pytest.mark.parametrize("name", ["uvloop", "curio", None])
def test_a_clock_for_no_backend(name):
    with pytest.raises(ValueError, match="a virtual clock is for 'asyncio' or 'trio', not"):
        VirtualClock(name)
    with pytest.raises(ValueError, match="not"):
        virtual_backend(name)


@pytest.mark.parametrize("name", ["asyncio", "trio"])
@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_a_clock_of_no_time(name, seconds):
    with pytest.raises(ValueError, match="autojump must be"):
        VirtualClock(name, autojump=seconds)
    with pytest.raises(ValueError, match="backwards"):
        VirtualClock(name).advance(seconds)
