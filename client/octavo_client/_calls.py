"""Unary calls, ExportSession and ImportSession, sync and asyncio: called again where that is safe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from typing import Any

import grpc

from octavo.v1 import octavo_pb2 as pb
from octavo_client._retry import Attempts, CallRule
from octavo_client._status import error_from_rpc
from octavo_client._transfer import Origin, Sink

CheckOpen = Callable[[], None]
"""Raises when the client was closed."""


def run_call(
    rpc: Any, rule: CallRule, request: Any, attempts: Attempts, check_open: CheckOpen
) -> Any:
    """Call an rpc, again where its rule allows; None when an attempt without an answer had done it."""
    while True:
        check_open()
        try:
            return rpc(request, timeout=attempts.remaining(time.monotonic()))
        except grpc.RpcError as exc:
            error = error_from_rpc(exc, changes=rule.changes)
        delay = attempts.delay_by_rule(rule, error, time.monotonic())
        if delay is None:
            return None
        time.sleep(delay)


async def run_call_async(
    rpc: Any, rule: CallRule, request: Any, attempts: Attempts, check_open: CheckOpen
) -> Any:
    """As `run_call`."""
    while True:
        check_open()
        try:
            return await rpc(request, timeout=attempts.remaining(time.monotonic()))
        except grpc.RpcError as exc:
            error = error_from_rpc(exc, changes=rule.changes)
        delay = attempts.delay_by_rule(rule, error, time.monotonic())
        if delay is None:
            return None
        await asyncio.sleep(delay)


def run_export(
    rpc: Any, session_id: str, sink: Sink, attempts: Attempts, check_open: CheckOpen
) -> int:
    """Export a session; return the file's bytes."""
    request = pb.ExportSessionRequest(session_id=session_id)
    with sink:
        while True:
            check_open()
            try:
                for response in rpc(request, timeout=attempts.remaining(time.monotonic())):
                    sink.write(response.data)
                return sink.finish()
            except grpc.RpcError as exc:
                error = sink.restart(error_from_rpc(exc, changes=False))
            time.sleep(attempts.delay_after(error, time.monotonic()))


def run_import(rpc: Any, origin: Origin, attempts: Attempts, check_open: CheckOpen) -> pb.Session:
    """Import a session; return it as the server has it."""
    with closing(origin):
        while True:
            check_open()
            try:
                remaining = attempts.remaining(time.monotonic())
                session: pb.Session = rpc(origin.messages(), timeout=remaining).session
                return session
            except grpc.RpcError as exc:
                error = origin.restart(error_from_rpc(exc))
            time.sleep(attempts.delay_after(error, time.monotonic()))


async def run_export_async(
    rpc: Any, session_id: str, sink: Sink, attempts: Attempts, check_open: CheckOpen
) -> int:
    """Export a session, writing in another thread than the event loop's; return the file's bytes."""
    request = pb.ExportSessionRequest(session_id=session_id)
    with sink:
        while True:
            check_open()
            try:
                remaining = attempts.remaining(time.monotonic())
                async for response in rpc(request, timeout=remaining):
                    await asyncio.to_thread(sink.write, response.data)
                return sink.finish()
            except grpc.RpcError as exc:
                error = sink.restart(error_from_rpc(exc, changes=False))
            await asyncio.sleep(attempts.delay_after(error, time.monotonic()))


async def run_import_async(
    rpc: Any, origin: Origin, attempts: Attempts, check_open: CheckOpen
) -> pb.Session:
    """Import a session, reading in another thread than the event loop's; return it as the server has it."""
    with closing(origin):
        while True:
            check_open()
            try:
                remaining = attempts.remaining(time.monotonic())
                response = await rpc(_read_in_thread(origin.messages()), timeout=remaining)
                session: pb.Session = response.session
                return session
            except grpc.RpcError as exc:
                error = origin.restart(error_from_rpc(exc))
            await asyncio.sleep(attempts.delay_after(error, time.monotonic()))


async def _read_in_thread(messages: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
