"""Backends by the names that `--backend` takes."""

from __future__ import annotations

from octavo_server.backends.base import Backend, UnsupportedError

BACKEND_NAMES = ("auto", "cpu", "reference")
"""What `create_backend` takes; auto is the fastest that this machine has."""


def create_backend(name: str, num_threads: int) -> Backend:
    """Create the backend called `name`.

    Backends are imported here and not before, so that a server pays only for its own.

    Args:
        name: One of BACKEND_NAMES.
        num_threads: Threads of the cpu backend, 0 = all cores; the others have no use for it.

    Raises:
        UnsupportedError: There is no such backend, or this machine cannot run it.
    """
    if name in ("auto", "cpu"):
        from octavo_server.backends.cpu import CpuBackend  # noqa: PLC0415

        return CpuBackend(num_threads=num_threads)
    if name == "reference":
        from octavo_server.backends.reference import ReferenceBackend  # noqa: PLC0415

        return ReferenceBackend()
    raise UnsupportedError(f"backend must be one of {', '.join(BACKEND_NAMES)}, got {name!r}")
