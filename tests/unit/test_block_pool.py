"""The block pool: exact ids, reference counts and the order of the free list, on a pool of 10 blocks."""

import pytest

from octavo_server.block_pool import BlockPool
from octavo_server.errors import OctavoError, Reason


def test_a_fresh_pool_hands_out_ids_in_order() -> None:
    pool = BlockPool(10)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(2) == [3, 4]
    assert pool.num_free == 5
    assert [pool.ref_count(block_id) for block_id in range(6)] == [1, 1, 1, 1, 1, 0]


def test_the_block_freed_last_is_handed_out_first() -> None:
    pool = BlockPool(10)
    pool.allocate(4)
    assert pool.free([1, 3]) == 2
    assert pool.allocate(3) == [3, 1, 4]


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(10)
    pool.allocate(7)
    with pytest.raises(OctavoError) as refused:
        pool.allocate(4)
    assert refused.value.reason is Reason.OUT_OF_BLOCKS
    assert refused.value.metadata == {"required_blocks": "4", "free_blocks": "3"}
    assert pool.num_free == 3
    assert pool.allocate(3) == [7, 8, 9]
    assert pool.allocate(0) == []


def test_a_shared_block_is_free_only_after_its_last_holder() -> None:
    pool = BlockPool(10)
    pool.allocate(2)
    pool.share([0, 1, 1])
    assert [pool.ref_count(0), pool.ref_count(1)] == [2, 3]
    assert pool.is_shared(0)
    assert pool.free([0, 1]) == 0
    assert not pool.is_shared(0)
    assert pool.free([0]) == 1
    assert pool.num_free == 9


def test_misuse_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(10)
    with pytest.raises(ValueError, match="block 4 is free already"):
        pool.free([4])
    with pytest.raises(ValueError, match="only a held block can be shared"):
        pool.share([4])
    assert pool.num_free == 10
