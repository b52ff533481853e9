"""The block pool: which blocks of a model's KV pool are free, and how many sessions hold each of the others."""

from __future__ import annotations

from collections.abc import Iterable

from octavo_server.errors import OctavoError, Reason


class BlockPool:
    """Ids of equally sized blocks with reference counts; every operation is O(1) a block.

    Blocks are handed out in the order 0, 1, 2, ... of a fresh pool, and the block freed last is handed out first.
    It knows no tensors: a block id stands for the same slots in every layer of the model.

    Args:
        num_blocks: Blocks of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self._free_ids = list(range(num_blocks - 1, -1, -1))
        self._ref_counts = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, free or held."""
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free_ids)

    def ref_count(self, block_id: int) -> int:
        """Return how many holders a block has."""
        return self._ref_counts[block_id]

    def is_shared(self, block_id: int) -> bool:
        """Return whether writing to a block would change what another holder reads."""
        return self._ref_counts[block_id] > 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, all or none.

        Returns:
            Their ids, each with one reference, which the caller gives back with `free`.

        Raises:
            OctavoError: OUT_OF_BLOCKS; nothing was taken.
        """
        if num_blocks > self.num_free:
            raise _out_of_blocks(num_blocks, self.num_free)
        block_ids = [self._free_ids.pop() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one reference to each of these held blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is free: only a held block can be shared")
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Iterable[int]) -> int:
        """Give back one reference of each block.

        Returns:
            How many blocks became free by it.
        """
        num_freed = 0
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is free already")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free_ids.append(block_id)
                num_freed += 1
        return num_freed


def _out_of_blocks(required: int, free: int) -> OctavoError:
    message = f"{required} more blocks are needed and {free} are free; close or truncate a session, or retry later"
    return OctavoError(Reason.OUT_OF_BLOCKS, message, required_blocks=required, free_blocks=free)
