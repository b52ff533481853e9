"""A served model: its cache, and the ids of its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_server.backends.base import PagedInt8Cache
from octavo_server.block_pool import BlockPool
from octavo_server.model import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class ModelPool:
    """One served model: its cache on the device and the ids of its blocks."""

    cache: PagedInt8Cache
    blocks: BlockPool

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.cache.spec
