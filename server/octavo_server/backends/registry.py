"""Backends by the names that `--backend` takes."""

from __future__ import annotations

import logging

from octavo_server.backends.base import Backend, UnsupportedError

log = logging.getLogger(__name__)

BACKEND_NAMES = ("auto", "cpu", "cuda", "reference")
"""What `create_backend` takes; auto is the fastest that this machine has."""


def create_backend(name: str, num_threads: int, *, pin_threads: bool = False) -> Backend:
    """Create the backend called `name`.

    Backends are imported here and not before, so that a server pays only for its own.

    Args:
        name: One of BACKEND_NAMES.
        num_threads: Threads of the cpu backend, 0 = all cores; the others have no use for it.
        pin_threads: Bind those threads to a core each; the others have no use for it.

    Raises:
        UnsupportedError: There is no such backend, or this machine cannot run it.
    """
    if name == "auto":
        return _create_fastest(num_threads, pin_threads)
    if name == "cpu":
        from octavo_server.backends.cpu import CpuBackend  # noqa: PLC0415

        return CpuBackend(num_threads, pin_threads=pin_threads)
    if name == "cuda":
        from octavo_server.backends.cuda import create_cuda_backend  # noqa: PLC0415

        return create_cuda_backend()
    if name == "reference":
        from octavo_server.backends.reference import ReferenceBackend  # noqa: PLC0415

        return ReferenceBackend()
    raise UnsupportedError(f"backend must be one of {', '.join(BACKEND_NAMES)}, got {name!r}")


def _create_fastest(num_threads: int, pin_threads: bool) -> Backend:
    """Create the cuda backend where torch sees a GPU that it can use, else the cpu backend."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return create_backend("cpu", num_threads, pin_threads=pin_threads)
    try:
        return create_backend("cuda", num_threads)
    except UnsupportedError as error:
        log.warning("serving from the cpu, for the GPU cannot be used: %s", error)
        return create_backend("cpu", num_threads, pin_threads=pin_threads)
