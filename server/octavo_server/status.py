"""Refusals as google.rpc.Status: canonical code, one ErrorInfo, and RetryInfo where waiting helps."""

from __future__ import annotations

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from octavo_server.errors import REASONS, RETRY_DELAY_MS, OctavoError

ERROR_DOMAIN = "octavo"


def to_status(error: OctavoError, *details: Message) -> Status:
    """Return the status that carries a refusal, in a call's trailer or inside a result.

    Args:
        error: The refusal.
        details: Messages to go along, beside the ErrorInfo.
    """
    spec = REASONS[error.reason]
    code = getattr(grpc.StatusCode, spec.code)
    info = ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    status = Status(code=code.value[0], message=str(error), details=[_pack(info)])
    if spec.is_retryable:
        delay = Duration(nanos=RETRY_DELAY_MS * 1_000_000)
        status.details.append(_pack(RetryInfo(retry_delay=delay)))
    status.details.extend(map(_pack, details))
    return status


def abort(context: grpc.ServicerContext, error: OctavoError, *details: Message) -> NoReturn:
    """End a call with a refusal."""
    context.abort_with_status(rpc_status.to_status(to_status(error, *details)))
    raise AssertionError("abort_with_status raises")


def set_status(context: grpc.ServicerContext, error: OctavoError) -> None:
    """Give a call, whoever ends it, the status of a refusal."""
    status = rpc_status.to_status(to_status(error))
    context.set_code(status.code)
    context.set_details(status.details)
    context.set_trailing_metadata(status.trailing_metadata)


def _pack(detail: Message) -> Any:
    packed = Any()
    packed.Pack(detail)
    return packed
