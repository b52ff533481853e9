"""Octavo servers behind HAProxy, on loopback: each client's calls reach one server, and stay there."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from octavo_client import Client, ConnectionLost, Retry, Session, SessionLost, Timeout
from octavo_client.oracle import AttentionOptions, OracleCache, check
from tests.docker.fleet import ServerProcess, fleet, server_of
from tests.docker.haproxy import CONFIG, Haproxy, Proxy, proxying
from tests.docker.stand_in import OWN_CONNECTION
from tests.waiting import wait_until

NUM_LAYERS, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 2, 4, 2, 16
ROUTES = [f"client-{number}" for number in range(24)]
HASTY = Retry(max_attempts=1)
PATIENT = Retry(max_attempts=1000)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[ServerProcess]]:
    """Three servers."""
    with fleet(3, tmp_path_factory.mktemp("volumes")) as servers:
        yield servers


@pytest.fixture(scope="module")
def proxy(
    haproxy: Haproxy, servers: Sequence[ServerProcess], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """A proxy in front of them, which has seen them."""
    backends = [server.backend for server in servers]
    with proxying(haproxy, tmp_path_factory.mktemp("proxy"), backends) as proxy:
        wait_until(lambda: all(proxy.is_up(backend.name) for backend in backends))
        yield proxy


def servers_by_route(proxy: Proxy, routes: Sequence[str] = ROUTES) -> dict[str, str]:
    """Return the incarnation that each route reaches, over a connection of its own."""
    return {route: server_of(proxy.address, route) for route in routes}


class CheckedSession:
    """A session through the proxy, beside what it must hold."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._rng = np.random.default_rng(5)
        self._layers = [OracleCache(AttentionOptions(HEAD_DIM**-0.5)) for _ in range(NUM_LAYERS)]

    def append(self, num_tokens: int) -> None:
        """Send a prompt."""
        k, v = self._rng.standard_normal(
            (2, NUM_LAYERS, num_tokens, NUM_KV_HEADS, HEAD_DIM), np.float32
        )
        self.session.append(k, v)
        for layer, cache in enumerate(self._layers):
            cache.append(k[layer], v[layer])

    def decode(self) -> None:
        """Send a token through every layer, and check the answers."""
        for layer, cache in enumerate(self._layers):
            q = self._rng.standard_normal((1, NUM_Q_HEADS, HEAD_DIM), np.float32)
            k, v = self._rng.standard_normal((2, 1, NUM_KV_HEADS, HEAD_DIM), np.float32)
            out = self.session.decode(layer, q, k, v)
            start_pos = len(cache)
            cache.append(k, v)
            check(out.out, cache.attend(q, start_pos=start_pos))


def test_a_route_reaches_one_server_and_all_servers_have_some(proxy: Proxy) -> None:
    first = servers_by_route(proxy)
    assert servers_by_route(proxy) == first
    assert len(set(first.values())) == 3


def test_sessions_work_end_to_end(proxy: Proxy) -> None:
    """Unary calls, Append and Decode of one client meet at the session's server; every answer is checked."""
    for route in ROUTES[:6]:
        with Client(proxy.address, route=route) as client:
            checked = CheckedSession(client.open_session("tiny"))
            checked.append(40)
            for _ in range(3):
                checked.decode()
            assert client.get_session(checked.session.session_id).lengths == (43, 43)
            checked.session.close()


def test_clients_without_a_route_go_by_their_address(proxy: Proxy) -> None:
    answers = set()
    for _ in range(4):
        with grpc.insecure_channel(proxy.address, OWN_CONNECTION) as channel:
            call = channel.unary_unary("/octavo.v1.OctavoService/ServerInfo", None, None)
            answers.add(call(b"", timeout=20))
    assert len(answers) == 1


def test_a_dead_server_s_routes_move_and_no_others_and_come_back(
    proxy: Proxy, servers: Sequence[ServerProcess]
) -> None:
    """Its clients are told UNAVAILABLE, then that the session is lost; the others' streams do not notice."""
    before = servers_by_route(proxy)
    dead = before[ROUTES[0]]
    other_route = next(route for route in ROUTES if before[route] != dead)
    killed = server_with(servers, dead)
    timeout = Timeout(call_s=5.0, step_s=5.0)
    with (
        Client(proxy.address, route=other_route) as unmoved,
        Client(proxy.address, route=ROUTES[0], timeout=timeout, retry=HASTY) as moved,
    ):
        staying = CheckedSession(unmoved.open_session("tiny"))
        staying.decode()
        lost = CheckedSession(moved.open_session("tiny"))
        lost.decode()
        killed.kill()
        with pytest.raises(ConnectionLost):
            lost.decode()
        staying.decode()
        wait_until(lambda: not proxy.is_up(killed.backend.name))
        after = servers_by_route(proxy)
        assert {route for route in ROUTES if after[route] != before[route]} == {
            route for route in ROUTES if before[route] == dead
        }
        assert dead not in after.values()
        with pytest.raises(SessionLost):
            lost.session.refresh()
        staying.decode()
        killed.restart()
        wait_until(lambda: proxy.is_up(killed.backend.name))
        returned = servers_by_route(proxy)
        new = server_of(f"127.0.0.1:{killed.backend.port}", "any")
        assert returned == {
            route: new if before[route] == dead else before[route] for route in ROUTES
        }
        staying.decode()
        staying.session.close()


def test_a_server_that_restarts_on_its_snapshots_is_waited_for(
    haproxy: Haproxy, servers: Sequence[ServerProcess], tmp_path: Path
) -> None:
    """A proxy that gives it that time moves no route, and its client's next step continues by itself."""
    backends = [server.backend for server in servers]
    with proxying(haproxy, tmp_path, backends, OCTAVO_PROXY_CHECK_FALL="1000") as proxy:
        wait_until(lambda: all(proxy.has_checked(backend.name) for backend in backends))
        with Client(proxy.address, route="a", retry=PATIENT, timeout=Timeout(step_s=60)) as client:
            checked = CheckedSession(client.open_session("tiny"))
            checked.append(20)
            checked.decode()
            restarted = server_with(servers, client.server_info().incarnation)
            restarted.terminate()
            with ThreadPoolExecutor(1) as threads:
                waiting = threads.submit(checked.decode)
                restarted.restart()
                waiting.result()
            checked.decode()
            assert checked.session.lengths == (23, 23)
            checked.session.close()


def server_with(servers: Sequence[ServerProcess], incarnation: str) -> ServerProcess:
    """Return the server of an incarnation."""
    return next(
        server
        for server in servers
        if server_of(f"127.0.0.1:{server.backend.port}", "any") == incarnation
    )


def test_nothing_in_the_configuration_cuts_a_stream() -> None:
    """A Decode stream may be silent for as long as its client likes; so no timeout of a call is short."""
    calls = CONFIG.read_text(encoding="utf-8").partition("defaults octavo\n")[2]
    timeouts = dict(
        line.split()[1:] for line in calls.splitlines() if line.startswith("    timeout ")
    )
    for name in ("client", "server", "tunnel", "http-keep-alive"):
        assert timeouts[name].endswith("d"), name
        assert datetime.timedelta(days=int(timeouts[name][:-1])) > datetime.timedelta(days=1)
