"""A virtual environment with Octavo's declared dependencies and nothing else, made without downloading them again.

The distributions are linked from the environment that runs the tests, torch among them. pip sees them as installed and
checks their versions; what pyproject.toml forgets to declare is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

KEPT_VARIABLES = ("CXX", "OCTAVO_CACHE_DIR", "XDG_CACHE_HOME")
"""The compiler, and where compiled kernels are kept."""


@dataclass(frozen=True, slots=True)
class CleanEnvironment:
    """A virtual environment in a folder of its own."""

    folder: Path

    @property
    def bin(self) -> Path:
        """Folder of its commands."""
        return self.folder / "bin"

    @property
    def site_packages(self) -> Path:
        """Folder of its packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "lib" / version / "site-packages"

    @property
    def variables(self) -> dict[str, str]:
        """What its processes get: nothing that leads to the environment that runs the tests."""
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return {"PATH": path, "HOME": str(Path.home()), **kept}

    def output_of(self, folder: Path, command: str, *arguments: str) -> str:
        """Run one of its commands in `folder`; return what it printed."""
        done = subprocess.run(
            [str(self.bin / command), *arguments],
            cwd=folder,
            env=self.variables,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        return done.stdout

    def pip_install(self, requirement: str) -> None:
        """Install with pip, from nothing but the requirement itself and what is linked."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python")]
        offline = ["--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", *offline, requirement], check=True)


def create(folder: Path, pyproject: Path, extra: str) -> CleanEnvironment:
    """Create an environment that has what `pyproject` declares for `extra`, and what that needs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    environment = CleanEnvironment(folder)
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"][extra]]
    for dist in _closure(map(Requirement, declared)):
        _link(dist, environment)
    return environment


def _closure(requirements: Iterable[Requirement]) -> Iterator[Distribution]:
    """Yield what the requirements need, each distribution once, as far as it is installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            dist = distribution(requirement.name)
        except PackageNotFoundError:
            # pip will name it if it is needed on this platform.
            continue
        yield dist
        extras = requirement.extras or {""}
        needs = map(Requirement, dist.requires or ())
        waiting += [need for need in needs if _is_needed(need, extras)]


def _is_needed(need: Requirement, extras: Iterable[str]) -> bool:
    return not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)


def _link(dist: Distribution, environment: CleanEnvironment) -> None:
    for file in dist.files or ():
        if file.parts[0] == "..":
            # A command such as ninja: ../../../bin/ninja.
            target = environment.bin / file.name
            source = Path(str(dist.locate_file(file))).resolve()
        else:
            target = environment.site_packages / file.parts[0]
            source = Path(str(dist.locate_file(file.parts[0])))
        if file.parts[0] != "__pycache__" and not target.exists() and source.exists():
            target.symlink_to(source)
