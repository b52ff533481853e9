"""Clients in a closed loop: each has one stream, and one step or message on its way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Protocol, Self

import grpc
import numpy as np
from google.protobuf.wrappers_pb2 import BytesValue

from octavo_client import Client, Entry
from tests.bench.rpc.echo import OPTIONS, SINK, echo_method
from tests.bench.rpc.serve import MODEL
from tests.bench.shapes import LLAMA

ELEMENT_BYTES = 2


class Stream(Protocol):
    """One client."""

    def call(self) -> None:
        """Send one message and wait for its answer."""

    def close(self) -> None:
        """End the stream."""


class EchoStream:
    """A stream of messages as large as a step's, answered by as many bytes as its result.

    Args:
        target: An echo server.
        num_sessions: Sessions of the step.
    """

    def __init__(self, target: str, num_sessions: int) -> None:
        in_bytes, out_bytes = step_bytes(num_sessions)
        self._channel = grpc.insecure_channel(target, OPTIONS)
        self._value = np.random.default_rng(0).bytes(in_bytes)
        self._out_bytes = out_bytes
        self._outbox: SimpleQueue[BytesValue | None] = SimpleQueue()
        rpc = self._channel.stream_stream(
            echo_method(out_bytes), BytesValue.SerializeToString, BytesValue.FromString
        )
        self._replies = iter(rpc(iter(self._outbox.get, None)))

    def call(self) -> None:
        """Send one message and wait for its echo."""
        self._outbox.put(BytesValue(value=self._value))
        assert len(next(self._replies).value) == self._out_bytes

    def close(self) -> None:
        """End the stream."""
        self._outbox.put(None)
        self._channel.close()


class OctavoStream:
    """A client whose steps append one token to each of its sessions, and attend.

    Args:
        target: An Octavo server.
        num_sessions: Sessions of every step.
        context: Tokens that they hold at first.
        shared_memory: Whether the tensors lie in shared memory.
    """

    def __init__(
        self, target: str, num_sessions: int, context: int = 0, *, shared_memory: bool = False
    ) -> None:
        rng = np.random.default_rng(0)
        self._client = Client(target, shared_memory=shared_memory)
        self._sessions = [self._client.open_session(MODEL) for _ in range(num_sessions)]
        if context:
            prompt = (2, 1, context, LLAMA.num_kv_heads, LLAMA.head_dim)
            k, v = rng.standard_normal(prompt, np.float32).astype(np.float16)
            for session in self._sessions:
                session.append(k, v)
        shape = (num_sessions, LLAMA.num_q_heads + 2 * LLAMA.num_kv_heads, LLAMA.head_dim)
        rows = rng.standard_normal(shape, np.float32).astype(np.float16)
        cuts = [LLAMA.num_q_heads, LLAMA.num_q_heads + LLAMA.num_kv_heads]
        self._tensors = [np.ascontiguousarray(x) for x in np.split(rows, cuts, axis=1)]

    def call(self) -> None:
        """Run one step."""
        if len(self._sessions) == 1:
            self._sessions[0].decode(0, *self._tensors)
            return
        entries = [Entry(session, 0, 1) for session in self._sessions]
        result = self._client.decode_batch(entries, *self._tensors)
        assert not result.errors, result.errors

    @property
    def is_sharing(self) -> bool:
        """Whether the stream has a region."""
        memory = self._client._memory
        return memory is not None and memory._region is not None

    def open_more(self, count: int) -> None:
        """Open sessions that no step uses."""
        for _ in range(count):
            self._client.open_session(MODEL)

    def close(self) -> None:
        """Close the sessions and the stream."""
        for session in self._sessions:
            session.close()
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def step_bytes(num_sessions: int) -> tuple[int, int]:
    """Return the tensors' bytes on the way in and out of a step of one token a session."""
    q = LLAMA.num_q_heads * LLAMA.head_dim * ELEMENT_BYTES
    kv = 2 * LLAMA.num_kv_heads * LLAMA.head_dim * ELEMENT_BYTES
    return num_sessions * (q + kv), num_sessions * q


def latencies_us(stream: Stream, count: int) -> list[float]:
    """Return the microseconds of calls one after the other."""
    samples = []
    for _ in range(count):
        start = time.perf_counter_ns()
        stream.call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return samples


def calls_per_s(streams: Sequence[Stream], seconds: float) -> float:
    """Return the calls a second of all streams together, each in a thread of its own."""
    counts = [0] * len(streams)
    barrier = threading.Barrier(len(streams) + 1)
    end = [0.0]

    def run(idx: int) -> None:
        barrier.wait()
        while time.perf_counter() < end[0]:
            streams[idx].call()
            counts[idx] += 1

    threads = [threading.Thread(target=run, args=(idx,)) for idx in range(len(streams))]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    end[0] = start + seconds
    barrier.wait()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def upload_rate(run: Callable[[], Any], num_bytes: int) -> float:
    """Return bytes a second of one upload."""
    start = time.perf_counter()
    run()
    return num_bytes / (time.perf_counter() - start)


def sink(channel: grpc.Channel, message: bytes, count: int) -> None:
    """Send a message over and over to the sink, and wait until it has taken all."""
    rpc = channel.stream_unary(SINK, BytesValue.SerializeToString, BytesValue.FromString)
    taken = rpc(BytesValue(value=message) for _ in range(count))
    assert int(taken.value) == count * len(message)
