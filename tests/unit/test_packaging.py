"""The distribution: every dependency pinned, every package carried."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_ROOTS = ("proto/octavo", "client/octavo_client", "server/octavo_server")


def pins() -> dict[str, str]:
    """Return the pinned versions by distribution."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pinned}


def declared() -> list[Requirement]:
    """Return what pyproject.toml asks for, of all extras; Octavo's own extras aside."""
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in requirements if requirement.name != "octavo"]


def test_every_dependency_is_pinned_within_its_range() -> None:
    versions = pins()
    assert next(iter(versions)) == "torch"
    for requirement in declared():
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_pins_carry_no_local_version() -> None:
    assert [version for version in pins().values() if "+" in version] == []


def test_every_folder_with_code_is_a_package_of_the_wheel() -> None:
    folders = {
        path.parent.relative_to((ROOT / root).parent)
        for root in PACKAGE_ROOTS
        for path in (ROOT / root).rglob("*.py")
    }
    packages = {".".join(folder.parts) for folder in folders}
    assert packages <= set(PYPROJECT["tool"]["setuptools"]["packages"])
