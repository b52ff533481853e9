"""Octavo installed into a clean environment serves and decodes from there, with the README's own words."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e import clean_environment
from tests.e2e.clean_environment import CleanEnvironment

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
)
CARRIED = (
    "octavo/v1/octavo.proto",
    "octavo/py.typed",
    "octavo_client/py.typed",
    "octavo_client/demo/weights",
    "octavo_server/py.typed",
    "octavo_server/octavo.example.yaml",
    "octavo_server/csrc/bindings",
    "octavo_server/csrc/common/batch_checks.cpp",
    "octavo_server/csrc/cpu",
    "octavo_server/csrc/cuda/decode.cu",
    "octavo_server/csrc/cuda/plan.cpp",
    "octavo_server/csrc/include/octavo",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    """Build the source distribution of a copy of the tree, and install it with pip as `octavo[server]`."""
    folder = tmp_path_factory.mktemp("install")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(tree)], check=True, stdout=subprocess.DEVNULL)
    (source,) = folder.glob("octavo-*.tar.gz")
    environment = clean_environment.create(folder / "venv", tree / "pyproject.toml", "server")
    environment.pip_install(f"octavo[server] @ {source.as_uri()}")
    shutil.rmtree(tree)
    return environment


def readme_block(language: str, start: str) -> str:
    """Return the README's only code block of a language that has a line with that start."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if re.search(rf"^{start}", block, re.MULTILINE)]
    return str(block)


@contextmanager
def serving(environment: CleanEnvironment, folder: Path, *arguments: str) -> Iterator[str]:
    """Run `octavo-server serve` outside the checkout; yield host:port; expect a clean end on SIGTERM."""
    command = [str(environment.bin / "octavo-server"), *arguments, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment.variables, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), "the server ended before it listened"
        yield line.removeprefix("listening on ").strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.communicate()


def test_wheel_carries_everything(installed: CleanEnvironment) -> None:
    for path in CARRIED:
        assert (installed.site_packages / path).exists(), path
    (weights,) = (installed.site_packages / "octavo_client/demo/weights").glob("*.safetensors")
    assert weights.stat().st_size <= 8 * 2**20


def test_installed_packages_are_those_of_the_environment(
    installed: CleanEnvironment, tmp_path: Path
) -> None:
    program = (
        "import octavo.v1, octavo_client, octavo_server\n"
        "for module in (octavo.v1, octavo_client, octavo_server): print(module.__file__)"
    )
    for line in installed.output_of(tmp_path, "python", "-c", program).splitlines():
        assert Path(line).is_relative_to(installed.site_packages)


@pytest.mark.timeout(600)
def test_readme_s_server_answers_readme_s_client(
    installed: CleanEnvironment, tmp_path: Path
) -> None:
    block = readme_block("sh", r"octavo-server serve --model")
    (command,) = [line for line in block.splitlines() if line.startswith("octavo-server")]
    arguments = shlex.split(command)[1:]
    example = readme_block("python", "from octavo_client import Client")
    with serving(installed, tmp_path, *arguments) as address:
        program = tmp_path / "example.py"
        program.write_text(example.replace("127.0.0.1:50051", address), encoding="utf-8")
        printed = installed.output_of(tmp_path, "python", str(program))
    assert printed.splitlines() == [
        *(f"layer {layer}: (1, 8, 64) float16" for layer in range(4)),
        "cached tokens of each layer: (101, 101, 101, 101)",
    ]


@pytest.mark.timeout(600)
def test_example_config_is_served(installed: CleanEnvironment, tmp_path: Path) -> None:
    text = installed.output_of(tmp_path, "octavo-server", "example-config")
    # The share of the free memory stays out of a test: the machine may be busy.
    (tmp_path / "octavo.yaml").write_text(text.replace("memory: 25%", "num_blocks: 4"))
    arguments = ("serve", "--config", "octavo.yaml", "--host", "localhost")
    with serving(installed, tmp_path, *arguments) as address:
        assert re.fullmatch(r"localhost:\d+", address)
