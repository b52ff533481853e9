"""A client of the PyTriton server over its gRPC stream, run in PyTriton's own virtualenv.

    python -m tests.bench.rpc.pytriton_call TARGET NUM_Q_HEADS NUM_KV_HEADS HEAD_DIM

answers each line on stdin, a number of calls, with {"us": [...]}, their microseconds, and ends with stdin.
"""

from __future__ import annotations

import json
import sys
import time
from queue import SimpleQueue
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

MODEL = "step"
WAIT_S = 30.0


class PyTritonStream:
    """A stream with one step of one session on its way at a time; q, k and v are drawn once."""

    def __init__(self, target: str, num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
        rng = np.random.default_rng(0)
        heads = {"q": num_q_heads, "k": num_kv_heads, "v": num_kv_heads}
        self._tensors = {
            name: rng.standard_normal((1, num, head_dim), np.float32).astype(np.float16)
            for name, num in heads.items()
        }
        self._answers: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        self._client = InferenceServerClient(target)
        self._client.start_stream(lambda result, error: self._answers.put((result, error)))

    def call(self) -> Any:
        """Send a step, tensors built from arrays as in every step of a model, and return the answer's array."""
        inputs = []
        for name, tensor in self._tensors.items():
            inputs.append(InferInput(name, list(tensor.shape), "FP16"))
            inputs[-1].set_data_from_numpy(tensor)
        self._client.async_stream_infer(MODEL, inputs)
        result, error = self._answers.get(timeout=WAIT_S)
        if error is not None:
            raise error
        return result.as_numpy("out")

    def check(self) -> None:
        """Check that the server answers with q."""
        assert np.array_equal(self.call(), self._tensors["q"]), "PyTriton answered something else"

    def close(self) -> None:
        """End the stream and its threads, without which the process would not end."""
        self._client.stop_stream()
        self._client.close()


def main() -> None:
    """Call until stdin ends."""
    stream = PyTritonStream(sys.argv[1], *map(int, sys.argv[2:5]))
    stream.check()
    for line in sys.stdin:
        samples = []
        for _ in range(int(line)):
            start = time.perf_counter_ns()
            stream.call()
            samples.append((time.perf_counter_ns() - start) / 1e3)
        print(json.dumps({"us": samples}), flush=True)
    stream.close()


if __name__ == "__main__":
    main()
