"""The one place that turns foreign errors, gRPC's and google.rpc.Status, into the client's exceptions."""

from __future__ import annotations

import re
from typing import Any

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from octavo_client._errors import (
    CallTimeout,
    ConnectionLost,
    OctavoError,
    RefusedError,
    message_too_large,
    refused,
)

_DOMAIN = "octavo"

_BROKEN_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
    }
)
"""Codes with which gRPC itself ends a call when the connection breaks; the server's own errors have an ErrorInfo."""

_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\.? (\d+)\)")


def error_from_rpc(error: grpc.RpcError, *, changes: bool = True) -> OctavoError:
    """Return the exception of a call that failed, sync or asyncio, with `error` as its cause.

    Args:
        error: What the call raised.
        changes: Whether the call changes anything on the server.
    """
    # Every RpcError that a call raises is also its grpc.Call; the type does not say so.
    call: Any = error
    status = _status_of(call)
    translated: OctavoError = (
        error_from_status(status)
        if status is not None and status.details
        else _transport_error(call.code(), call.details() or "", changes)
    )
    translated.__cause__ = error
    return translated


def error_from_status(status: status_pb2.Status) -> RefusedError:
    """Return the exception of a google.rpc.Status, from a call's trailers or inside a step's result."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    reason = info.reason if info.domain == _DOMAIN else ""
    code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return refused(reason, status.message, code, dict(info.metadata), retry_after_s)


def _status_of(call: Any) -> status_pb2.Status | None:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(call)
    except ValueError:  # the trailer contradicts the call's own code: something between rewrote it
        return None
    return status


def _transport_error(code: grpc.StatusCode, details: str, changes: bool) -> OctavoError:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallTimeout("the server did not answer in time", changes)
    if code in _BROKEN_CODES:
        return ConnectionLost(f"the connection broke: {code.name}: {details}", changes)
    too_large = _TOO_LARGE.search(details)
    if too_large:
        return message_too_large(int(too_large[1]), int(too_large[2]))
    return RefusedError("", details, code.name)
