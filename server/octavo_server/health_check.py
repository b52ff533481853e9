"""The command `octavo-server health`: asks a server's gRPC health service once; no torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo_server.backends.base import UnsupportedError

SERVING = health_pb2.HealthCheckResponse.SERVING


@dataclass(frozen=True, slots=True)
class Health:
    """What a server said of itself.

    Attributes:
        is_serving: Whether it said SERVING.
        text: One line: the target, the service, and the answer, or why there was none.
    """

    is_serving: bool
    text: str


def check_health(target: str, service: str, tls_ca: Path | None, timeout_s: float) -> Health:
    """Ask for the health of one service.

    Args:
        target: HOST:PORT or unix:PATH.
        service: "ready", "live" or "", as the server names them.
        tls_ca: PEM file with the authorities to trust; None speaks plain text.
        timeout_s: Seconds to wait, connecting included.

    Raises:
        UnsupportedError: `tls_ca` cannot be read.
    """
    what = f"{target} {service}".rstrip()
    with _channel(target, tls_ca) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            answer = stub.Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            why = " ".join(str(error.details()).split())
            return Health(False, f"{what}: {error.code().name}: {why}")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return Health(answer.status == SERVING, f"{what}: {name}")


def _channel(target: str, tls_ca: Path | None) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0)]
    if tls_ca is None:
        return grpc.insecure_channel(target, options)
    try:
        authorities = tls_ca.read_bytes()
    except OSError as error:
        raise UnsupportedError(f"--tls-ca {tls_ca} cannot be read: {error.strerror}") from None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(authorities), options)
