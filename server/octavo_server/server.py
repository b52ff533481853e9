"""The server process: pools, engine, calls, health and reflection put together; runs until it is told to stop."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from typing import Any

import grpc
import torch
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from octavo_server import codec, errors
from octavo_server.backends.base import Backend, UnsupportedError, alloc_paged_int8_cache
from octavo_server.backends.registry import create_backend
from octavo_server.block_pool import BlockPool
from octavo_server.config import NO_HOST, ModelConfig, ServerConfig
from octavo_server.engine import Engine
from octavo_server.model import ModelSpec
from octavo_server.model_pool import ModelPool
from octavo_server.request_reader import RequestReader
from octavo_server.service import (
    SERVICE_NAME,
    Gate,
    Identity,
    Limits,
    OctavoService,
    refusing,
    responding,
    run_in,
    unary_handler,
)
from octavo_server.session_store import SessionStore
from octavo_server.traffic import Traffic
from octavo_server.unix_socket import UnixSocket
from octavo_server.version import software_version

log = logging.getLogger(__name__)

LIVE = "live"
"""Health service that serves as long as the process runs."""

READY_SERVICES = ("", "ready", SERVICE_NAME)
"""Health services that serve while the server takes new work."""

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

STREAM_END_S = 5.0
"""Grace for streams to end once they have been told."""

EXIT_DEVICE_FAILURE = 3
"""Exit code of a process whose device failed: only another process can use it again."""

GIB = 2**30


class Server:
    """One serving process.

    Args:
        config: What to serve.
        on_failure: Called once, from the engine's thread, when the device fails.

    Raises:
        UnsupportedError: The backend, a model or its pool does not work here; the text says what does.
    """

    def __init__(self, config: ServerConfig, on_failure: Callable[[], None] = lambda: None) -> None:
        self._config = config
        self._on_failure = on_failure
        incarnation = secrets.token_hex(4)
        backend = create_backend(config.backend, config.num_threads, pin_threads=config.pin_threads)
        pools = _alloc_pools(backend, config.models)
        sessions = SessionStore(incarnation, config.max_sessions)
        self._health = health.HealthServicer()
        self._engine = Engine(backend, pools, sessions, self._fail, config.max_queued_steps)
        identity = Identity(
            software_version(), incarnation, backend.name, backend.description, config.max_sessions
        )
        self._service = OctavoService(self._engine, identity, _limits(config))
        self._grpc = _create_grpc_server(config, self._service, self._health)
        self.port = 0

    def start(self) -> int:
        """Listen and serve.

        Returns:
            The port, which the config left open when it said 0; 0 when the server has none.

        Raises:
            UnsupportedError: The address or the socket cannot be listened on.
        """
        if self._config.host != NO_HOST:
            self.port = self._listen(_join_host_port(self._config.host, self._config.port))
        if self._config.unix_socket:
            UnixSocket(self._config.unix_socket).listen(self._grpc)
        self._engine.start()
        self._grpc.start()
        for name in (LIVE, *READY_SERVICES):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    def stop(self) -> bool:
        """Refuse new work, finish what was accepted (or, where the device failed, refuse it), end the streams.

        Returns:
            Whether everything accepted was finished within the config's drain_timeout_s.
        """
        self._set_unready()
        is_drained = self._engine.drain(self._config.drain_timeout_s)
        has_failed = self._engine.has_failed
        self._service.end_streams(errors.device_failure() if has_failed else errors.draining())
        self._grpc.stop(STREAM_END_S).wait()
        self._engine.stop()
        return is_drained

    def _listen(self, address: str) -> int:
        try:
            return self._grpc.add_insecure_port(address)
        except RuntimeError:
            raise UnsupportedError(
                f"cannot listen on {address}: choose another host or port, or stop what listens there"
            ) from None

    def _fail(self) -> None:
        self._set_unready()
        self._on_failure()

    def _set_unready(self) -> None:
        for name in READY_SERVICES:
            self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)


def run(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT, then finish what is in flight; or until the device fails.

    Returns:
        The process's exit code: 0; 1 when accepted work was left unfinished; EXIT_DEVICE_FAILURE when the device
        failed, so that a supervisor starts another process.

    Raises:
        UnsupportedError: The config cannot be served on this machine.
    """
    alarm = _Alarm()
    server = Server(config, on_failure=alarm.ring)
    # The pools are there; from here on torch's threads would only be in the way of the backend's.
    torch.set_num_threads(1)
    settle_memory()
    alarm.watch_signals()
    port = server.start()
    # Scripts that start a server with --port 0 read the first of these lines.
    for address in _addresses(config, port):
        print(f"listening on {address}", flush=True)
    signal_number = alarm.wait()
    if signal_number is None:
        server.stop()
        log.critical("stopped, for the device failed; exit code %d", EXIT_DEVICE_FAILURE)
        return EXIT_DEVICE_FAILURE
    log.info("%s: finishing what is in flight", signal.Signals(signal_number).name)
    if server.stop():
        log.info("stopped; everything accepted was finished")
        return 0
    log.error(
        "stopped; work was left unfinished after drain_timeout_s, %g s", config.drain_timeout_s
    )
    return 1


def settle_memory() -> None:
    """Keep what a process has once its server is made, all of torch, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


class _Alarm:
    """Wakes the main thread: a pipe that gets a byte for each SIGTERM or SIGINT, its number, or 0 when rung.

    Python runs a signal's handler once the main thread comes back from what blocks it, and a signal that another thread
    took, or that came just before, does not bring it back. A byte in a pipe does.
    """

    def __init__(self) -> None:
        read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._pipe = FileIO(read_fd)

    def watch_signals(self) -> None:
        """Ring at signals from now on, rather than die of them."""
        signal.set_wakeup_fd(self._write_fd)
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, lambda *_: None)

    def ring(self) -> None:
        """Wake the main thread without a signal."""
        os.write(self._write_fd, b"\0")

    def wait(self) -> int | None:
        """Wait for a signal and return its number, or None when rung without one."""
        (number,) = self._pipe.read(1)
        return number or None


def _alloc_pools(backend: Backend, models: tuple[ModelConfig, ...]) -> dict[str, ModelPool]:
    """Size every pool by what is free now, then allocate them."""
    for model in models:
        backend.check_model(model.spec)
    free_bytes = backend.free_bytes()
    sizes = [_num_blocks(model, free_bytes) for model in models]
    _check_fit(models, sizes, free_bytes)
    log.info("backend %s", backend.description)
    pools = {}
    for model, num_blocks in zip(models, sizes, strict=True):
        _log_pool(model.spec, num_blocks)
        cache = alloc_paged_int8_cache(backend, model.spec, num_blocks)
        pools[model.spec.name] = ModelPool(cache, BlockPool(num_blocks))
    return pools


def _num_blocks(model: ModelConfig, free_bytes: int) -> int:
    if model.num_blocks is not None:
        return model.num_blocks
    assert model.memory is not None, "the config gives one of num_blocks and memory"
    num_bytes = model.memory.resolve(free_bytes)
    num_blocks = num_bytes // model.spec.block_bytes
    if num_blocks == 0:
        raise UnsupportedError(
            f"model {model.spec.name}: memory of {num_bytes} bytes holds no block of "
            f"{model.spec.block_bytes} bytes; give it more"
        )
    return num_blocks


def _check_fit(models: tuple[ModelConfig, ...], sizes: list[int], free_bytes: int) -> None:
    required = sum(model.spec.block_bytes * size for model, size in zip(models, sizes, strict=True))
    if required > free_bytes:
        raise UnsupportedError(
            f"the pools need {required / GIB:.2f} GiB and {free_bytes / GIB:.2f} GiB are free; "
            "lower num_blocks or memory of the models"
        )


def _log_pool(spec: ModelSpec, num_blocks: int) -> None:
    num_tokens, num_bytes = num_blocks * spec.block_size, num_blocks * spec.block_bytes
    log.info(
        "model %s: %s blocks of %d tokens hold %s tokens in %s bytes (%.2f GiB), where FP16 would hold %s tokens",
        spec.name,
        f"{num_blocks:,}",
        spec.block_size,
        f"{num_tokens:,}",
        f"{num_bytes:,}",
        num_bytes / GIB,
        f"{num_bytes // spec.fp16_token_bytes:,}",
    )


def _limits(config: ServerConfig) -> Limits:
    return Limits(
        max_streams=config.max_streams,
        max_unary_calls=config.max_unary_calls,
        max_silent_calls=MAX_SILENT_CALLS,
        max_steps_in_flight=config.max_steps_in_flight,
        max_message_bytes=config.max_message_bytes,
        region_bytes=config.shared_memory_bytes if config.shared_memory else 0,
    )


def _create_grpc_server(
    config: ServerConfig, service: OctavoService, health_servicer: health.HealthServicer
) -> grpc.Server:
    num_held = config.max_streams + config.max_unary_calls + MAX_SILENT_CALLS
    server = grpc.server(
        ThreadPoolExecutor(num_held + RESERVED_THREADS, thread_name_prefix="octavo-call"),
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            # Without it gRPC waits a minute for the answer to the ping, whatever the line above.
            ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
            # Clients may ping every 10 s, also without calls, and keep one stream for days.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", 0),
        ],
    )
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_generic_rpc_handlers((_health_handler(health_servicer),))
    names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
    server.add_generic_rpc_handlers((_reflection_handler(names, service.streams),))
    return server


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


def _reflection_handler(names: tuple[str, ...], gate: Gate) -> grpc.GenericRpcHandler[Any, Any]:
    """Return reflection whose streams count among the limited ones, for each holds a handler thread."""
    # The stubs say that it returns None; it is a generator.
    answer: Any = reflection.ReflectionServicer(names).ServerReflectionInfo

    def stream(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with gate.open(context):
            yield from answer(requests, context)

    handler = grpc.stream_stream_rpc_method_handler(
        stream,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(
        reflection.SERVICE_NAME, {"ServerReflectionInfo": handler}
    )


def _addresses(config: ServerConfig, port: int) -> Iterator[str]:
    if config.host != NO_HOST:
        yield _join_host_port(config.host, port)
    if config.unix_socket:
        yield UnixSocket(config.unix_socket).target


def _join_host_port(host: str, port: int) -> str:
    bare = host.removeprefix("[").removesuffix("]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"
