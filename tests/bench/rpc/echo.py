"""The floor: echo services in grpcio, whose messages are one bytes field, parsed and serialised again.

A reply has as many bytes as its method says, so that a decode step's way in and way out are both there.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import BytesValue

SERVICE = "octavo.bench.Echo"
MAX_MESSAGE_BYTES = 64 << 20
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]


def echo_method(reply_bytes: int) -> str:
    """Return the path of the stream whose replies are the first `reply_bytes` of each message."""
    return f"/{SERVICE}/Echo{reply_bytes}"


SINK = f"/{SERVICE}/Sink"
"""Takes a stream of messages, answers with their size."""


def _reply(data: bytes, reply_bytes: int) -> bytes:
    value = BytesValue.FromString(data).value
    return BytesValue(value=value[:reply_bytes]).SerializeToString()


class _SyncHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = str(details.method).rpartition("/")[2]
        if method == "Sink":
            return grpc.stream_unary_rpc_method_handler(_sink)
        reply_bytes = int(method.removeprefix("Echo"))

        def echo(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
            for data in requests:
                yield _reply(data, reply_bytes)

        return grpc.stream_stream_rpc_method_handler(echo)


def _sink(requests: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
    num_bytes = sum(len(BytesValue.FromString(data).value) for data in requests)
    return BytesValue(value=str(num_bytes).encode()).SerializeToString()


class _AsyncHandlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        reply_bytes = int(str(details.method).rpartition("Echo")[2])

        async def echo(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
            async for data in requests:
                yield _reply(data, reply_bytes)

        return grpc.stream_stream_rpc_method_handler(echo)


def serve_sync(address: str, max_streams: int) -> tuple[grpc.Server, int]:
    """Start an echo server with handler threads; returns it and its port."""
    server = grpc.server(ThreadPoolExecutor(max_streams), options=OPTIONS)
    server.add_generic_rpc_handlers((_SyncHandlers(),))
    port = server.add_insecure_port(address)
    server.start()
    return server, port


def serve_asyncio(address: str, announce: Any) -> None:
    """Run an asyncio echo server for ever; `announce` is called with its port."""

    async def serve() -> None:
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((_AsyncHandlers(),))
        port = server.add_insecure_port(address)
        await server.start()
        announce(port)
        await server.wait_for_termination()

    asyncio.run(serve())
