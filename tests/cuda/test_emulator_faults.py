"""The emulator sees what a kernel does wrong, and takes the same kernel put right; and what its host does."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.cuda.rig import KERNELS, LAUNCH_FAILURE, Array, Rig

# ---- Planted bugs -------------------------------------------------------------------------------

OWN = np.arange(64, dtype=np.int32)
INPUT = OWN + 50
OPPOSITE, NEIGHBOUR = INPUT[::-1], INPUT[OWN ^ 1]
IN_FLIGHT = (
    r"in flight: 4 shared bytes at offset \d+ are the target of a copy that thread \d+ has not"
)
RACE = "race: .* with no barrier between"

PLANTED: dict[str, tuple[Array, str]] = {
    "missing_sync_block": (OPPOSITE, RACE),
    "sync_warp_for_sync_block": (OPPOSITE, RACE),
    "missing_sync_warp": (
        NEIGHBOUR,
        r"race: writes 4 shared bytes at offset \d+ which thread \d+ read",
    ),
    "shuffle_for_sync_warp": (NEIGHBOUR, RACE),
    "write_after_read": (OPPOSITE, RACE),
    "write_after_warp_reads": (
        (OWN >= 32).astype(np.int32),
        "race: writes .* which thread .* read, ",
    ),
    "write_after_far_read": (np.full(64, 2, np.int32), "race: writes .* which thread 63 read, "),
    "write_after_write": (INPUT, "race: writes 1 shared bytes .* which thread .* wrote, "),
    "missing_wait": (INPUT, IN_FLIGHT),
    "missing_commit": (INPUT, IN_FLIGHT),
    "too_many_pending": (INPUT, IN_FLIGHT),
    "wait_without_barrier": (NEIGHBOUR, RACE),
    "barrier_before_wait": (OPPOSITE, IN_FLIGHT),
    "read_what_another_waited_for": (np.where(OWN == 1, INPUT[0], 0), f"race: reads|{IN_FLIGHT}"),
    "store_into_copy": (np.full(64, 7, np.int32), IN_FLIGHT),
    "copy_too_early": (OPPOSITE, RACE),
    "global_read_off": (
        INPUT,
        "LoadGlobal by thread 63 .* 4 bytes at offset 256 of an allocation of 256",
    ),
    "global_write_off": (
        INPUT,
        "StoreGlobal by thread 63 .*: out of bounds: 4 bytes at offset 256 ",
    ),
    "atomic_off": (INPUT, "AtomicAdd by thread 63 .*: out of bounds: "),
    "copy_source_off": (INPUT, "CopyAsync by thread 63 .*: out of bounds: 4 bytes at offset 256 "),
    "shared_read_off": (
        INPUT,
        "LoadShared by thread 63 .* 4 bytes at offset 256 of 256 shared bytes",
    ),
    "shared_write_off": (
        INPUT,
        "StoreShared by thread 63 .*: out of bounds: 4 bytes at offset 256 ",
    ),
    "shared_end_amid_vector": (OWN * 0, "out of bounds: 8 bytes at offset 248 of 252 shared bytes"),
    "shared_before_start": (INPUT, "out of bounds: 4 bytes at offset -4 of 256 shared bytes"),
    "global_as_shared": (INPUT, "out of bounds: a pointer that is none into shared memory"),
    "misaligned_global": (INPUT[OWN // 16 * 4], "misaligned: address 0x.* is no multiple of 16"),
    "misaligned_shared": (
        INPUT[OWN // 2 * 2],
        "misaligned: 8 bytes at offset .* of 256 shared bytes",
    ),
    "misaligned_copy": (INPUT, "CopyAsync .* misaligned: address 0x.* is no multiple of 8"),
    "unwritten_global": (np.full(64, 3, np.int32), "unwritten: of 4 bytes at offset .* never had"),
    "unwritten_copy": (
        np.full(64, 4, np.int32),
        "LoadGlobal .* unwritten: of 4 bytes at offset 0 ",
    ),
    "unwritten_shared": (
        INPUT,
        "thread 5 .*: unwritten: of 4 shared bytes at offset 20, some never",
    ),
    "partly_written_shared": (np.full(64, 0x01010101, np.int32), "unwritten: of 4 shared bytes"),
    "bare_global": (INPUT, "a bare access to device memory, not through a primitive"),
    "bare_shared": (INPUT, "a bare access to device memory, not through a primitive"),
    "half_at_sync_block": (INPUT, "divergence: .* 32 at SyncBlock, 32 at their end"),
    "early_return": (INPUT, "SyncBlock .* divergence: .* 63 at SyncBlock, 1 at their end"),
    "half_at_shuffle": (
        INPUT[OWN ^ 2],
        "ShuffleXor .* divergence: .* 32 are at a warp's collective",
    ),
    "different_collectives": (
        INPUT[OWN ^ 2],
        "(AnyOfWarp|ShuffleXor) .*: divergence: others of its warp are at (ShuffleXor|AnyOfWarp), planted",
    ),
    "block_and_warp": (INPUT, "divergence: .* 32 are at a warp's collective, 32 at SyncBlock"),
    "no_such_lane": (INPUT[[31, 63]].repeat(32), "ShuffleFrom .* there is no lane 32"),
}
"""Of each kernel in kernels/planted.cu: what it gives when right, and the fault's text when not."""

SEEDS = (0, 1, 2)
"""Of the schedule."""


def test_every_planted_bug_is_tested() -> None:
    kernels = re.findall(r"__global__ void (\w+)_kernel", (KERNELS / "planted.cu").read_text())
    assert sorted(kernels) == sorted(PLANTED)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_reported(rig: Rig, name: str, seed: int) -> None:
    rig.kernels.octavo_emulator_set_seed(seed)
    text = rig.fail(f"planted.{name}", INPUT, np.zeros_like(INPUT))
    assert re.search(PLANTED[name][1], text), text


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", PLANTED)
def test_kernel_without_the_bug_passes(rig: Rig, name: str, seed: int) -> None:
    rig.kernels.octavo_emulator_set_seed(seed)
    got = rig.run(f"planted.{name}", INPUT, np.zeros_like(INPUT))
    np.testing.assert_array_equal(got, PLANTED[name][0])


def test_fault_names_its_place(rig: Rig) -> None:
    text = rig.fail("planted.global_read_off", INPUT, np.zeros_like(INPUT))
    assert re.match(r"planted\.cu:\d+: LoadGlobal by thread 63 of block \(0, 0, 0\): out of", text)


# ---- The host's side ----------------------------------------------------------------------------

SCENARIOS = {
    "works": 0,
    "no_blocks": 9,
    "part_of_warp": 9,
    "too_many_threads": 9,
    "too_much_shared": 1,
    "allowed_shared": 0,
    "allow_too_much_shared": 1,
    "destroyed_stream": 400,
    "copy_too_far": 1,
    "copy_wrong_way": 1,
    "copy_written": 0,
    "out_of_memory": 2,
    "free_twice": 1,
}
"""The scenarios of kernels/host.cu without a fault, and what the runtime answers."""

FAULTS = {
    "use_after_free": "out of bounds: 1 bytes at 0x.*, which is in no live allocation",
    "copy_unwritten": "LoadGlobal .*: unwritten: of 1 bytes at offset 0 of an allocation of 256",
    "sticky": "in no live allocation",
    "deep_stack": "a thread's stack overflows",
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_host(rig: Rig, name: str) -> None:
    assert (rig.kernels.run_host(name.encode()), rig.fault()) == (SCENARIOS[name], "")


@pytest.mark.parametrize("name", FAULTS)
def test_host_of_a_faulty_kernel(rig: Rig, name: str) -> None:
    assert rig.kernels.run_host(name.encode()) == LAUNCH_FAILURE
    assert re.search(FAULTS[name], rig.fault())


def test_fault_stays_until_cleared(rig: Rig) -> None:
    rig.kernels.run_host(b"use_after_free")
    first = rig.fault()
    assert rig.kernels.run_host(b"works") == LAUNCH_FAILURE
    assert rig.take_fault() == first
    assert rig.kernels.run_host(b"works") == 0


def test_resident_blocks(rig: Rig) -> None:
    """By threads, by shared memory, and none where the kernel is not allowed as much."""
    cases = [(64, 0), (256, 0), (128, 40 << 10), (128, 100 << 10)]
    got = [rig.kernels.count_resident_blocks(*case) for case in cases]
    assert got == [32, 8, 5, 0]


def test_device_is_set(rig: Rig) -> None:
    set_device = rig.kernels.octavo_emulator_set_device
    assert set_device(b"shared_multiprocessor_bytes", 100 << 10) == 0
    assert rig.kernels.count_resident_blocks(128, 40 << 10) == 2
    set_device(b"shared_multiprocessor_bytes", 228 << 10)
    assert set_device(b"no_such_setting", 1) == -1


def test_registered_memory(rig: Rig) -> None:
    given, output = np.arange(64, dtype=np.int8), np.zeros(64, np.int8)
    rig.register(given, is_written=True)
    rig.register(output, is_written=False)
    code = rig.launch("memory.reverse", given, output, option=1, is_in_place=True)
    rig.unregister(given)
    rig.unregister(output)
    assert (code, rig.fault()) == (0, "")
    np.testing.assert_array_equal(output, given[::-1])


def test_registered_memory_is_unwritten_and_bounded(rig: Rig) -> None:
    memory = np.zeros(128, np.int8)
    given, output = memory[:64], memory[64:]
    for size, is_written, text in (
        (64, False, "unwritten"),
        (60, True, "out of bounds: 1 bytes at offset 60"),
    ):
        rig.register(given[:size], is_written=is_written)
        rig.register(output, is_written=False)
        code = rig.launch("memory.reverse", given, output, option=1, is_in_place=True)
        rig.unregister(given[:size])
        rig.unregister(output)
        assert code == LAUNCH_FAILURE
        assert text in rig.take_fault()


def test_memory_is_registered_once(rig: Rig) -> None:
    memory = np.zeros(128, np.int8)
    register = rig.kernels.octavo_emulator_register
    rig.register(memory[32:64], is_written=True)
    assert register(memory.ctypes.data, 33) == -1
    assert register(memory[63:].ctypes.data, 8) == -1
    rig.unregister(memory[32:64])
    assert rig.kernels.octavo_emulator_unregister(memory[32:].ctypes.data) == -1
