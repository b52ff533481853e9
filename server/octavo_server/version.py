"""The version of the software that runs."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "octavo"


def software_version() -> str:
    """Return the installed version, "0+source" when the package runs from a source tree uninstalled."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+source"
