"""Which servers HAProxy sends clients to, and how it speaks to both, with stand-ins for the servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
import trustme

from tests.docker.haproxy import Haproxy, Proxy, proxying
from tests.docker.stand_in import NOT_SERVING, SERVING, health_code, health_server
from tests.waiting import wait_until

ROUTES = [f"client-{number}" for number in range(24)]


def test_a_server_has_routes_while_it_says_that_it_is_ready(
    haproxy: Haproxy, tmp_path: Path
) -> None:
    """`live` and the empty name do not count: a server that drains is alive."""
    with health_server() as (backend, servicer), proxying(haproxy, tmp_path, [backend]) as proxy:
        servicer.set("live", SERVING)
        wait_until(lambda: not proxy.is_up("octavo-0"))
        assert not proxy.is_ready()
        servicer.set("ready", SERVING)
        wait_until(lambda: proxy.is_up("octavo-0"))
        assert proxy.is_ready()
        servicer.set("ready", NOT_SERVING)
        wait_until(lambda: not proxy.is_up("octavo-0"))
        assert 'server="octavo-0",state="L7RSP"} 1' in proxy.metrics()


def test_a_server_may_be_away_for_a_while(haproxy: Haproxy, tmp_path: Path) -> None:
    """Until it is given up, its clients are told UNAVAILABLE, which they survive, and nobody moves."""
    with ExitStack() as stack:
        backends = []
        for name in ("octavo-0", "octavo-1"):
            leaving = stack.enter_context(ExitStack())
            backend, servicer = leaving.enter_context(health_server(name=name))
            servicer.set("ready", SERVING)
            backends.append(backend)
        away = {"OCTAVO_PROXY_CHECK_FALL": "1000"}
        proxy = stack.enter_context(proxying(haproxy, tmp_path, backends, **away))
        wait_until(lambda: all(proxy.has_checked(backend.name) for backend in backends))
        assert health_codes(proxy) == {grpc.StatusCode.OK}
        leaving.close()
        codes = health_codes(proxy)
        assert proxy.is_up("octavo-1")
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def health_codes(proxy: Proxy) -> set[grpc.StatusCode]:
    """Return what all routes are answered; at once, for HAProxy tries a server that is away for 3 seconds."""
    with ThreadPoolExecutor(len(ROUTES)) as threads:
        return set(threads.map(lambda route: health_code(proxy.address, route), ROUTES))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Kubernetes mounts a TLS secret: tls.crt for the name octavo, tls.key, ca.crt."""
    folder = tmp_path_factory.mktemp("pki")
    authority = trustme.CA()
    certificate = authority.issue_cert("octavo")
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "tls.crt"))
    certificate.private_key_pem.write_to_path(str(folder / "tls.key"))
    return folder


def test_tls_on_both_sides(haproxy: Haproxy, pki: Path, tmp_path: Path) -> None:
    """Clients and servers both ask for a certificate; a client without one is refused."""
    authority, cert, key = ((pki / name).read_bytes() for name in ("ca.crt", "tls.crt", "tls.key"))
    server_side = grpc.ssl_server_credentials([(key, cert)], authority, require_client_auth=True)
    files = {
        "OCTAVO_PROXY_CERT": pki / "tls.crt",
        "OCTAVO_PROXY_CLIENT_CA": pki / "ca.crt",
        "OCTAVO_PROXY_SERVER_CA": pki / "ca.crt",
        "OCTAVO_PROXY_SERVER_CERT": pki / "tls.crt",
    }
    variables = {name: str(path) for name, path in files.items()}
    with (
        health_server(server_side) as (backend, servicer),
        proxying(haproxy, tmp_path, [backend], **variables) as proxy,
    ):
        servicer.set("ready", SERVING)
        wait_until(lambda: proxy.is_up("octavo-0"))
        trusted = grpc.ssl_channel_credentials(authority, key, cert)
        assert health_code(proxy.address, "a", trusted) == grpc.StatusCode.OK
        nameless = grpc.ssl_channel_credentials(authority)
        assert health_code(proxy.address, "a", nameless) == grpc.StatusCode.UNAVAILABLE


def test_a_server_with_another_name_is_not_trusted(
    haproxy: Haproxy, pki: Path, tmp_path: Path
) -> None:
    cert, key = ((pki / name).read_bytes() for name in ("tls.crt", "tls.key"))
    variables = {
        "OCTAVO_PROXY_SERVER_CA": str(pki / "ca.crt"),
        "OCTAVO_PROXY_SERVER_NAME": "somebody",
    }
    with (
        health_server(grpc.ssl_server_credentials([(key, cert)])) as (backend, servicer),
        proxying(haproxy, tmp_path, [backend], **variables) as proxy,
    ):
        servicer.set("ready", SERVING)
        assert health_code(proxy.address, "a") == grpc.StatusCode.UNAVAILABLE
