"""Where a session's file goes and comes from, when a call breaks and is made again."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import octavo_client as oc
from octavo.v1 import octavo_pb2 as pb
from octavo_client._transfer import Origin, Sink

LOST = oc.ConnectionLost("gone", may_be_applied=True)
REFUSED = oc.SessionNotFound("SESSION_NOT_FOUND", "no")


class OneWay(io.BytesIO):
    """A file that cannot be set back, such as a pipe."""

    def seekable(self) -> bool:
        return False


def test_a_path_has_the_file_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "session"
    path.write_bytes(b"the one before")
    with Sink(path, None) as sink:
        sink.write(b"a longer first try")
        assert sink.restart(LOST) is LOST
        sink.write(b"second")
        assert path.read_bytes() == b"the one before"
        assert sink.finish() == 6
    assert path.read_bytes() == b"second"
    assert [child.name for child in tmp_path.iterdir()] == ["session"]


def test_what_did_not_come_to_its_end_leaves_the_path_as_it_was(tmp_path: Path) -> None:
    with Sink(tmp_path / "session", None) as sink:
        sink.write(b"half")
        with pytest.raises(oc.SessionNotFound):
            sink.restart(REFUSED)
    assert list(tmp_path.iterdir()) == []


def test_an_open_file_is_set_back_to_where_it_stood() -> None:
    file = io.BytesIO(b"head")
    file.seek(4)
    with Sink(file, None) as sink:
        sink.write(b"a longer first try")
        sink.restart(LOST)
        sink.write(b"second")
        sink.finish()
    assert file.getvalue() == b"headsecond"


def test_what_cannot_be_set_back_is_not_tried_again() -> None:
    with pytest.raises(oc.ConnectionLost), Sink(OneWay(), None) as sink:
        sink.restart(LOST)
    with pytest.raises(oc.ConnectionLost):
        Origin(OneWay(b"data"), pb.ImportSessionRequest(), None, 10_000).restart(LOST)


def test_messages_fit_the_server_and_carry_the_options_once() -> None:
    file = io.BytesIO(bytes(10_000))
    request = pb.ImportSessionRequest(model="tiny", request_id="r")
    told: list[tuple[int, int]] = []
    origin = Origin(file, request, lambda *sizes: told.append(sizes), 5_024)
    for _ in range(2):
        messages = [pb.ImportSessionRequest.FromString(data) for data in origin.messages()]
        assert [len(message.data) for message in messages] == [4_000, 4_000, 2_000]
        assert [message.model for message in messages] == ["tiny", "", ""]
    assert told == 2 * [(4_000, 10_000), (8_000, 10_000), (10_000, 10_000)]


def test_a_call_that_is_over_moves_the_file_no_more() -> None:
    origin = Origin(io.BytesIO(bytes(range(100))), pb.ImportSessionRequest(), None, 1_034)
    late, broken = origin.messages(), origin.messages()
    next(broken)
    origin.restart(LOST)
    again = origin.messages()
    data = pb.ImportSessionRequest.FromString(next(again)).data
    assert list(broken) == []
    assert [pb.ImportSessionRequest.FromString(message).data for message in late] == [b""]
    data += b"".join(pb.ImportSessionRequest.FromString(message).data for message in again)
    assert data == bytes(range(100))
