"""Every call of the service as raw bytes, and what may come back for any of them: an answer, or one reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from octavo import v1

_SERVICE = v1.DESCRIPTOR.services_by_name["OctavoService"]
_BUG_CODES = ("INTERNAL", "UNKNOWN")

CALLS: dict[str, type[Message]] = {
    method.name: GetMessageClass(method.output_type) for method in _SERVICE.methods
}
"""The response of each call."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        code: Canonical code of the call's end by name.
        refusals: Reasons of the call and of everything refused in its responses; "" for one without exactly one reason.
        text: What the call's end said.
    """

    code: str
    refusals: tuple[str, ...]
    text: str = ""


def answer_of(
    channel: grpc.Channel,
    name: str,
    messages: Sequence[bytes],
    timeout_s: float,
    metadata: tuple[tuple[str, str | bytes], ...] = (),
) -> Answer:
    """Send messages on a call of their own, whatever it takes, and wait for its end.

    Raises:
        DecodeError: A response is none.
    """
    call = channel.stream_stream(f"/{_SERVICE.full_name}/{name}", bytes, bytes)
    refusals: list[str] = []
    try:
        for data in call(iter(messages), timeout=timeout_s, metadata=metadata):
            refusals += map(_reason_of, _statuses(CALLS[name].FromString(data)))
    except grpc.RpcError as error:
        status = rpc_status.from_call(cast(grpc.Call, error))
        refusals.append("" if status is None else _reason_of(status))
        return Answer(error.code().name, tuple(refusals), error.details() or "")
    return Answer("OK", tuple(refusals))


def fault_in(answer: Answer) -> str:
    """Return what is wrong with an answer, whatever was asked; empty when nothing is."""
    if answer.code in _BUG_CODES:
        return f"the call ended with {answer.code}: {answer.text}"
    if "" in answer.refusals:
        return f"a refusal lacks its one reason, the call ended with {answer.code}: {answer.text}"
    return ""


def _statuses(message: Message) -> Iterator[Any]:
    """Yield every google.rpc.Status in a message."""
    if message.DESCRIPTOR.full_name == Status.DESCRIPTOR.full_name:
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in value if field.is_repeated else [value]:
            if isinstance(part, Message):
                yield from _statuses(part)


def _reason_of(status: Any) -> str:
    infos = [
        ErrorInfo.FromString(detail.value)
        for detail in status.details
        if detail.Is(ErrorInfo.DESCRIPTOR)
    ]
    is_one = len(infos) == 1 and infos[0].domain == "octavo"
    return str(infos[0].reason) if is_one else ""
