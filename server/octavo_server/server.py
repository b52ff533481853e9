"""The server process: pools, engine, calls, health and reflection put together; runs until it is told to stop."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import grpc
import torch
from grpc_health.v1 import health, health_pb2

from octavo_server import errors
from octavo_server.auth import Auth
from octavo_server.backends.base import Backend, UnsupportedError, alloc_paged_int8_cache
from octavo_server.backends.registry import create_backend
from octavo_server.block_pool import BlockPool
from octavo_server.config_keys import NO_HOST, ModelConfig, ServerConfig
from octavo_server.config_rules import host_of, plaintext_warnings
from octavo_server.engine import Engine
from octavo_server.grpc_server import (
    create_grpc_server,
    create_health_server,
    join_host_port,
    limits_of,
    listen,
)
from octavo_server.metrics import CONTENT_TYPE, create_exposition
from octavo_server.metrics_server import MetricsServer
from octavo_server.model import ModelSpec
from octavo_server.model_pool import ModelPool
from octavo_server.service import SERVICE_NAME, Identity, OctavoService
from octavo_server.session_store import SessionStore
from octavo_server.snapshots import RestoreStoppedError, Snapshots
from octavo_server.tenant import TenantLimits, Tenants
from octavo_server.tls import TlsFiles
from octavo_server.tracing import create_tracing
from octavo_server.unix_socket import UnixSocket
from octavo_server.version import software_version

log = logging.getLogger(__name__)

LIVE = "live"
"""Health service that serves as long as the process runs."""

READY_SERVICES = ("", "ready", SERVICE_NAME)
"""Health services that serve while the server takes new work."""

STREAM_END_S = 5.0
"""Grace for streams to end once they have been told."""

EXIT_DEVICE_FAILURE = 3
"""Exit code of a process whose device failed: only another process can use it again."""

GIB = 2**30


class Stopped(NamedTuple):
    """How a server stopped.

    Attributes:
        is_drained: Whether everything accepted was finished within the config's drain_timeout_s.
        num_unsaved: Sessions that were to be written and could not be.
    """

    is_drained: bool
    num_unsaved: int


class Server:
    """One serving process.

    Args:
        config: What to serve.
        on_failure: Called once, from the engine's thread, when the device fails.
        is_stopping: Whether the server is to stop, asked while it starts.

    Raises:
        ConfigError: The file of tenants has mistakes.
        UnsupportedError: The backend, a model, its pool or a file of TLS does not work; the text says what does.
    """

    def __init__(
        self,
        config: ServerConfig,
        on_failure: Callable[[], None] = lambda: None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._is_stopping = is_stopping
        self._on_failure = on_failure
        # First what an operator may have to correct: the pools take longer.
        self._credentials = _tls_credentials(config)
        tenants = Tenants(_tenant_limits(config))
        self._auth = Auth(tenants, Path(config.tenants) if config.tenants else None)
        incarnation = secrets.token_hex(4)
        backend = create_backend(config.backend, config.num_threads, pin_threads=config.pin_threads)
        pools = _alloc_pools(backend, config.models)
        store = SessionStore(incarnation, config.max_sessions)
        self._health = health.HealthServicer()
        self._engine = Engine(backend, pools, store, tenants, self._fail, config.max_queued_steps)
        self._snapshots: Snapshots | None = None
        if config.snapshot_dir:
            folder = Path(config.snapshot_dir)
            transfers = self._engine.transfers
            self._snapshots = Snapshots(folder, incarnation, transfers, tenants.get)
        identity = Identity(software_version(), incarnation, backend.name, backend.description)
        self._tracing = create_tracing(config, identity.version, identity.incarnation)
        self._service = OctavoService(
            self._engine, self._auth, identity, limits_of(config), self._tracing
        )
        self._grpc = create_grpc_server(config, self._service, self._auth, self._health)
        self._probes = create_health_server(self._health) if config.health_address else None
        self._metrics: MetricsServer | None = None
        self.port = self.health_port = 0

    def start(self) -> int:
        """Listen, restore the sessions of a snapshot, and serve.

        Returns:
            The port, which the config left open when it said 0; 0 when the server has none.

        Raises:
            UnsupportedError: The address or the socket cannot be listened on, or the snapshot folder not used.
            RestoreStoppedError: It is to stop; `stop` it, and the snapshot stays.
        """
        if self._snapshots is not None:
            self._snapshots.lock()
        self._listen()
        self._engine.start()
        self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        if self._probes:
            self._probes.start()
        # The ports are ours by now, so that nothing is restored by a server that cannot serve; connections wait.
        if self._snapshots is not None:
            self._snapshots.restore(self._is_stopping)
        self._auth.start()
        self._grpc.start()
        if self._snapshots is not None:
            self._snapshots.delete_consumed()
        for name in READY_SERVICES:
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    def stop(self) -> Stopped:
        """Refuse new work, finish what was accepted (or, where the device failed, refuse it), and end the streams.

        Sessions are written then where there is a snapshot folder.
        """
        self._set_unready()
        is_drained = self._engine.drain(self._config.drain_timeout_s)
        has_failed = self._engine.has_failed
        self._service.end_streams(errors.device_failure() if has_failed else errors.draining())
        self._grpc.stop(STREAM_END_S).wait()
        self._auth.stop()
        num_unsaved = self._save_sessions()
        self._engine.stop()
        if self._probes:
            self._probes.stop(None)
        if self._metrics is not None:
            self._metrics.close()
        if self._tracing is not None:
            self._tracing.close()
        return Stopped(is_drained, num_unsaved)

    @property
    def metrics_url(self) -> str:
        """Where the metrics are, once the server has started; empty when it serves none."""
        return self._metrics.url if self._metrics else ""

    def _save_sessions(self) -> int:
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is None:
            return 0
        with closing(snapshots):
            if self._engine.has_failed:
                return 0
            self._engine.drop_queued()
            return snapshots.write()

    def _listen(self) -> None:
        """Listen wherever the config says."""
        config = self._config
        if config.host != NO_HOST:
            address = join_host_port(config.host, config.port)
            self.port = listen(self._grpc, address, self._credentials)
        if config.unix_socket:
            UnixSocket(config.unix_socket).listen(self._grpc)
        if self._probes:
            self.health_port = listen(self._probes, config.health_address)
        if config.metrics_address:
            render = create_exposition(self._service.identity, self._service.stats)
            self._metrics = MetricsServer(config.metrics_address, render, CONTENT_TYPE)
            self._metrics.start()
        for warning in plaintext_warnings(config):
            log.warning("%s", warning)

    def _fail(self) -> None:
        self._set_unready()
        self._on_failure()

    def _set_unready(self) -> None:
        for name in READY_SERVICES:
            self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)


def run(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT, then finish what is in flight; or until the device fails.

    Returns:
        The process's exit code: 0; 1 when accepted work was left unfinished, or a session could not be written;
        EXIT_DEVICE_FAILURE when the device failed, so that a supervisor starts another process.

    Raises:
        UnsupportedError: The config cannot be served on this machine.
    """
    alarm = _Alarm()
    server = Server(config, alarm.ring, alarm.has_rung)
    # The pools are there; from here on torch's threads would only be in the way of the backend's.
    torch.set_num_threads(1)
    settle_memory()
    alarm.watch_signals()
    try:
        port = server.start()
    except RestoreStoppedError as stopped_at:
        server.stop()
        log.info("stopped while sessions were restored, for the next server: %s", stopped_at)
        return 0
    # Scripts that start a server with --port 0 read the first of these lines.
    for address in _addresses(config, port):
        print(f"listening on {address}", flush=True)
    if server.metrics_url:
        print(f"metrics on {server.metrics_url}", flush=True)
    if config.health_address:
        address = join_host_port(host_of(config.health_address), server.health_port)
        print(f"health on {address}", flush=True)
    signal_number = alarm.wait()
    if signal_number is None:
        server.stop()
        log.critical("stopped, for the device failed; exit code %d", EXIT_DEVICE_FAILURE)
        return EXIT_DEVICE_FAILURE
    log.info("%s: finishing what is in flight", signal.Signals(signal_number).name)
    stopped = server.stop()
    if not stopped.is_drained:
        log.error("work was left unfinished after drain_timeout_s, %g s", config.drain_timeout_s)
    if stopped.num_unsaved:
        log.error("%d sessions are lost", stopped.num_unsaved)
    if stopped != Stopped(is_drained=True, num_unsaved=0):
        return 1
    log.info("stopped; everything accepted was finished")
    return 0


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

    def has_rung(self) -> bool:
        """Return whether `wait` would return at once."""
        return bool(select.select([self._pipe], [], [], 0)[0])

    def wait(self) -> int | None:
        """Wait for a signal and return its number, or None when rung without one."""
        (number,) = self._pipe.read(1)
        return number or None


def _tls_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if not config.tls_cert:
        return None
    client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
    return TlsFiles(Path(config.tls_cert), Path(config.tls_key), client_ca).credentials()


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


def _tenant_limits(config: ServerConfig) -> TenantLimits:
    return TenantLimits(
        config.tenant_max_sessions, config.tenant_max_tokens, config.tenant_max_bytes
    )


def _addresses(config: ServerConfig, port: int) -> Iterator[str]:
    if config.host != NO_HOST:
        yield join_host_port(config.host, port)
    if config.unix_socket:
        yield UnixSocket(config.unix_socket).target
