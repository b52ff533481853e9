"""The commands where their packages are not installed: one sentence that names what to install."""

import subprocess
import sys

import pytest

BLOCK = "import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module({module!r}, run_name='__main__')"


@pytest.mark.parametrize(
    ("module", "arguments", "package", "extra"),
    [
        ("octavo_server", ["--version"], "yaml", "octavo[server]"),
        ("octavo_server", ["--version"], "safetensors", "octavo[server]"),
        ("octavo_server", ["build"], "torch", "octavo[server]"),
        ("octavo_client.demo", ["--help"], "rich", "octavo[server,demo]"),
        ("octavo_client.demo", ["--help"], "threadpoolctl", "octavo[server,demo]"),
        ("octavo_client.load", ["--help"], "rich", "octavo[load]"),
        ("octavo_client.load", ["--target", "x", "--html", "y"], "matplotlib", "octavo[load]"),
    ],
)
def test_a_missing_package_is_one_sentence(
    module: str, arguments: list[str], package: str, extra: str
) -> None:
    script = BLOCK.format(package=package, module=module)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert f'the package {package} is not installed; pip install "{extra}"' in done.stderr
    assert "Traceback" not in done.stderr
