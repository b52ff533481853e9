"""Where a step's time goes, from the client's call to its return: `python -m tests.bench.rpc.step_path`.

Functions along the path are wrapped with a clock in both processes. Each stage's figure is the median of its own time,
and the clocks add about a microsecond a stage; what no stage has is gRPC, the network and waking threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from octavo_client import _call, _session, _stream, _sync
from octavo_server import codec, engine, step_stream
from tests.bench.goals import align
from tests.bench.rpc.null_backend import NullBackend
from tests.bench.rpc.serve import Process, main
from tests.bench.rpc.streams import OctavoStream

SERVE = "--serve"
NUM_WARM, NUM_CALLS = 300, 2000


class Stage(NamedTuple):
    """A function on the path, and what it does."""

    label: str
    owner: Any
    function: str


CLIENT = (
    Stage("the whole call, without what is below", _session.Session, "decode"),
    Stage("check the step and build its message's head", _sync.Client, "_draft"),
    Stage("place it, join the message", _stream.DecodeStream, "_place"),
    Stage("hand it to gRPC", _call.DirectCall, "send"),
    Stage("wait: the server and everything between", _call.DirectCall, "__next__"),
    Stage("parse the answer", _stream, "parse_response"),
    Stage("settle the step", _stream.DecodeStream, "_on_result"),
)

SERVER = (
    Stage("take it off the stream, book-keeping", step_stream.StepStream, "on_message"),
    Stage("parse the message", codec, "parse_step"),
    Stage("view the tensors, read the entries", codec, "read_step"),
    Stage("check, queue, begin a turn", engine.Engine, "submit"),
    Stage("run the turn, without what is below", engine.Engine, "_run_steps"),
    Stage("admit", engine, "admit_step"),
    Stage("lay out the launch", engine, "build_batch"),
    Stage("join tensors, call the backend", engine, "run_launch"),
    Stage("the null backend", NullBackend, "step"),
    Stage("settle", engine, "settle"),
    Stage("cut the answer out", engine, "answer_step"),
    Stage("encode the answer", codec, "encode_response"),
    Stage("hand it to gRPC", step_stream.StepStream, "_send"),
)


class Clock:
    """Times stages that call each other, each without those inside it; one step at a time."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._samples: dict[str, list[int]] = {stage.label: [] for stage in stages}
        self._inner_ns = [0]
        for stage in stages:
            function = getattr(stage.owner, stage.function)
            setattr(stage.owner, stage.function, self._timed(function, stage.label))

    def medians_us(self) -> dict[str, float]:
        """Return the median of each stage over the last calls, in microseconds."""
        last = {label: samples[-NUM_CALLS:] for label, samples in self._samples.items()}
        return {label: float(np.median(x)) / 1e3 if x else 0.0 for label, x in last.items()}

    def _timed(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner_ns.append(0)
            start = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter_ns() - start
                self._samples[label].append(whole - self._inner_ns.pop())
                self._inner_ns[-1] += whole

        return timed


def serve() -> None:
    """Run the null server with its clock; its last line is the medians."""
    clock = Clock(SERVER)
    sys.argv[1:] = ["octavo-null"]
    main()
    print(json.dumps(clock.medians_us()), flush=True)


class TimedProcess(Process):
    """A server with a clock."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.bench.rpc.step_path", SERVE]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.target = f"127.0.0.1:{self._read()['port']}"

    def finish(self) -> Mapping[str, float]:
        """End the process and return its medians."""
        with self._process as process:  # closes its pipes and waits for it
            assert process.stdin is not None
            process.stdin.close()
            return self._read()


def measure(num_calls: int) -> tuple[float, Mapping[str, float], Mapping[str, float]]:
    """Return a step's median microseconds, and those of the client's and the server's stages."""
    process = TimedProcess()
    with timing(CLIENT) as clock, OctavoStream(process.target, 1) as stream:
        samples = []
        for _ in range(NUM_WARM + num_calls):
            start = time.perf_counter_ns()
            stream.call()
            samples.append((time.perf_counter_ns() - start) / 1e3)
        client = clock.medians_us()
    return float(np.median(samples[NUM_WARM:])), client, process.finish()


@contextmanager
def timing(stages: Sequence[Stage]) -> Iterator[Clock]:
    """Time stages for a while."""
    functions = [getattr(stage.owner, stage.function) for stage in stages]
    try:
        yield Clock(stages)
    finally:
        for stage, function in zip(stages, functions, strict=True):
            setattr(stage.owner, stage.function, function)


def table(whole_us: float, client: Mapping[str, float], server: Mapping[str, float]) -> list[str]:
    """Return a step's path as lines."""
    lines = [("where", "what", "us")]
    lines += [("client", label, f"{us:.1f}") for label, us in client.items()]
    lines += [("server", label, f"{us:.1f}") for label, us in server.items()]
    lines.append(("", "the step", f"{whole_us:.1f}"))
    return align(lines)


if __name__ == "__main__":
    if SERVE in sys.argv:
        serve()
    else:
        print(*table(*measure(NUM_CALLS)), sep="\n")
