"""What is measured: Octavo beside an echo of the same bytes, in turn, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import grpc
import numpy as np

from octavo_client import Client, _shared_memory
from tests.bench.rpc import pytriton_peer
from tests.bench.rpc.echo import OPTIONS
from tests.bench.rpc.serve import MODEL, Process, serving
from tests.bench.rpc.streams import (
    EchoStream,
    OctavoStream,
    Stream,
    calls_per_s,
    latencies_us,
    sink,
    upload_rate,
)
from tests.bench.shapes import LLAMA
from tests.bench.stats import Summary, ratios, summarize

Rounds = Mapping[str, Sequence[float]]
"""One figure a round, by contestant."""

OCTAVO, ECHO, ECHO_ASYNCIO = "Octavo, null backend", "echo", "echo, asyncio server"
OCTAVO_CPU = "Octavo, cpu backend"
OVER_TCP, OVER_UNIX, OVER_SHARED = "over TCP", "over a Unix socket", "in shared memory"
PYTRITON = "PyTriton"
BESIDE_PYTRITON = "one stream, 1 session a step, beside PyTriton, p50"

NUM_WARM = 50
UPLOAD_TOKENS = 8192
UPLOAD_MESSAGE_BYTES = 1 << 20
MANY_SESSIONS, ACTIVE_SESSIONS = 10_000, 64
SAME_MACHINE_SESSIONS = (1, 8, 64)
BATCHED_STREAMS, BATCHED_CONTEXT = 64, 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured with all its contestants.

    Attributes:
        label: What.
        unit: Of the figures.
        rounds: The figures.
        skipped: Why there are none.
    """

    label: str
    unit: str
    rounds: Rounds
    skipped: str = ""

    def summary(self, name: str) -> Summary:
        """Return a contestant's figures, summarized."""
        return summarize(self.rounds[name])

    def over_best_echo(self, *, is_rate: bool = False) -> Summary:
        """Return Octavo's figures over those of the better echo, round by round."""
        echoes = [self.rounds[name] for name in (ECHO, ECHO_ASYNCIO) if name in self.rounds]
        best = [(max if is_rate else min)(one) for one in zip(*echoes, strict=True)]
        return ratios(self.rounds[OCTAVO], best)


@dataclass(slots=True)
class Rig:
    """The servers that every figure shares, and how long to measure.

    Attributes:
        servers: By contestant.
        num_rounds: Rounds of each figure.
        num_calls: Calls of one round.
        seconds: Of a round that measures a rate.
    """

    servers: Mapping[str, Process]
    num_rounds: int = 20
    num_calls: int = 200
    seconds: float = 0.4
    names: tuple[str, ...] = field(default=(ECHO, ECHO_ASYNCIO, OCTAVO))

    def stream(self, name: str, num_sessions: int, context: int = 0) -> Stream:
        """Open a warm stream to a server."""
        target = self.servers[name].target
        stream: Stream = (
            EchoStream(target, num_sessions)
            if name in (ECHO, ECHO_ASYNCIO)
            else OctavoStream(target, num_sessions, context)
        )
        for _ in range(NUM_WARM):
            stream.call()
        return stream


@contextmanager
def rig(*, is_quick: bool) -> Iterator[Rig]:
    """Start the servers."""
    with ExitStack() as stack:
        servers = {
            ECHO: stack.enter_context(serving("echo")),
            ECHO_ASYNCIO: stack.enter_context(serving("echo-asyncio")),
            OCTAVO: stack.enter_context(serving("octavo-null")),
            OCTAVO_CPU: stack.enter_context(serving("octavo-cpu")),
        }
        yield Rig(servers, 4, 50, 0.2) if is_quick else Rig(servers)


def latency(rig: Rig, num_sessions: int) -> tuple[Row, Row]:
    """Time steps of one stream, one after the other: the p50 and the p99 of each round."""
    p50: dict[str, list[float]] = {name: [] for name in rig.names}
    p99: dict[str, list[float]] = {name: [] for name in rig.names}
    with _open({name: [rig.stream(name, num_sessions)] for name in rig.names}) as streams:
        for _ in range(rig.num_rounds):
            for name in rig.names:
                samples = latencies_us(streams[name][0], rig.num_calls)
                p50[name].append(float(np.percentile(samples, 50)))
                p99[name].append(float(np.percentile(samples, 99)))
    what = f"one stream, {num_sessions} session{'s' * (num_sessions > 1)} a step"
    return Row(f"{what}, p50", "us", p50), Row(f"{what}, p99", "us", p99)


def beside_pytriton(rig: Rig) -> Row:
    """Time a step in turn with one over PyTriton's gRPC stream, with as many bytes; skipped where that is not there."""
    p50: dict[str, list[float]] = {OCTAVO: [], PYTRITON: []}
    try:
        with pytriton_peer.peer() as peer, _open({OCTAVO: [rig.stream(OCTAVO, 1)]}) as streams:
            peer.latencies_us(NUM_WARM)
            for _ in range(rig.num_rounds):
                ours = latencies_us(streams[OCTAVO][0], rig.num_calls)
                p50[OCTAVO].append(float(np.percentile(ours, 50)))
                p50[PYTRITON].append(float(np.percentile(peer.latencies_us(rig.num_calls), 50)))
    except pytriton_peer.UnavailableError as reason:
        return Row(BESIDE_PYTRITON, "us", {}, skipped=str(reason))
    return Row(BESIDE_PYTRITON, "us", p50)


def with_attention(rig: Rig, num_sessions: int, context: int) -> Row:
    """Time steps of one stream that the cpu backend answers, at some context."""
    names = (ECHO, OCTAVO_CPU)
    p50: dict[str, list[float]] = {name: [] for name in names}
    with _open({name: [rig.stream(name, num_sessions, context)] for name in names}) as streams:
        for _ in range(rig.num_rounds):
            for name in names:
                samples = latencies_us(streams[name][0], max(1, rig.num_calls // 10))
                p50[name].append(float(np.percentile(samples, 50)))
    label = f"one stream, {num_sessions} session{'s' * (num_sessions > 1)} a step, context {context}, p50"
    return Row(label, "us", p50)


def same_machine(rig: Rig, num_sessions: int) -> Row:
    """Time steps of one stream on each way that two processes of one machine have: the p50 of each round.

    Shared memory is used whatever the step's size, and gRPC goes over TCP beside it.
    """
    server = rig.servers[OCTAVO]
    with mock.patch.object(_shared_memory, "MIN_BYTES", 0), ExitStack() as stack:
        streams = {
            OVER_TCP: OctavoStream(server.target, num_sessions),
            OVER_UNIX: OctavoStream(server.unix_target, num_sessions),
            OVER_SHARED: OctavoStream(server.target, num_sessions, shared_memory=True),
        }
        p50: dict[str, list[float]] = {name: [] for name in streams}
        for stream in streams.values():
            stack.enter_context(stream)
            latencies_us(stream, NUM_WARM)
        assert streams[OVER_SHARED].is_sharing, "the server did not share memory"
        for _ in range(rig.num_rounds):
            for name, stream in streams.items():
                p50[name].append(float(np.median(latencies_us(stream, rig.num_calls))))
    label = f"one machine, {num_sessions} session{'s' * (num_sessions > 1)} a step, p50"
    return Row(label, "us", p50)


def throughput(rig: Rig, num_streams: int) -> Row:
    """Count the steps a second of several streams of one session, each in a closed loop."""
    rates: dict[str, list[float]] = {name: [] for name in rig.names}
    opened = {name: [rig.stream(name, 1) for _ in range(num_streams)] for name in rig.names}
    with _open(opened) as streams:
        for _ in range(rig.num_rounds):
            for name in rig.names:
                rates[name].append(calls_per_s(streams[name], rig.seconds))
    return Row(f"{num_streams} streams of one session", "steps/s", rates)


def upload(rig: Rig) -> Row:
    """Time the upload of a prompt beside as many bytes in messages of 1 MiB to a sink."""
    rates: dict[str, list[float]] = {OCTAVO: [], ECHO: []}
    shape = (2, 1, UPLOAD_TOKENS, LLAMA.num_kv_heads, LLAMA.head_dim)
    k, v = np.random.default_rng(1).standard_normal(shape, np.float32).astype(np.float16)
    num_bytes = k.nbytes + v.nbytes
    message, count = k.tobytes()[:UPLOAD_MESSAGE_BYTES], num_bytes // UPLOAD_MESSAGE_BYTES
    channel = grpc.insecure_channel(rig.servers[ECHO].target, OPTIONS)
    with Client(rig.servers[OCTAVO].target) as client, channel:
        for _ in range(rig.num_rounds + 1):
            with client.open_session(MODEL) as session:
                ours = upload_rate(lambda s=session: s.append(k, v), num_bytes)  # type: ignore[misc]
            rates[OCTAVO].append(ours / 1e9)
            floor = upload_rate(lambda: sink(channel, message, count), num_bytes)
            rates[ECHO].append(floor / 1e9)
    return Row(
        f"upload of a prompt of {UPLOAD_TOKENS:,} tokens",
        "GB/s",
        {name: values[1:] for name, values in rates.items()},
    )


FEW, MANY = f"{ACTIVE_SESSIONS} sessions open", f"{MANY_SESSIONS:,} sessions open"


def idle_sessions(rig: Rig) -> Row:
    """Compare the server's CPU time a step with many sessions open and few, 64 of them active."""
    cpu_us: dict[str, list[float]] = {FEW: [], MANY: []}
    with serving("octavo-null") as few, serving("octavo-null") as many:
        processes = {FEW: few, MANY: many}
        with ExitStack() as stack:
            streams = {
                name: stack.enter_context(OctavoStream(process.target, ACTIVE_SESSIONS))
                for name, process in processes.items()
            }
            streams[MANY].open_more(MANY_SESSIONS - ACTIVE_SESSIONS)
            for name in (FEW, MANY):
                latencies_us(streams[name], NUM_WARM)
            for _ in range(rig.num_rounds):
                for name, process in processes.items():
                    before = process.usage().cpu_s
                    latencies_us(streams[name], rig.num_calls)
                    spent = process.usage().cpu_s - before
                    cpu_us[name].append(spent * 1e6 / rig.num_calls)
    return Row(f"server CPU time of a step of {ACTIVE_SESSIONS} sessions", "us", cpu_us)


def batching(rig: Rig) -> Row:
    """Count the launches a step of many streams in a closed loop over contexts of thousands of tokens."""
    process = rig.servers[OCTAVO_CPU]
    found: list[float] = []
    with ThreadPoolExecutor(8) as threads:
        opened: Sequence[Stream] = list(
            threads.map(
                lambda _: OctavoStream(process.target, 1, BATCHED_CONTEXT), range(BATCHED_STREAMS)
            )
        )
    with _open({OCTAVO_CPU: opened}) as streams:
        for _ in range(max(2, rig.num_rounds // 4)):
            before = process.usage()
            calls_per_s(streams[OCTAVO_CPU], 3 * rig.seconds)
            after = process.usage()
            launches = after.num_launches - before.num_launches
            found.append(launches / (after.num_entries - before.num_entries))
    label = (
        f"launches a step, {BATCHED_STREAMS} streams of one session, context {BATCHED_CONTEXT:,}"
    )
    return Row(label, "launches", {OCTAVO_CPU: found})


@contextmanager
def _open(streams: Mapping[str, Sequence[Stream]]) -> Iterator[Mapping[str, Sequence[Stream]]]:
    try:
        yield streams
    finally:
        for group in streams.values():
            for stream in group:
                stream.close()


def measure(rig: Rig, say: Callable[[str], None]) -> Iterator[Row]:
    """Measure everything, one after the other."""
    steps: list[tuple[str, Callable[[], Sequence[Row]]]] = [
        ("one stream, one session", lambda: latency(rig, 1)),
        ("one stream, 64 sessions", lambda: latency(rig, 64)),
        ("one machine", lambda: [same_machine(rig, count) for count in SAME_MACHINE_SESSIONS]),
        *(
            (f"{count} streams", lambda count=count: [throughput(rig, count)])
            for count in (1, 8, 32)
        ),
        ("the cpu backend, context 64", lambda: [with_attention(rig, n, 64) for n in (1, 64)]),
        ("the cpu backend, context 4,096", lambda: [with_attention(rig, 1, 4096)]),
        ("a prompt's upload", lambda: [upload(rig)]),
        ("PyTriton", lambda: [beside_pytriton(rig)]),
        ("many idle sessions", lambda: [idle_sessions(rig)]),
        ("batching", lambda: [batching(rig)]),
    ]
    for what, run in steps:
        start = time.monotonic()
        yield from run()
        say(f"{what}: measured in {time.monotonic() - start:.0f} s")
