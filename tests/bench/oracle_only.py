"""The oracle on machines that lack what the rest of the client package needs: gRPC and its friends."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from tests.bench.bench_library import ROOT

_PACKAGE = "octavo_client"


def import_oracle() -> ModuleType:
    """Return octavo_client.oracle; where its package cannot be imported, the package is left empty.

    Raises:
        ImportError: The oracle itself lacks something.
    """
    try:
        importlib.import_module(_PACKAGE)
    except Exception as error:  # not only ImportError: protobuf has a word of its own for too old
        print(f"{_PACKAGE} is used without its gRPC part: {error}", flush=True)
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(ROOT / "client" / _PACKAGE)]
        sys.modules[_PACKAGE] = package
    return importlib.import_module(f"{_PACKAGE}.oracle")
