"""Counting what goes over the wire."""

import pytest

from octavo_server import errors
from octavo_server.traffic import Traffic


def test_bytes_of_open_and_ended_streams_and_of_calls_add_up() -> None:
    traffic = Traffic()
    traffic.count_call(1, 2)
    with traffic.stream() as first, traffic.stream() as second:
        assert list(first.receiving(iter([b"abc", b"de"]))) == [b"abc", b"de"]
        second.sent_bytes += 4
        assert traffic.num_bytes == (6, 6)
    assert traffic.num_bytes == (6, 6)


def test_a_stream_that_fails_is_counted_as_far_as_it_came() -> None:
    traffic = Traffic()

    def fail_after_one() -> None:
        with traffic.stream() as stream:
            next(stream.receiving(iter([b"abc"])))
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fail_after_one()
    assert traffic.num_bytes == (3, 0)
    assert not traffic._streams


def test_refusals_are_counted_by_reason() -> None:
    traffic = Traffic()
    for error in (errors.session_not_found("x"), errors.draining(), errors.session_not_found("y")):
        traffic.count_refusal(error)
    assert traffic.refusals == {"DRAINING": 1, "SESSION_NOT_FOUND": 2}
