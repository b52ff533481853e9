"""Who calls: the tenant of a call's bearer token, by a file of tenants that is read again when it changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from octavo_server import errors, status
from octavo_server.config import ConfigError
from octavo_server.errors import OctavoError
from octavo_server.tenant import ANONYMOUS, Tenant, TenantLimits, Tenants
from octavo_server.tenants_file import TenantKeys, grants_of, parse_tenants
from octavo_server.tokens import Grant, TokenTable, read_authorization

log = logging.getLogger(__name__)

FREE_SERVICE = "/grpc.health.v1.Health/"
"""Start of the methods that need no token: what probes ask."""

Metadata = Iterable[tuple[str, str | bytes]]

LOOK_S = 1.0
"""Seconds between two looks at the file."""

NUM_LOOKS_TO_END = 5
"""Looks after which a stream that was told to end, and did not, is cut off."""


@dataclass(eq=False, slots=True)
class _OpenStream:
    """A stream of a token; `num_looks` counts those since the token was removed."""

    grant: Grant
    context: grpc.ServicerContext
    end: Callable[[OctavoError], None]
    num_looks: int = 0


class Auth:
    """Finds the tenant of every call.

    Args:
        tenants: The tenants by name, whose limits the file sets.
        path: The file; None = every call is the anonymous tenant's, and needs no token.

    Raises:
        ConfigError: The file cannot be read or has mistakes.
    """

    def __init__(self, tenants: Tenants, path: Path | None) -> None:
        self._tenants = tenants
        self._path = path
        self._table = TokenTable()
        self._lock = threading.Lock()
        self._streams: set[_OpenStream] = set()
        self._tried = self._looked_at = b""
        self._complaint = ""
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="octavo-tenants", daemon=True)
        if path is not None:
            self._tried = self._looked_at = _read(path)
            self._apply(parse_tenants(path, self._tried))

    def start(self) -> None:
        """Follow the file from now on."""
        if self._path is not None:
            self._watcher.start()

    def stop(self) -> None:
        """Follow the file no more."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def tenant(self, context: grpc.ServicerContext) -> Tenant:
        """Return the tenant whose token came with a call.

        Raises:
            OctavoError: UNAUTHENTICATED.
        """
        if self._path is None:
            return self._tenants.get(ANONYMOUS)
        return self._tenants.get(self._grant(context.invocation_metadata()).tenant)

    def check(self, metadata: Metadata) -> None:
        """Check that a call comes from some tenant.

        Raises:
            OctavoError: UNAUTHENTICATED.
        """
        if self._path is not None:
            self._grant(metadata)

    @contextmanager
    def holding(
        self, context: grpc.ServicerContext, end: Callable[[OctavoError], None]
    ) -> Iterator[None]:
        """Watch over a stream while it is open.

        Args:
            context: Of the stream.
            end: Ends it, with an error, without waiting; called when its token is removed. A stream that is there some
                seconds later still is cut off.

        Raises:
            OctavoError: UNAUTHENTICATED, the token was removed since the call was let in.
        """
        if self._path is None:
            yield
            return
        with self._lock:  # so that no removal falls between the look-up and the entry
            stream = _OpenStream(self._grant(context.invocation_metadata()), context, end)
            self._streams.add(stream)
        try:
            yield
        finally:
            with self._lock:
                self._streams.discard(stream)

    def cutting(self, context: grpc.ServicerContext) -> AbstractContextManager[None]:
        """Watch over a call, as `holding`, and cut it off when its token is removed."""
        return self.holding(context, lambda _: _cancel(context))

    def look(self) -> None:
        """Look at the file, take up what is new, and end the streams of tokens that are gone.

        New contents are taken up when two looks in a row find them the same: one may meet a file that is half written.
        """
        try:
            self._take_up()
        except ConfigError as error:
            self._complain(str(error))
        self._end_streams()

    def _take_up(self) -> None:
        assert self._path is not None, "only a file is looked at"
        data = _read(self._path)
        is_settled = data == self._looked_at
        self._looked_at = data
        if data == self._tried or not is_settled:
            return
        self._tried = data
        self._apply(parse_tenants(self._path, data))
        self._complaint = ""
        log.info("took up the new tenants of %s", self._path)

    def _apply(self, tenants: tuple[TenantKeys, ...]) -> None:
        for tenant in tenants:
            limits = TenantLimits(tenant.max_sessions, tenant.max_tokens, tenant.max_bytes)
            self._tenants.set_limits(tenant.name, limits)
        with self._lock:
            self._table = TokenTable(grants_of(tenants))

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            log.error(
                "the tenants from before stay, for the new ones have mistakes:\n%s", complaint
            )
        self._complaint = complaint

    def _end_streams(self) -> None:
        with self._lock:
            removed = [stream for stream in self._streams if stream.grant not in self._table]
        for stream in removed:
            stream.num_looks += 1
            if stream.num_looks == 1:
                tenant = stream.grant.tenant
                log.info("tenant %s: ending a stream, for its token was removed", tenant)
                stream.end(errors.unauthenticated("the token was removed"))
            elif stream.num_looks == NUM_LOOKS_TO_END:
                _cancel(stream.context)

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S):
            try:
                self.look()
            except Exception:
                # A defect of ours; tokens must stay removable.
                log.exception("the file of tenants could not be looked at")

    def _grant(self, metadata: Metadata) -> Grant:
        try:
            token = read_authorization(_authorization(metadata))
        except ValueError as error:
            raise errors.unauthenticated(str(error)) from None
        grant = self._table.find(token)
        if grant is None:
            raise errors.unauthenticated("the token is none that the server knows")
        return grant


class Guard(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses calls of nobody's before anything of them is read, or any place is taken; health is for all.

    Every call that is not named here is guarded, so that one which is added later is too.

    Args:
        auth: Knows the tenants.
        count_refusal: Told of every refusal.
    """

    def __init__(self, auth: Auth, count_refusal: Callable[[OctavoError], None]) -> None:
        self._auth = auth
        self._count_refusal = count_refusal

    def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Return a call's handler, or one that refuses it."""
        try:
            if not details.method.startswith(FREE_SERVICE):
                self._auth.check(details.invocation_metadata)
        except OctavoError as error:
            self._count_refusal(error)
            return _refusing_handler(error)
        return continuation(details)


def _refusing_handler(error: OctavoError) -> grpc.RpcMethodHandler[bytes, bytes]:
    def refuse(_requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        status.abort(context, error)

    # On the wire a call of any kind is refused alike.
    return grpc.stream_unary_rpc_method_handler(refuse)


def _authorization(metadata: Metadata) -> str:
    values = [value for key, value in metadata if key == "authorization"]
    if not values:
        raise ValueError("the call has no token")
    if len(values) > 1:
        raise ValueError("the call has more than one authorization")
    value = values[0]
    return value if isinstance(value, str) else value.decode("latin-1")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = f"{path}: cannot be read: {error.strerror}; expected the file of tenants"
        raise ConfigError([why]) from None


def _cancel(context: grpc.ServicerContext) -> None:
    context.cancel()  # type: ignore[no-untyped-call]
