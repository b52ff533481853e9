"""First come, first served, for asyncio: what began first keeps its place however long the first waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Hashable
from contextlib import asynccontextmanager


class Turns:
    """Turns at some keys, granted in the order in which they were asked for; nothing waits for a later turn."""

    def __init__(self) -> None:
        self._pending: dict[Hashable, list[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def turn(self, keys: Collection[Hashable]) -> AsyncIterator[None]:
        """Wait until every earlier turn at any of the keys has ended, then hold one until the block ends."""
        ahead = {earlier for key in keys for earlier in self._pending.get(key, ())}
        ended = asyncio.get_running_loop().create_future()
        for key in keys:
            self._pending.setdefault(key, []).append(ended)
        try:
            if ahead:
                await asyncio.wait(ahead)
            yield
        finally:
            ended.set_result(None)
            for key in keys:
                self._leave(key, ended)

    def _leave(self, key: Hashable, ended: asyncio.Future[None]) -> None:
        self._pending[key].remove(ended)
        if not self._pending[key]:
            del self._pending[key]
