"""The steps of the images, run as they are: the same scripts, a scratch prefix, and no network but for nvcc.

What the environment of the tests has is linked into the prefix instead of downloaded, torch above all, and the cpu
kernels that the tests compiled are copied, so that nothing is compiled twice.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from octavo_server.kernel_build import build_cpu_kernels
from tests.docker import sandbox
from tests.e2e import clean_environment

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
STEPS = ROOT / "docker" / "steps"
OFFLINE = "--no-index --no-build-isolation"
MODEL = (
    "name=tiny,num_layers=1,num_q_heads=4,num_kv_heads=2,head_dim=16,max_context=160,num_blocks=12"
)


@dataclass(frozen=True, slots=True)
class Image:
    """The folders of an image that was built outside of a container."""

    source: Path
    prefix: Path

    @property
    def variables(self) -> dict[str, str]:
        """What the server's image sets."""
        return {
            "PATH": str(self.prefix / "bin"),
            "OCTAVO_CACHE_DIR": str(self.prefix / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def step(self, name: str, *arguments: str, **variables: str) -> str:
        """Run a step as a build stage does; return what it printed."""
        settings = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": os.environ.get("HOME", "/"),
            "OCTAVO_PREFIX": str(self.prefix),
            "OCTAVO_DIST": str(self.source.parent / "dist"),
            "PIP_ARGS": OFFLINE,
            **variables,
        }
        command = [str(STEPS / name), *arguments]
        done = subprocess.run(
            command,
            cwd=self.source,
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder that every user can reach in a sandbox, unlike pytest's."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="image-", dir=ROOT / "build"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def source(scratch: Path) -> Path:
    """What .dockerignore lets through of the checkout."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    folder = scratch / "source"
    for name in (line[1:] for line in lines if line.startswith("!")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns(*ignored))
        else:
            shutil.copy2(ROOT / name, target)
    return folder


@pytest.fixture(scope="module")
def image(scratch: Path, source: Path) -> Image:
    """The server's image for CPUs, all stages of it."""
    image = Image(source, scratch / "octavo")
    for extra in ("server", "otel"):
        clean_environment.create(image.prefix, source / "pyproject.toml", extra)
    library = build_cpu_kernels()
    copied = image.prefix / "cache" / "kernels" / library.parent.name
    shutil.copytree(library.parent, copied)
    image.step("install-torch.sh")
    image.step("build-wheel.sh")
    image.step("install-wheel.sh", "server,otel")
    built = image.step("build-kernels.sh")
    assert str(copied / library.name) in built
    image.step("trim.sh")
    return image


@pytest.fixture
def sandboxed_image(image: Image) -> Image:
    """The image, where this process may make a sandbox."""
    if reason := sandbox.why_not():
        pytest.skip(f"this process cannot make a sandbox: {reason}")
    return image


def test_the_prefix_has_the_server_of_the_wheel(image: Image, tmp_path: Path) -> None:
    program = "import octavo_server; print(octavo_server.__file__)"
    command = [str(image.prefix / "bin" / "python"), "-c", program]
    printed = subprocess.run(
        command, cwd=tmp_path, env=image.variables, capture_output=True, text=True, check=True
    ).stdout
    assert Path(printed.strip()).is_relative_to(image.prefix)


def test_trim_removes_pip_and_follows_no_link(image: Image) -> None:
    (packages,) = image.prefix.glob("lib/python3.*/site-packages")
    assert not (packages / "pip").exists()
    assert (packages / "torch").is_symlink()
    assert (packages / "torch" / "include").is_dir()


def test_trim_removes_what_compiling_needs(image: Image, tmp_path: Path) -> None:
    torch = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    kept = {torch / "bin" / "torch_shm_manager", torch / "lib" / "libtorch.so"}
    gone = [torch / name for name in ("include/c10.h", "bin/protoc", "test/a.py", "lib/libx.a")]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    image.step("trim.sh", OCTAVO_PREFIX=str(tmp_path))
    assert {path for path in torch.rglob("*") if path.is_file()} == kept


def test_the_kernels_load_without_a_compiler_and_without_writing(sandboxed_image: Image) -> None:
    done = sandbox.run(["/bin/sh", str(STEPS / "check.sh")], sandboxed_image.variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(sandboxed_image.prefix / "cache" / "kernels") in done.stdout


def test_check_finds_a_compiler(image: Image, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.touch(0o755)
    variables = {**image.variables, "PATH": f"{image.prefix}/bin:{tmp_path}"}
    done = subprocess.run(
        ["/bin/sh", str(STEPS / "check.sh")],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "the image has a compiler" in done.stderr


def test_the_server_runs_on_a_read_only_file_system_as_nobody_special(
    sandboxed_image: Image,
) -> None:
    """It starts, says that it is ready, and ends well when the container is stopped."""
    program = str(sandboxed_image.prefix / "bin" / "octavo-server")
    monitoring = ["--metrics-address", "127.0.0.1:0", "--health-address", "127.0.0.1:0"]
    flags = ["--backend", "cpu", "--port", "0", *monitoring, "--model", MODEL]
    process = subprocess.Popen(
        sandbox.sandboxed([program, "serve", *flags]),
        env=sandboxed_image.variables,
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        starts = ["listening on ", "metrics on ", "health on "]
        assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts
        target = lines[-1].split()[-1]
        health = sandbox.run([program, "health", "--target", target], sandboxed_image.variables)
        assert (health.returncode, health.stdout) == (0, f"{target} ready: SERVING\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        health = sandbox.run([program, "health", "--target", target], sandboxed_image.variables)
        assert health.returncode == 1
    finally:
        process.kill()
        process.communicate()


def test_the_sandbox_is_one(sandboxed_image: Image) -> None:
    variables = sandboxed_image.variables
    program = (
        "import os, tempfile\n"
        "assert os.getuid() == 10001\n"
        "for folder in ('/', '/tmp', '/var/tmp', '/dev/shm', os.environ['OCTAVO_CACHE_DIR']):\n"
        "    assert not os.access(folder, os.W_OK), folder\n"
    )
    done = sandbox.run([str(sandboxed_image.prefix / "bin" / "python"), "-c", program], variables)
    assert done.returncode == 0, done.stderr


def test_the_load_test_needs_no_server(scratch: Path, source: Path, image: Image) -> None:
    """`image` built the wheel."""
    load = Image(source, scratch / "load")
    clean_environment.create(load.prefix, source / "pyproject.toml", "load")
    load.step("install-wheel.sh", "load", PIP_ARGS=OFFLINE)
    load.step("trim.sh")
    subprocess.run(
        [str(load.prefix / "bin" / "octavo-load"), "--help"],
        check=True,
        env={},
        stdout=subprocess.DEVNULL,
    )
    assert not list(load.prefix.glob("lib/python3.*/site-packages/torch"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders to another user")
def test_the_user_and_its_folders(image: Image, tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group"):
        (tmp_path / "etc" / name).touch()
    image.step("add-user.sh", OCTAVO_ROOT=str(tmp_path))
    entry = (tmp_path / "etc" / "passwd").read_text().split(":")
    assert entry[:4] == ["octavo", "x", str(sandbox.USER_ID), str(sandbox.USER_ID)]
    assert (tmp_path / "var/lib/octavo").stat().st_uid == sandbox.USER_ID
    assert (tmp_path / "var/lib/octavo").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "run/octavo").stat().st_uid == sandbox.USER_ID


def test_nvcc_compiles_and_links(image: Image, tmp_path: Path) -> None:
    image.step("install-nvcc.sh", NVCC_PREFIX=str(tmp_path / "nvcc"), PIP_ARGS="")
    kernel = tmp_path / "kernel.cu"
    kernel.write_text("__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); }\n")
    nvcc = str(tmp_path / "nvcc" / "cuda" / "bin" / "nvcc")
    output = str(tmp_path / "kernel.so")
    options = ["-arch=sm_80", "-shared", "-Xcompiler=-fPIC", "-cudart", "static"]
    subprocess.run([nvcc, *options, str(kernel), "-o", output], check=True)
