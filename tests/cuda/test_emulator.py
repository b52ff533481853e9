"""The emulator computes what the device's instructions compute."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from tests.cuda.rig import KERNELS, Array, Rig

ROOT = Path(__file__).resolve().parents[2]
LANES = np.arange(32)
ALL_16_BITS = np.arange(1 << 16, dtype=np.uint32)
BLOCK_THREADS = 128

PRIMITIVES = (
    *("FloatToHalf", "HalfToFloat", "FloatToBfloat16", "Bfloat16ToFloat", "SubtractHalves"),
    *("PackHalves", "PermuteBytes", "RoundToInt", "Divide", "Multiply", "Exp2", "Log2", "Tanh"),
)
"""Those of kernels/numerics.cu, in the order of the numbers that it gives them."""

Bits = npt.NDArray[np.uint32]


def compute(rig: Rig, primitive: str, *operands: Array) -> Bits:
    """Return a primitive's results for operands of 32-bit items, as bits."""
    num_items = len(operands[0])
    num_blocks = -(-num_items // BLOCK_THREADS)
    given = np.zeros((num_blocks * BLOCK_THREADS, 3), np.uint32)
    for idx, operand in enumerate(operands):
        given[:num_items, idx] = operand.view(np.uint32)
    output = np.zeros(len(given), np.uint32)
    option = PRIMITIVES.index(primitive)
    rig.run("numerics.compute", given, output, option=option, num_blocks=num_blocks)
    return output[:num_items]


def assert_same_numbers(got: Array, expected: Array) -> None:
    """Assert equal bits, but for NaNs, of which any will do."""
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    kept = ~np.isnan(expected)
    unsigned = f"u{got.itemsize}"
    np.testing.assert_array_equal(got[kept].view(unsigned), expected[kept].view(unsigned))


def floats_around_halves() -> npt.NDArray[np.float32]:
    """Return every FP16 number, what lies halfway to the next, and FP32's neighbours of both."""
    halves = ALL_16_BITS[:0x7C00].astype(np.uint16).view(np.float16).astype(np.float32)
    ties = (halves + np.append(halves[1:], np.float32(65536))) / 2
    centres = np.concatenate([halves, ties])
    below, above = (np.nextafter(centres, np.float32(end)) for end in (-1, np.inf))
    special = np.array([np.inf, np.nan, 3e38, 1e-45], np.float32)
    positive = np.concatenate([centres, below, above, special])
    return np.concatenate([positive, -positive])


def random_floats(num_items: int) -> npt.NDArray[np.float32]:
    """Return numbers of random bits: all exponents, NaNs and infinities too."""
    bits = np.random.default_rng(1).integers(0, 1 << 32, num_items, dtype=np.uint32)
    return bits.view(np.float32)


# ---- Numbers ------------------------------------------------------------------------------------


def test_float_to_half(rig: Rig) -> None:
    x = np.concatenate([floats_around_halves(), random_floats(1 << 17)])
    with np.errstate(all="ignore"):
        expected = x.astype(np.float16)
    got = compute(rig, "FloatToHalf", x).astype(np.uint16)
    assert_same_numbers(got.view(np.float16), expected)
    pairs = compute(rig, "PackHalves", x, x[::-1].copy())
    np.testing.assert_array_equal(pairs & 0xFFFF, got)
    np.testing.assert_array_equal(pairs >> 16, got[::-1])


def test_half_to_float(rig: Rig) -> None:
    expected = ALL_16_BITS.astype(np.uint16).view(np.float16).astype(np.float32)
    assert_same_numbers(compute(rig, "HalfToFloat", ALL_16_BITS).view(np.float32), expected)


def test_float_to_bfloat16(rig: Rig) -> None:
    ties = (ALL_16_BITS << 16) + np.array([[0x7FFF], [0x8000], [0x8001]], np.uint32)
    x = np.concatenate([random_floats(1 << 17), ties.ravel().view(np.float32)])
    with np.errstate(all="ignore"):
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    got = compute(rig, "FloatToBfloat16", x).astype(np.uint16).view(ml_dtypes.bfloat16)
    assert_same_numbers(got.astype(np.float32), expected)


def test_bfloat16_to_float(rig: Rig) -> None:
    expected = ALL_16_BITS.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_numbers(compute(rig, "Bfloat16ToFloat", ALL_16_BITS).view(np.float32), expected)


def test_subtract_halves(rig: Rig) -> None:
    """Against a difference that FP64 holds exactly, rounded once."""
    x, y = np.random.default_rng(2).integers(0, 1 << 16, (2, 1 << 17), dtype=np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = x.view(np.float16).astype(np.float64) - y.view(np.float16).astype(np.float64)
        expected = exact.astype(np.float16)
    got = compute(rig, "SubtractHalves", x.view(np.uint32), y.view(np.uint32))
    assert_same_numbers(got.view(np.float16), expected)


def test_permute_bytes(rig: Rig) -> None:
    rng = np.random.default_rng(3)
    low, high = rng.integers(0, 1 << 32, (2, 4096), dtype=np.uint32)
    picks = rng.integers(0, 8, (4096, 4), dtype=np.uint32)
    selector = (picks << (4 * np.arange(4, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)
    sources = np.stack([low, high], axis=1).view(np.uint8)
    expected = np.take_along_axis(sources, picks.astype(np.int64), axis=1).copy().view(np.uint32)
    np.testing.assert_array_equal(compute(rig, "PermuteBytes", low, high, selector), expected[:, 0])


def test_round_to_int(rig: Rig) -> None:
    ties = np.arange(-70, 70, dtype=np.float32) / 2
    edges = np.array([np.inf, -np.inf, np.nan, 3e9, -3e9, 2147483520, -2147483648], np.float32)
    limits = [2147483647, -2147483648, 0, 2147483647, -2147483648, 2147483520, -2147483648]
    got = compute(rig, "RoundToInt", np.concatenate([ties, edges])).view(np.int32)
    np.testing.assert_array_equal(got, [*np.rint(ties).astype(np.int32), *limits])


@pytest.mark.parametrize("primitive", ["Divide", "Multiply"])
def test_exact_arithmetic(rig: Rig, primitive: str) -> None:
    x, y = random_floats(1 << 16)[: 1 << 15], random_floats(1 << 16)[1 << 15 :]
    with np.errstate(all="ignore"):
        expected = x / y if primitive == "Divide" else x * y
    assert_same_numbers(compute(rig, primitive, x, y).view(np.float32), expected)


@pytest.mark.parametrize(
    ("primitive", "oracle", "low", "high"),
    [("Exp2", np.exp2, -150, 130), ("Log2", np.log2, 1e-30, 1e30), ("Tanh", np.tanh, -10, 10)],
)
def test_functions(rig: Rig, primitive: str, oracle: np.ufunc, low: float, high: float) -> None:
    x = np.linspace(low, high, 4096, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        expected = oracle(x.astype(np.float64)).astype(np.float32)
    got = compute(rig, primitive, x).view(np.float32)
    np.testing.assert_array_max_ulp(got, expected, maxulp=2)


def test_function_limits(rig: Rig) -> None:
    infinity = np.array([-np.inf], np.float32)
    assert compute(rig, "Exp2", infinity).view(np.float32)[0] == 0
    assert compute(rig, "Log2", np.zeros(1, np.float32)).view(np.float32)[0] == -np.inf


# ---- Warps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane_mask", [0, 1, 2, 4, 8, 16, 31])
def test_shuffle_xor(rig: Rig, lane_mask: int) -> None:
    values = np.random.default_rng(4).random(32, np.float32)
    got = rig.run("collectives.shuffle_xor", values, np.zeros_like(values), option=lane_mask)
    np.testing.assert_array_equal(got, values[LANES ^ lane_mask])


@pytest.mark.parametrize("distance", [0, 1, 31])
def test_shuffle_from(rig: Rig, distance: int) -> None:
    values = np.arange(32, dtype=np.int64) << 40
    got = rig.run("collectives.shuffle_from", values, np.zeros_like(values), option=distance)
    np.testing.assert_array_equal(got, np.roll(values, -distance))


@pytest.mark.parametrize("num_set", [0, 1, 32])
def test_any(rig: Rig, num_set: int) -> None:
    flags = (num_set > LANES).astype(np.int32)[::-1]
    got = rig.run("collectives.any", flags, np.zeros(32, np.int32))
    np.testing.assert_array_equal(got, int(num_set > 0))


def test_transpose_tile(rig: Rig) -> None:
    """A row of the matrix lies in four lanes, one after the other: so it is the memory's order."""
    matrix = np.random.default_rng(5).integers(0, 1 << 16, (8, 8), dtype=np.uint16)
    got = rig.run("collectives.transpose", matrix, np.zeros_like(matrix))
    np.testing.assert_array_equal(got, matrix.T)


def place_a(a: Array) -> Array:
    """Return [32, 4, 2] FP16, each lane's four registers of A, by where each element goes."""
    registers = np.zeros((32, 4, 2), np.float16)
    for row, column in np.ndindex(16, 16):
        lane = row % 8 * 4 + column % 8 // 2
        registers[lane, column // 8 * 2 + row // 8, column % 2] = a[row, column]
    return registers


def place_b(b: Array) -> Array:
    """Return [32, 2, 2] FP16, each lane's two registers of B."""
    registers = np.zeros((32, 2, 2), np.float16)
    for row, column in np.ndindex(16, 8):
        registers[column * 4 + row % 8 // 2, row // 8, row % 2] = b[row, column]
    return registers


def place_d(d: Array) -> Array:
    """Return [32, 4] FP32, each lane's four registers of D."""
    registers = np.zeros((32, 4), np.float32)
    for row, column in np.ndindex(16, 8):
        registers[row % 8 * 4 + column // 2, row // 8 * 2 + column % 2] = d[row, column]
    return registers


@dataclass(frozen=True, slots=True)
class Product:
    """A tile's product, placed: what it gave, what it should have, and how far apart they may be."""

    got: Array
    expected: Array
    tolerance: Array


def multiply(rig: Rig, *, swapped: bool) -> Product:
    """Multiply random tiles; `swapped` plants the kernel's bug.

    The tolerance: 16 sums, each rounded to within half a unit in 2^-23 of what it can be at most.
    """
    rng = np.random.default_rng(6)
    a = rng.standard_normal((16, 16)).astype(np.float16).astype(np.float64)
    b = rng.standard_normal((16, 8)).astype(np.float16).astype(np.float64)
    d = rng.standard_normal((16, 8)).astype(np.float32).astype(np.float64)
    parts = [place_a(a).view(np.uint32), place_b(b).view(np.uint32), place_d(d).view(np.uint32)]
    fragments = np.concatenate([part.reshape(32, -1) for part in parts], axis=1)
    output = np.zeros((32, 4), np.float32)
    got = rig.run("collectives.multiply", fragments, output, option=int(swapped))
    bound = 16 * 2.0**-24 * (np.abs(d) + np.abs(a) @ np.abs(b))
    return Product(got, place_d(d + a @ b), place_d(bound))


def test_multiply_tile(rig: Rig) -> None:
    product = multiply(rig, swapped=False)
    assert (np.abs(product.got - product.expected) <= product.tolerance).all()


def test_swapped_fragment_is_a_wrong_product(rig: Rig) -> None:
    product = multiply(rig, swapped=True)
    assert (np.abs(product.got - product.expected) > product.tolerance).mean() > 0.9


# ---- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copy_fills_up_with_zeros(rig: Rig, size: int) -> None:
    given = np.random.default_rng(7).integers(1, 128, (64, 16), dtype=np.int8)
    got = rig.run("memory.copy", given, np.zeros((64, size), np.int8), option=size)
    num_bytes = np.arange(64)[:, None] % (size + 1)
    expected = np.where(np.arange(size) < num_bytes, given[:, :size], 0)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("seed", range(4))
def test_pipeline(rig: Rig, seed: int) -> None:
    rig.kernels.octavo_emulator_set_seed(seed)
    given = np.random.default_rng(8).integers(-1000, 1000, (8, 64), dtype=np.int32)
    got = rig.run("memory.pipeline", given, np.zeros(64, np.int32))
    np.testing.assert_array_equal(got, given.sum(axis=0))


def test_copies_end_with_their_block(rig: Rig) -> None:
    given, output = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    got = rig.run("memory.leftover", given, output, num_blocks=2)
    np.testing.assert_array_equal(got, 7)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_access_sizes(rig: Rig, size: int) -> None:
    given = np.arange(64, dtype=np.int8).reshape(-1, size)
    got = rig.run("memory.reverse", given, np.zeros_like(given), option=size)
    np.testing.assert_array_equal(got, given[::-1])


def test_neighbouring_bytes_are_no_race(rig: Rig) -> None:
    given = np.arange(64, dtype=np.int8)
    got = rig.run("memory.bytes", given, np.zeros(64, np.int32))
    np.testing.assert_array_equal(got, given.view(np.int32).repeat(4))


def test_what_nothing_wrote_is_poison(rig: Rig) -> None:
    got = rig.run("collectives.any", np.ones(32, np.int32), np.zeros(33, np.uint32))
    assert (got[0], got[32]) == (1, 0xA5A5A5A5)


def test_atomics(rig: Rig) -> None:
    given = np.random.default_rng(9).integers(-(1 << 62), 1 << 62, 64)
    got = rig.run("memory.atomics", given, np.zeros(4 + 64, np.int32))
    assert got[:2].view(np.int64)[0] == given.min()
    assert got[2] == 128
    np.testing.assert_array_equal(np.sort(got[4:]), np.arange(0, 128, 2))


def test_seed_shuffles_blocks(rig: Rig) -> None:
    turns = {}
    for seed in (0, 1, 2):
        rig.kernels.octavo_emulator_set_seed(seed)
        zero, output = np.zeros(1, np.int32), np.zeros(50, np.int32)
        turns[seed] = tuple(rig.run("memory.turns", zero, output, num_blocks=50).tolist())
    assert turns[0] == tuple(range(50))
    assert all(sorted(turn) == list(range(50)) for turn in turns.values())
    assert len(set(turns.values())) == 3


# ---- CUDA proper --------------------------------------------------------------------------------


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc: the test kernels are not shown to be CUDA"
)
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda path: path.name)
def test_nvcc_takes_the_kernels(source: Path, tmp_path: Path) -> None:
    includes = [f"-I{ROOT / 'csrc' / 'include'}", f"-I{ROOT / 'csrc'}"]
    command = ["nvcc", "-std=c++17", "-arch=sm_90", *includes, "-c", str(source), "-o", "kernels.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
