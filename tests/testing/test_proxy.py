"""The proxy: what gets through, and what does not."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time

import psycopg
import pytest

from pgstructured.testing import FaultProxy, _relay
from pgstructured.testing._ports import free_port

SILENCE = 0.1
"""Seconds in which nothing must come. Nothing waits for it to pass when all is well."""


@pytest.fixture
def upstream():
    """A listening socket: the server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(10)
        yield listener


@pytest.fixture
def proxy(upstream):
    with FaultProxy(*upstream.getsockname()) as proxy:
        yield proxy


class Ends:
    """A client and its server, with the proxy between them."""

    def __init__(self, proxy, upstream):
        self.client = socket.create_connection((proxy.host, proxy.port), timeout=10)
        self.server, _ = upstream.accept()
        self.server.settimeout(10)

    def close(self):
        self.client.close()
        self.server.close()


@pytest.fixture
def ends(proxy, upstream):
    with contextlib.closing(Ends(proxy, upstream)) as ends:
        yield ends


def assert_reset(proxy):
    # Sometimes before the client knows that it was connected.
    with pytest.raises(ConnectionResetError):
        with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
            client.recv(1)


def close_with_reset(end):
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _relay._LINGER_RESET)
    end.close()


def is_silent(end):
    return not select.select([end], [], [], SILENCE)[0]


def receive(end, count):
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        assert more, f"ended after {data!r}"
        data += more
    return data


# ---------------------------------------------------------------- passing on


def test_passes_on_both_ways_and_the_end(proxy, ends):
    assert proxy.connections == proxy.accepted == 1
    ends.client.sendall(b"question")
    assert receive(ends.server, 8) == b"question"
    ends.server.sendall(b"answer")
    assert receive(ends.client, 6) == b"answer"
    ends.client.shutdown(socket.SHUT_WR)
    assert ends.server.recv(1) == b""
    ends.server.sendall(b"last word")
    ends.server.close()
    assert receive(ends.client, 9) == b"last word"
    assert ends.client.recv(1) == b""
    proxy.wait_connections(0)
    assert proxy.accepted == 1


def test_passes_on_more_than_any_buffer(proxy, ends):
    data = bytes(range(256)) * 100_000
    sender = threading.Thread(target=ends.client.sendall, args=(data,))
    sender.start()
    time.sleep(SILENCE)  # until all buffers on the way are full
    assert sender.is_alive()
    assert receive(ends.server, len(data)) == data
    sender.join()


def test_passes_on_a_reset_after_the_bytes_before_it(proxy, ends):
    ends.client.sendall(b"last")
    close_with_reset(ends.client)
    assert receive(ends.server, 4) == b"last"
    with pytest.raises(ConnectionResetError):
        ends.server.recv(1)
    proxy.wait_connections(0)


def test_a_server_that_is_not_there(proxy, upstream):
    upstream.close()
    assert_reset(proxy)
    proxy.wait_connections(0)


def test_a_server_that_can_not_be_reached():
    # Refused by the kernel at once, without a packet: no route for broadcast.
    with FaultProxy("255.255.255.255", 9) as proxy:
        assert_reset(proxy)


# ---------------------------------------------------------------- ends


def test_reset(proxy, ends):
    proxy.reset()
    assert proxy.connections == 0
    for end in (ends.client, ends.server):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_fin(proxy, ends):
    ends.client.sendall(b"first")
    assert receive(ends.server, 5) == b"first"
    proxy.fin()
    assert ends.client.recv(1) == ends.server.recv(1) == b""
    ends.client.sendall(b"dropped")
    ends.client.close()
    ends.server.close()
    proxy.wait_connections(0)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_half_close(proxy, ends, direction):
    source, target = (ends.client, ends.server)[:: 1 if direction == "up" else -1]
    proxy.half_close(direction)
    proxy.half_close(direction)
    assert target.recv(1) == b""
    source.sendall(b"dropped")
    target.sendall(b"the other way")
    assert receive(source, 13) == b"the other way"


def test_half_close_before_there_is_a_server(proxy, upstream):
    proxy.freeze()
    with socket.create_connection((proxy.host, proxy.port), timeout=10):
        proxy.wait_accepted(1)
        proxy.half_close("up")
        proxy.thaw()
        server, _ = upstream.accept()
        assert server.recv(1) == b""
        server.close()


def test_half_close_after_a_reset_that_was_not_seen(proxy, ends):
    proxy.freeze()
    close_with_reset(ends.client)
    close_with_reset(ends.server)
    assert proxy.connections == 1
    proxy.fin()
    proxy.wait_connections(0)


def test_a_reset_that_only_sending_shows(proxy, ends):
    proxy.freeze("down")
    close_with_reset(ends.server)
    ends.client.sendall(b"into the void")
    with pytest.raises(ConnectionResetError):
        ends.client.recv(1)
    proxy.wait_connections(0)


def test_both_ends_at_once(proxy, ends):
    proxy.freeze()
    ends.client.close()
    close_with_reset(ends.server)
    proxy.thaw()
    proxy.wait_connections(0)


def test_refuse_and_accept(proxy, ends, upstream):
    proxy.refuse()
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), timeout=10)
    ends.client.sendall(b"goes on")
    assert receive(ends.server, 7) == b"goes on"
    proxy.accept()
    proxy.accept()
    with contextlib.closing(Ends(proxy, upstream)):
        assert proxy.accepted == 2


def test_accepting_again_fails_at_the_caller(proxy):
    proxy.refuse()
    with socket.socket() as taken:
        taken.bind((proxy.host, proxy.port))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            proxy.accept()
    proxy.accept()


# ---------------------------------------------------------------- slow


@pytest.mark.parametrize("direction", ["up", "down"])
def test_freeze_one_way(proxy, ends, direction):
    source, target = (ends.client, ends.server)[:: 1 if direction == "up" else -1]
    proxy.freeze(direction)
    source.sendall(b"later")
    target.sendall(b"now")
    assert receive(source, 3) == b"now"
    assert is_silent(target)
    proxy.thaw(direction)
    assert receive(target, 5) == b"later"


def test_the_end_does_not_pass_what_is_frozen(proxy, ends):
    proxy.freeze()
    ends.client.sendall(b"late")
    ends.client.close()
    assert is_silent(ends.server)
    proxy.thaw()
    assert receive(ends.server, 4) == b"late"
    assert ends.server.recv(1) == b""


def test_a_connection_made_while_frozen_is_silent(proxy, upstream):
    proxy.freeze()
    with socket.create_connection((proxy.host, proxy.port), timeout=10) as client:
        client.sendall(b"hello")
        assert is_silent(client)
        assert is_silent(upstream)
        proxy.thaw()
        server, _ = upstream.accept()
        server.settimeout(10)
        assert receive(server, 5) == b"hello"
        server.close()


def test_delay(proxy, ends):
    proxy.delay(0.2, "up")
    started = time.monotonic()
    ends.client.sendall(b"late")
    ends.client.shutdown(socket.SHUT_WR)
    assert receive(ends.server, 4) == b"late"
    assert time.monotonic() - started >= 0.2
    assert ends.server.recv(1) == b""
    proxy.delay(0)
    ends.server.sendall(b"x")
    assert receive(ends.client, 1) == b"x"


def test_throttle(proxy, ends):
    proxy.throttle(10_000, "down")
    started = time.monotonic()
    ends.server.sendall(bytes(2_000))
    receive(ends.client, 2_000)
    assert time.monotonic() - started >= 0.15
    proxy.throttle(None)
    ends.server.sendall(bytes(1_000_000))
    receive(ends.client, 1_000_000)


# ---------------------------------------------------------------- patterns


def test_hold_and_release(proxy, ends):
    proxy.hold(b"STOP")
    proxy.hold(b"NEVER")
    ends.server.sendall(b"before STOP after")
    assert receive(ends.client, 7) == b"before "
    proxy.wait_held()
    ends.server.sendall(b", and more")
    assert is_silent(ends.client)
    proxy.release()
    assert receive(ends.client, 20) == b"STOP after, and more"
    ends.server.sendall(b"STOP, NEVER")
    assert receive(ends.client, 11) == b"STOP, NEVER"


def test_hold_across_pieces(proxy, ends):
    proxy.hold(b"STOP", "up")
    ends.client.sendall(b"go ST")
    assert receive(ends.server, 5) == b"go ST"
    ends.client.sendall(b"OP now")
    proxy.wait_held()
    assert is_silent(ends.server)
    proxy.release("up")
    assert receive(ends.server, 6) == b"OP now"


def test_hold_is_for_one_connection(proxy, ends, upstream):
    proxy.hold(b"S", "up")
    ends.client.sendall(b"S")
    proxy.wait_held()
    with contextlib.closing(Ends(proxy, upstream)) as others:
        others.client.sendall(b"S")
        assert receive(others.server, 1) == b"S"
    ends.client.close()
    assert is_silent(ends.server)  # what is held stands before the end


def test_cut(proxy, ends):
    proxy.cut(b"END")
    ends.client.sendall(b"to the EN")
    ends.client.sendall(b"D and no further")
    assert receive(ends.server, 10) == b"to the END"
    for end in (ends.client, ends.server):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_merge(proxy, ends):
    proxy.hold(b"much later")
    proxy.merge(b"three")
    for piece in (b"one ", b"two "):
        ends.server.sendall(piece)
        proxy.wait_held()
        assert is_silent(ends.client)
    ends.server.sendall(b"three")
    select.select([ends.client], [], [], 10)
    assert ends.client.recv(100) == b"one two three"
    ends.server.sendall(b"four")
    assert ends.client.recv(100) == b"four"


def test_an_empty_pattern(proxy):
    with pytest.raises(ValueError, match="empty pattern"):
        proxy.hold(b"")


# ---------------------------------------------------------------- itself


def test_waits_have_a_deadline(proxy):
    with pytest.raises(TimeoutError, match="no 2 open connections within"):
        proxy.wait_connections(2, timeout=0.01)
    with pytest.raises(TimeoutError, match="no held bytes"):
        proxy.wait_held(timeout=0.01)


def test_closed(upstream):
    proxy = FaultProxy(*upstream.getsockname())
    proxy.close()
    proxy.close()
    assert not [t for t in threading.enumerate() if t.name == "pgstructured-fault-proxy"]
    with pytest.raises(RuntimeError, match="closed"):
        proxy.freeze()


def test_a_taken_port_is_left_to_its_owner(upstream, monkeypatch):
    ports = [upstream.getsockname()[1]]  # then any: one found before may be taken by then
    monkeypatch.setattr(_relay, "free_port", lambda _: ports.pop() if ports else free_port())
    with FaultProxy(*upstream.getsockname()) as proxy:
        assert proxy.port != upstream.getsockname()[1]


def test_no_port_at_all(upstream, monkeypatch):
    monkeypatch.setattr(_relay, "free_port", lambda _: upstream.getsockname()[1])
    with pytest.raises(OSError, match="in use"):
        FaultProxy(*upstream.getsockname())


def test_many_wake_ups_at_once(proxy, ends):
    threads = [threading.Thread(target=lambda: [proxy.thaw() for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends.client.sendall(b"x")
    assert receive(ends.server, 1) == b"x"


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (
            "postgresql://u@h:1/d?application_name=b%20c",
            "postgresql://u@{}/d?application_name=b%20c",
        ),
        ("host=h hostaddr=1.2.3.4 port=5 dbname='x/y' user='u u'", "postgresql://u%20u@{}/x%2Fy"),
        ("postgresql://u:p%40@h/d", "postgresql://u:p%40@{}/d"),
        ("", "postgresql://{}/"),
    ],
)
def test_dsn(proxy, base, expected):
    assert proxy.dsn(base) == expected.format(f"{proxy.host}:{proxy.port}")


# ---------------------------------------------------------------- with a server


def closing_connection(dsn):
    return contextlib.closing(psycopg.connect(dsn))


def answer(connection):
    # libpq's own wait would keep the interpreter's lock, and with it the proxy's thread.
    while connection.pgconn.is_busy():
        assert select.select([connection.fileno()], [], [], 10)[0]
        connection.pgconn.consume_input()
    return connection.pgconn.get_result()


def test_a_commit_whose_answer_is_lost(pg_cluster, pg_dsn, fault_proxy):
    with closing_connection(fault_proxy.dsn(pg_dsn)) as connection:
        connection.execute("create table t as select 1")
        fault_proxy.cut(b"COMMIT\0")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    # The server acts on it in its own time.
    deadline = time.monotonic() + 10
    while pg_cluster.sessions(pg_dsn):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with closing_connection(pg_dsn) as connection:
        assert connection.execute("select count(*) from t").fetchone() == (1,)


def test_cancel_requests_are_frozen_too(pg_dsn, fault_proxy):
    # With TLS in question the request would wait for an answer before it is sent.
    dsn = psycopg.conninfo.make_conninfo(fault_proxy.dsn(pg_dsn), sslmode="disable")
    with closing_connection(dsn) as connection:
        connection.pgconn.send_query(b"select pg_sleep(600)")
        with psycopg.connect(pg_dsn, autocommit=True) as other:
            is_active = "select count(*) from pg_stat_activity where wait_event = 'PgSleep'"
            while other.execute(is_active).fetchone() == (0,):
                time.sleep(0.005)
        fault_proxy.freeze()
        with pytest.raises(psycopg.errors.CancellationTimeout):
            connection.cancel_safe(timeout=0.2)
        fault_proxy.thaw()
        # The request arrives late, and does what it was for.
        assert answer(connection).error_field(ord("C")) == b"57014"


def test_while_the_loop_is_blocked(pg_dsn, fault_proxy):
    # The client blocks this thread; the proxy goes on in its own.
    with closing_connection(fault_proxy.dsn(pg_dsn)) as connection:
        fault_proxy.freeze("down")
        timer = threading.Timer(0.1, fault_proxy.thaw)
        timer.start()
        assert connection.execute("select 1").fetchone() == (1,)
        timer.join()


def test_what_has_ended_is_woken_in_vain():
    """The thread may do what it is told, and end, before it is woken for it."""
    relay = _relay.Relay(("127.0.0.1", free_port("127.0.0.1")))
    relay.wake()
    relay.close()
    relay.wake()
