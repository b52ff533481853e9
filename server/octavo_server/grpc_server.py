"""The gRPC servers of a process: their calls, threads, limits and listeners."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from octavo_server import codec
from octavo_server.auth import Auth, Guard
from octavo_server.backends.base import UnsupportedError
from octavo_server.calls import Gate, refusing, responding, run_in, unary_handler
from octavo_server.config_keys import ServerConfig
from octavo_server.request_reader import RequestReader
from octavo_server.service import SERVICE_NAME, Limits, OctavoService
from octavo_server.traffic import Traffic

RESERVED_THREADS = 8
"""Handler threads for the short calls, beside those that streams, waiting calls and silent calls may hold."""

MAX_SILENT_CALLS = 64
"""Unary calls that may wait for their request; many, for the threads exist only while there are such calls."""

HEALTH_THREADS = 4
"""Threads that answer health alone, so that calls of any other kind cannot use them up; silent ones come on top."""

KEEPALIVE_MS = 20_000
"""A client that is silent for this long is pinged."""

KEEPALIVE_TIMEOUT_MS = 10_000
"""A client that does not answer a ping for this long is gone, and its streams are free."""

HANDSHAKE_TIMEOUT_MS = 10_000
"""A connection that has not begun to speak TLS and HTTP/2 by then is closed."""

MAX_METADATA_BYTES = 8 * 2**10
"""Most metadata of a call; more is refused by gRPC. A token and a route take less than one KiB of it."""

MIN_CALLS = 1024
"""Calls that one connection may have open, or twice what the server can hold if that is more: who is over a limit is to
be told by a refusal, and a proxy carries the calls of many clients over one connection."""

MAX_PROBES = 256
"""Calls that the health port takes at a time; one that watches holds no thread, but stays."""

MAX_PROBE_BYTES = 4 * 2**10
"""Largest message of a probe: the name of a service."""


def limits_of(config: ServerConfig) -> Limits:
    """Return what the service takes at once."""
    return Limits(
        max_streams=config.max_streams,
        max_unary_calls=config.max_unary_calls,
        max_silent_calls=MAX_SILENT_CALLS,
        max_steps_in_flight=config.max_steps_in_flight,
        max_message_bytes=config.max_message_bytes,
        max_sessions=config.max_sessions,
        lease_s=config.lease_s,
        max_lease_s=config.max_lease_s,
        region_bytes=config.shared_memory_bytes if config.shared_memory else 0,
    )


def create_grpc_server(
    config: ServerConfig,
    service: OctavoService,
    auth: Auth,
    health_servicer: health.HealthServicer,
) -> grpc.Server:
    """Return the server of every call: OctavoService, health and reflection."""
    num_held = config.max_streams + config.max_unary_calls + MAX_SILENT_CALLS
    num_threads = num_held + RESERVED_THREADS
    num_calls = num_threads + MAX_SILENT_CALLS + HEALTH_THREADS
    server = grpc.server(
        ThreadPoolExecutor(num_threads, thread_name_prefix="octavo-call"),
        options=_options(config.max_message_bytes, max(MIN_CALLS, 2 * num_calls)),
        interceptors=[Guard(auth, service.count_refusal)],
    )
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_generic_rpc_handlers((_health_handler(health_servicer),))
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    server.add_generic_rpc_handlers((_reflection_handler(names, service.streams, auth),))
    return server


def create_health_server(health_servicer: health.HealthServicer) -> grpc.Server:
    """Return a server that answers health checks alone, with threads of its own."""
    server = grpc.server(
        ThreadPoolExecutor(HEALTH_THREADS, thread_name_prefix="octavo-probe"),
        options=_options(MAX_PROBE_BYTES, MAX_PROBES),
        maximum_concurrent_rpcs=MAX_PROBES,
    )
    server.add_generic_rpc_handlers((_health_handler(health_servicer),))
    return server


def listen(
    server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None = None
) -> int:
    """Listen, with TLS where there are credentials, and return the port.

    Raises:
        UnsupportedError: The address cannot be listened on.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise UnsupportedError(
            f"cannot listen on {address}: choose another host or port, or stop what listens there"
        ) from None


def _options(max_message_bytes: int, max_calls: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # One limit: between two of them gRPC would refuse some calls and take others.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", max_calls),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Without it gRPC waits a minute for the answer to the ping, whatever the line above.
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        # Clients may ping every 10 s, also without calls, and keep one stream for days.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _health_handler(servicer: health.HealthServicer) -> grpc.GenericRpcHandler[Any, Any]:
    """Return health in threads of its own, whose calls must send their request like any other unary call."""
    reader = RequestReader(MAX_SILENT_CALLS)
    # Health is no call of OctavoService: nobody asks for these counts.
    traffic = Traffic()
    threads = ThreadPoolExecutor(
        MAX_SILENT_CALLS + HEALTH_THREADS, thread_name_prefix="octavo-health"
    )

    def watch(requests: Iterator[bytes], context: grpc.ServicerContext, respond: Any) -> None:
        data = reader.read(requests, context)
        with refusing(context, traffic):
            servicer.Watch(codec.parse(health_pb2.HealthCheckRequest, data), context, respond)

    check = unary_handler(health_pb2.HealthCheckRequest, servicer.Check, reader, traffic, threads)
    # A watch answers from the threads that change the health, and holds none between.
    watch_handler = grpc.stream_stream_rpc_method_handler(
        run_in(threads, responding(watch)),
        response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(
        health.SERVICE_NAME, {"Check": check, "Watch": watch_handler}
    )


def _reflection_handler(
    names: tuple[str, ...], gate: Gate, auth: Auth
) -> grpc.GenericRpcHandler[Any, Any]:
    """Return reflection whose streams count among the limited ones, for each holds a handler thread."""
    # The stubs say that it returns None; it is a generator.
    answer: Any = reflection.ReflectionServicer(names).ServerReflectionInfo

    def stream(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with gate.open(context), auth.cutting(context):
            yield from answer(requests, context)

    handler = grpc.stream_stream_rpc_method_handler(
        stream,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(
        reflection.SERVICE_NAME, {"ServerReflectionInfo": handler}
    )


def join_host_port(host: str, port: int) -> str:
    """Return an address as gRPC writes it."""
    bare = host.removeprefix("[").removesuffix("]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
