"""Where the fuzzer starts: valid messages of every call, and valid files, for the targets that they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from octavo import v1
from tests.fuzz.file_targets import header_input, session_file, tenants_file
from tests.fuzz.valid_messages import ModelShape, append_request, step, valid_messages

_SHAPE = ModelShape("m", 2, 1, 2)
"""Tiny, so that most bytes of an input are structure."""

_SESSION_ID = "0123abcd-00112233445566778899aabbccddeeff"


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield targets and inputs."""
    for num_tokens in (1, 3):
        decode = v1.DecodeRequest(step=step(_SHAPE, 7, num_tokens)).SerializeToString()
        append = append_request(_SHAPE, 7, num_tokens).SerializeToString()
        yield from (("step", decode), ("step fields", decode))
        yield from (("append", append), ("append fields", append))
    yield "step", v1.DecodeRequest(region=v1.RegionRequest()).SerializeToString()
    placed = step(_SHAPE, 7)
    for tensor in (placed.q, placed.k, placed.v):
        tensor.data, tensor.region_offset = b"", 64
    yield "step", v1.DecodeRequest(step=placed).SerializeToString()
    for message in valid_messages(_SHAPE, _SESSION_ID, 7).values():
        yield "requests", message.SerializeToString()
        yield "calls", message.SerializeToString()
    for file in (session_file(20, has_identity=True), session_file(0, has_identity=False)):
        yield from (("session file", file), ("session header", header_input(file)))
    yield "tenants", tenants_file()
    yield "trace parent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    yield "authorization", b"Bearer " + b"t" * 43


def write_corpus(folder: Path, targets: Sequence[str]) -> None:
    """Write the seeds as files, each with its target's number before it."""
    folder.mkdir(parents=True, exist_ok=True)
    for target, data in seeds():
        content = bytes([targets.index(target)]) + data
        (folder / hashlib.sha1(content).hexdigest()).write_bytes(content)
