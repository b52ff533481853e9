"""The exception tree, and foreign errors translated into it."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

import octavo_client as oc
from octavo_client import _errors
from octavo_client._status import error_from_rpc, error_from_status


class FailedCall(grpc.RpcError):
    """A call that ended with a code, and perhaps a google.rpc.Status in its trailers."""

    def __init__(
        self, code: grpc.StatusCode, details: str, status: status_pb2.Status | None = None
    ) -> None:
        self._ended = code, details, status

    def code(self) -> grpc.StatusCode:
        return self._ended[0]

    def details(self) -> str:
        return self._ended[1]

    def trailing_metadata(self) -> Any:
        status = self._ended[2]
        if status is None:
            return []
        return [("grpc-status-details-bin", status.SerializeToString())]


def status_of(reason: str, code: str, retry_after_s: int | None = None, **metadata: str) -> Any:
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message="what was refused")
    info = error_details_pb2.ErrorInfo(reason=reason, domain="octavo", metadata=metadata)
    status.details.add().Pack(info)
    if retry_after_s is not None:
        delay = Duration(seconds=retry_after_s)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


@pytest.mark.parametrize(("reason", "kind"), oc.REASONS.items())
def test_every_reason_has_its_exception(reason: str, kind: type[oc.RefusedError]) -> None:
    error = error_from_status(status_of(reason, "INTERNAL"))
    assert type(error) is kind
    assert (error.reason, error.code, error.message) == (reason, "INTERNAL", "what was refused")


def test_metadata_becomes_typed_fields() -> None:
    error = error_from_status(
        status_of("POSITION_MISMATCH", "FAILED_PRECONDITION", start_pos="7", length="5", layer="1")
    )
    assert isinstance(error, oc.PositionMismatch)
    assert (error.start_pos, error.length, error.layer) == (7, 5, 1)
    assert str(error) == "POSITION_MISMATCH: what was refused"


def test_text_fields_stay_text() -> None:
    error = error_from_status(status_of("NON_FINITE", "INVALID_ARGUMENT", field="k", token="3"))
    assert isinstance(error, oc.NonFinite)
    assert (error.field, error.token, error.head) == ("k", 3, -1)


def test_retry_info_becomes_seconds() -> None:
    error = error_from_status(status_of("OUT_OF_BLOCKS", "RESOURCE_EXHAUSTED", retry_after_s=2))
    assert error.retry_after_s == 2.0


def test_an_unknown_reason_is_a_plain_refusal() -> None:
    error = error_from_status(status_of("NOT_YET_INVENTED", "ABORTED", some="value"))
    assert type(error) is oc.RefusedError
    assert (error.reason, error.metadata) == ("NOT_YET_INVENTED", {"some": "value"})


def test_a_foreign_domain_is_no_reason_of_ours() -> None:
    status = status_of("OUT_OF_BLOCKS", "RESOURCE_EXHAUSTED")
    info = error_details_pb2.ErrorInfo(reason="OUT_OF_BLOCKS", domain="elsewhere")
    status.details[0].Pack(info)
    assert type(error_from_status(status)) is oc.RefusedError


def test_a_call_with_a_status_is_refused() -> None:
    status = status_of("MODEL_NOT_FOUND", "NOT_FOUND", model="huge")
    call = FailedCall(grpc.StatusCode.NOT_FOUND, status.message, status)
    error = error_from_rpc(call)
    assert isinstance(error, oc.ModelNotFound)
    assert error.model == "huge"
    assert error.__cause__ is call


def test_a_status_that_contradicts_the_call_is_not_believed() -> None:
    status = status_of("MODEL_NOT_FOUND", "NOT_FOUND", model="huge")
    error = error_from_rpc(FailedCall(grpc.StatusCode.UNAVAILABLE, "gone", status))
    assert isinstance(error, oc.ConnectionLost)


@pytest.mark.parametrize("changes", [True, False])
def test_a_broken_connection_says_whether_something_may_have_changed(changes: bool) -> None:
    error = error_from_rpc(FailedCall(grpc.StatusCode.UNAVAILABLE, "gone"), changes=changes)
    assert isinstance(error, oc.ConnectionLost)
    assert error.may_be_applied is changes
    assert ("may have been applied" in str(error)) is changes


def test_a_deadline_is_a_timeout() -> None:
    error = error_from_rpc(FailedCall(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
    assert isinstance(error, oc.CallTimeout)


def test_grpcs_own_message_limit_is_named() -> None:
    details = "CLIENT: Received message larger than max (300 vs. 200)"
    error = error_from_rpc(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, details))
    assert isinstance(error, oc.MessageTooLarge)
    assert error.limit_bytes == 200


def test_other_codes_are_plain_refusals() -> None:
    error = error_from_rpc(FailedCall(grpc.StatusCode.UNIMPLEMENTED, "no such method"))
    assert type(error) is oc.RefusedError
    assert (error.code, str(error)) == ("UNIMPLEMENTED", "UNIMPLEMENTED: no such method")


@pytest.mark.parametrize(
    "error",
    [
        oc.OutOfBlocks("OUT_OF_BLOCKS", "no", "RESOURCE_EXHAUSTED", {"free_blocks": "3"}, 0.5),
        oc.StepTimeout("no answer", may_be_applied=True),
        oc.ClientClosed("closed"),
    ],
)
def test_exceptions_survive_pickling(error: oc.OctavoError) -> None:
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert (str(copied), vars(copied)) == (str(error), vars(error))


def test_the_tree_in_the_docstring_is_complete() -> None:
    for name in oc.__all__:
        value = getattr(oc, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert f" {name} " in f"{_errors.__doc__} ".replace("\n", " "), name
