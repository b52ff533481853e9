"""Benchmarks the CUDA kernels on the GPU that is here: checked, then timed, beside other kernels.

    python3 tests/bench/gpu.py --output FILE.json [--quick]

Needs nvcc, ninja and torch with CUDA, and installs nothing. Stops measuring in time to end within 8 minutes; --quick
takes the shapes of the goals alone. A check that fails is named, the rest is measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
if __name__ == "__main__":
    sys.path = [
        *(str(ROOT / part) for part in ("", "proto", "server", "client")),
        *(
            path for path in sys.path if Path(path).resolve() != HERE
        ),  # no top-level modules of ours
    ]

import torch  # noqa: E402

from octavo_server.backends.base import UnsupportedError  # noqa: E402
from octavo_server.cuda_build import find_nvcc  # noqa: E402
from tests.bench.bandwidth import measure_bandwidth  # noqa: E402
from tests.bench.bench_library import BenchError, BenchLibrary, build  # noqa: E402
from tests.bench.decode import measure_decode  # noqa: E402
from tests.bench.device import (  # noqa: E402
    GpuDevice,
    describe_gpu,
    describe_software,
    nominal_rate,
)
from tests.bench.goals import decode_table, goals, goals_table, step_table  # noqa: E402
from tests.bench.results import Results, as_json, save  # noqa: E402
from tests.bench.setting import Progress, Setting  # noqa: E402
from tests.bench.shapes import decode_cases  # noqa: E402
from tests.bench.steps import NEW_TOKENS, PROMPT, measure_append, measure_step  # noqa: E402

LIMIT_S = 470.0
"""Under 8 minutes, the build included."""

RESERVED_S = 30.0
"""For what comes after the decode cases."""


def main() -> int:
    """Run the benchmark; returns the exit status."""
    arguments = _parse()
    progress = Progress(LIMIT_S)
    if not torch.cuda.is_available():
        print("there is no GPU that torch can use; nothing was measured")
        return 2
    try:
        setting = _set_up(progress, arguments)
    except (BenchError, UnsupportedError) as error:
        print(f"the kernels cannot be built for this GPU: {error}")
        return 1
    try:
        measure(setting)
    except (RuntimeError, AssertionError) as error:
        traceback.print_exc()
        setting.fail("everything after this", f"{type(error).__name__}: {error}")
    finish(setting.results, arguments.output, progress)
    return 1 if setting.results.failed else 0


def measure(setting: Setting) -> None:
    """Measure everything, into the setting's results."""
    _measure_bandwidth(setting)
    measure_step(setting)
    measure_append(setting, NEW_TOKENS, num_tokens=1)
    measure_append(setting, PROMPT, num_tokens=PROMPT.workload.lengths[0])
    setting.progress.limit_s -= RESERVED_S
    measure_decode(setting, decode_cases(quick=setting.quick))
    setting.progress.limit_s += RESERVED_S
    _measure_bandwidth(setting)


def finish(results: Results, output: Path, progress: Progress) -> None:
    """Print the tables and save the results."""
    results.wall_s = progress.elapsed_s
    found = goals(results)
    for table in (decode_table(results), step_table(results), goals_table(found)):
        print("", *table, sep="\n")
    for what, reason in results.failed:
        print(f"FAILED {what}: {reason}")
    save(output, as_json(results, [goal.as_dict() for goal in found]), progress.say)


def _set_up(progress: Progress, arguments: argparse.Namespace) -> Setting:
    device = GpuDevice()
    progress.say(f"{device.name}; building the kernels for sm_{device.arch}")
    library = BenchLibrary(build(device.arch))
    nominal = nominal_rate(device.name, library)
    software = describe_software(find_nvcc() or "nvcc")
    software["commit"] = software["commit"] or arguments.commit
    results = Results(device=describe_gpu(device, nominal), software=software)
    progress.say(", ".join(f"{name} {value}" for name, value in results.software.items()))
    return Setting(device, library, progress, arguments.quick, results)


def _measure_bandwidth(setting: Setting) -> None:
    found = measure_bandwidth(setting)
    setting.results.bandwidth.append(found)
    setting.progress.say(
        f"memory: read {found.read_gb_per_s.median:.0f} GB/s, copy {found.copy_gb_per_s.median:.0f} GB/s"
    )
    setting.device.release()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="only the cases of the goals")
    parser.add_argument("--commit", help="the commit, for results of a tree without its git folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
