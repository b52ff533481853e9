"""A PyTriton server of a decode step without its work, run in PyTriton's own virtualenv.

    python -m tests.bench.rpc.pytriton_serve

prints {"port": N} once the model is ready, and ends with stdin.
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack
from typing import Any

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

MODEL = "step"
HOST = "127.0.0.1"


def answer(requests: list[Any]) -> list[dict[str, Any]]:
    """Answer each request with its q, which has as many bytes as a step's output."""
    return [{"out": request["q"]} for request in requests]


def main() -> None:
    """Serve until stdin ends."""
    grpc_port, http_port, metrics_port = _free_ports(3)
    config = TritonConfig(
        grpc_address=HOST,
        grpc_port=grpc_port,
        http_address=HOST,
        http_port=http_port,
        metrics_port=metrics_port,
        allow_metrics=False,
    )
    heads = (-1, -1, -1)  # [num_tokens, num_heads, head_dim]
    with Triton(config=config) as triton:
        triton.bind(
            model_name=MODEL,
            infer_func=answer,
            inputs=[Tensor(name=name, dtype=np.float16, shape=heads) for name in "qkv"],
            outputs=[Tensor(name="out", dtype=np.float16, shape=heads)],
            config=ModelConfig(batching=False),
        )
        triton.run()
        print(json.dumps({"port": grpc_port}), flush=True)
        sys.stdin.read()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in sockets]


if __name__ == "__main__":
    main()
