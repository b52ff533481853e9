"""The client processes: started, killed, replaced, and listened to."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from typing import Any

from tests.chaos.notes import Page
from tests.chaos.worker import Orders, work

_STOP_TIMEOUT_S = 90.0


@dataclass(slots=True)
class _Client:
    process: BaseProcess
    pipe: Pipe
    is_finished: bool = False


class Fleet:
    """Runs one process for each client; safe to use from several threads.

    Args:
        num_clients: How many.
        orders_of: Returns the orders of a client's generation.
    """

    def __init__(self, num_clients: int, orders_of: Callable[[int, int], Orders]) -> None:
        self._context = get_context("spawn")
        # Without a lock: a client that is killed could take it along.
        self._brakes: Any = self._context.RawArray("b", num_clients)
        self._orders_of = orders_of
        self._lock = threading.Lock()
        self._generations = [0] * num_clients
        self._clients: list[_Client] = []
        self._late: list[tuple[int, Page]] = []

    def start(self) -> None:
        """Start all clients."""
        with self._lock:
            self._clients = [self._start(idx) for idx in range(len(self._generations))]

    def brake(self, client_idx: int, *, is_on: bool) -> None:
        """Have a client wait before its next steps, or go on."""
        self._brakes[client_idx] = is_on

    def replace(self, client_idx: int) -> None:
        """Kill a client and start another in its place."""
        with self._lock:
            client = self._clients[client_idx]
            client.process.kill()
            client.process.join()
            self._late += [(client_idx, page) for page in _read(client)]
            client.pipe.close()
            self._generations[client_idx] += 1
            self._clients[client_idx] = self._start(client_idx)

    def pages(self) -> list[tuple[int, Page]]:
        """Return what clients noted since the last time."""
        with self._lock:
            pages, self._late = self._late, []
            for client_idx, client in enumerate(self._clients):
                pages += [(client_idx, page) for page in _read(client)]
            return pages

    def died(self) -> list[int]:
        """Return the clients that ended before `stop`."""
        with self._lock:
            return [
                idx
                for idx, client in enumerate(self._clients)
                if client.is_finished or not client.process.is_alive()
            ]

    def stop(self) -> None:
        """Tell all clients to close their sessions and end; their last pages follow."""
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.pipe.send(None)

    @property
    def is_finished(self) -> bool:
        """Whether all clients closed their sessions."""
        return all(client.is_finished for client in self._clients)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for client in self._clients:
                if client.is_finished:
                    client.process.join(_STOP_TIMEOUT_S)
                client.process.kill()
                client.process.join()
                client.pipe.close()
            self._clients = []

    def _start(self, client_idx: int) -> _Client:
        pipe, theirs = self._context.Pipe()
        orders = self._orders_of(client_idx, self._generations[client_idx])
        process = self._context.Process(target=work, args=(theirs, orders, self._brakes))
        process.daemon = True
        process.start()
        theirs.close()
        return _Client(process, pipe)


def _read(client: _Client) -> list[Page]:
    """Return the pages that are there; one that a kill cut off is lost."""
    pages: list[Page] = []
    with contextlib.suppress(EOFError, OSError):
        while not client.is_finished and client.pipe.poll():
            pages.append(client.pipe.recv())
            client.is_finished = pages[-1].is_finished
    return pages
