"""What the figures depend on: processor, caches, threads, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench.bench_library import ROOT

DEFAULT_LLC_BYTES = 32 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_PACKAGES = ("numpy", "torch", "openvino", "libggml-python", "matplotlib")


def llc_bytes() -> int:
    """Return the size of the last-level cache, a usual one where the system does not tell."""
    sizes = [sysfs_bytes(path.read_text()) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=DEFAULT_LLC_BYTES)


def describe_machine(description: str, num_threads: int) -> dict[str, Any]:
    """Return the machine's facts; `description` is the backend's own."""
    return {
        "processor": _processor(),
        "backend": description,
        "num_threads": num_threads,
        "llc_bytes": llc_bytes(),
        "system": platform.platform(),
        "date": date.today().isoformat(),
    }


def describe_software() -> dict[str, Any]:
    """Return versions; None for what is not installed."""
    status = _run("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "compiler": (_run("c++", "--version") or "unknown").partition("\n")[0],
        "commit": (_run("git", "rev-parse", "HEAD") or "").strip() or None,
        "is_dirty": None if status is None else bool(status.strip()),
    }


def sysfs_bytes(text: str) -> int:
    """Return the bytes that sysfs means by `32768K`."""
    number, unit = text.strip().rstrip("KMG"), text.strip()[-1]
    return int(number) * _UNITS.get(unit, 1)


def _processor() -> str:
    """Return the processor's name, with the family and model that a virtual machine's name leaves out."""
    text = Path("/proc/cpuinfo").read_text()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    return (
        f"{found.get('model name')} (family {found.get('cpu family')}, model {found.get('model')})"
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    """Return what a command prints, None when it fails or is not there."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
