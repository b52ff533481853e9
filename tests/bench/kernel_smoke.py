"""A few kernel tests without pytest: what compute-sanitizer runs, and what is left where pytest is not.

PYTHONPATH=.:proto:server:client python3 -m tests.bench.kernel_smoke [--backend cuda] [--few]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo_server.backends.base import Backend
from octavo_server.backends.registry import create_backend
from tests.bench.oracle_only import import_oracle

import_oracle()  # before the rig does

from tests.kernels.draws import BFLOAT16, FLOAT16, FLOAT32  # noqa: E402
from tests.kernels.rig import Entry, Rig, make_spec  # noqa: E402


@dataclass(frozen=True, slots=True)
class Case:
    """A ragged batch of three sessions, in both layers, on top of what is cached."""

    head_dim: int
    group_size: int
    block_size: int
    dtype: np.dtype[Any]
    cached: tuple[int, int, int]
    num_tokens: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the case in words."""
        options = ", ".join(self.options) or "no options"
        return (
            f"head_dim {self.head_dim}, group {self.group_size}, block_size {self.block_size}, {self.dtype}, "
            f"{self.num_tokens} tokens after {self.cached}, {options}"
        )


_ALL_OPTIONS = {
    "window": (20, 5),
    "soft_cap": (2.0, 30.0),
    "sinks": np.linspace(-2, 2, 16, dtype=np.float32).reshape(2, 8),
}

FEW = (
    Case(128, 4, 32, FLOAT16, (0, 31, 700)),
    Case(64, 7, 16, FLOAT32, (15, 16, 300), num_tokens=3),
    Case(80, 4, 64, BFLOAT16, (1, 63, 130), num_tokens=9, options=_ALL_OPTIONS),
    Case(256, 8, 128, FLOAT16, (127, 128, 400)),
)
"""What a sanitizer has time for."""

CASES = (
    *FEW,
    Case(96, 1, 32, FLOAT16, (0, 5, 900)),
    Case(192, 4, 16, BFLOAT16, (16, 17, 1500), num_tokens=2),
    Case(8, 4, 16, FLOAT32, (0, 1, 100), num_tokens=17),
    Case(72, 2, 32, FLOAT16, (33, 64, 250), num_tokens=4),
    Case(128, 4, 32, FLOAT16, (4095, 4096, 8100)),
    Case(128, 8, 16, BFLOAT16, (2000, 3, 5000), options={"deterministic": True}),
    Case(128, 4, 64, FLOAT16, (300, 900, 64), num_tokens=130, options=_ALL_OPTIONS),
    Case(64, 1, 128, FLOAT32, (6000, 127, 128), options={"window": (100, 0)}),
)


def run(backend: Backend, case: Case) -> None:
    """Fill, append and attend; everything is held against the oracle.

    Raises:
        AssertionError: An answer or a stored bit is not as it has to be.
    """
    num_kv_heads = 2
    spec = make_spec(
        num_kv_heads, case.group_size, case.head_dim, block_size=case.block_size, **case.options
    )
    longest = max(case.cached) + case.num_tokens
    rig = Rig(backend, spec, num_blocks=3 * (longest // case.block_size + 1))
    entries = []
    for cached in case.cached:
        session = rig.open(cached + case.num_tokens)
        rig.fill(session, 0, cached, dtype=case.dtype)
        entries.append(Entry(session, 0, case.num_tokens))
    entries += [Entry(0, 1, case.num_tokens)]
    rig.step(entries, rig.draw(entries, dtype=case.dtype))
    for entry in entries:
        rig.verify_stored(entry.session, entry.layer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; returns the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda", help="what `octavo-server --backend` takes")
    parser.add_argument("--few", action="store_true", help="only what a sanitizer has time for")
    parsed = parser.parse_args(arguments)
    backend = create_backend(parsed.backend, num_threads=0)
    print(backend.description, flush=True)
    return sum(_fails(backend, case) for case in (FEW if parsed.few else CASES))


def _fails(backend: Backend, case: Case) -> bool:
    try:
        run(backend, case)
    except AssertionError as error:
        print(f"FAILED {case.label}: {error}", flush=True)
        return True
    print(f"passed {case.label}", flush=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
