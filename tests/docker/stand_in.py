"""What a proxy sees of a server, in this process: health, and calls that answer health too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from tests.docker.haproxy import Backend

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stand-in listens; port 0 takes a free one.

    Attributes:
        host: Its address.
        port: Of the calls.
        health_port: Of health.
    """

    host: str = "127.0.0.1"
    port: int = 0
    health_port: int = 0


@contextmanager
def health_server(
    port_credentials: grpc.ServerCredentials | None = None,
    name: str = "octavo-0",
    place: Place = Place(),
) -> Iterator[tuple[Backend, health.HealthServicer]]:
    """Run a stand-in, its calls maybe in TLS; only it says of the service of its own name that it serves."""
    server = grpc.server(ThreadPoolExecutor(4))
    servicer = health.HealthServicer()
    servicer.set(name, SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    health_port = server.add_insecure_port(f"{place.host}:{place.health_port}")
    address = f"{place.host}:{place.port}"
    if port_credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, port_credentials)
    server.start()
    try:
        yield Backend(name, port, health_port), servicer
    finally:
        server.stop(None).wait()


def health_code(
    address: str,
    route: str,
    credentials: grpc.ChannelCredentials | None = None,
    service: str = "ready",
) -> grpc.StatusCode:
    """Return what a new client with a route is answered."""
    with _channel(address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            stub.Check(request, timeout=20, metadata=(("octavo-route", route),))
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def _channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    if credentials is None:
        return grpc.insecure_channel(address, OWN_CONNECTION)
    options = [*OWN_CONNECTION, ("grpc.ssl_target_name_override", "octavo")]
    return grpc.secure_channel(address, credentials, options)
