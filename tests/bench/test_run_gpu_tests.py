"""How the kernel tests are run on a GPU: what is left out, what a sanitizer says, and the tests without pytest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from octavo_server.backends.base import DecodeOutput
from octavo_server.backends.reference import ReferenceBackend
from tests.bench import kernel_smoke, oracle_only, run_gpu_tests
from tests.bench.kernel_smoke import CASES, FEW
from tests.bench.run_gpu_tests import KERNEL_TESTS, missing_imports, pytest_arguments, run_sanitizer

pytest_plugins = ["pytester"]


def test_a_module_that_needs_what_is_not_here_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_good.py").write_text("import json\nfrom tests.kernels.rig import Rig\n")
    (tmp_path / "test_bad.py").write_text("def f():\n    from no_such_package.part import x\n")
    assert missing_imports(tmp_path / "test_good.py") == []
    assert missing_imports(tmp_path / "test_bad.py") == ["no_such_package"]
    arguments = pytest_arguments(tmp_path)
    assert arguments[-2:] == ["--ignore", str(tmp_path / "test_bad.py")]
    assert capsys.readouterr().out == "skipped test_bad.py: there is no no_such_package\n"


def test_here_nothing_is_left_out() -> None:
    assert "--ignore" not in pytest_arguments(KERNEL_TESTS)


def test_the_tests_of_the_gpu_are_found(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_names="""
        import pytest

        @pytest.mark.parametrize("backend", ["reference", "cpu-avx2", "cuda-emulated", "cuda"])
        def test_it(backend):
            print(backend)
        """
    )
    selected = pytest_arguments(pytester.path)
    result = pytester.runpytest("-k", selected[selected.index("-k") + 1], "--collect-only", "-q")
    assert [line for line in result.outlines if "::" in line] == ["test_names.py::test_it[cuda]"]


def test_without_grpc_there_is_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "octavo_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "grpc", None)
    oracle = oracle_only.import_oracle()
    assert oracle.__name__ == "octavo_client.oracle"
    assert not hasattr(sys.modules["octavo_client"], "Client")


# ---- compute-sanitizer --------------------------------------------------------------------------


def fake_sanitizer(folder: Path, script: str) -> None:
    """Put a compute-sanitizer into a folder."""
    path = folder / run_gpu_tests.SANITIZER
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is all of PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_no_sanitizer_is_a_reason(on_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sanitizer("memcheck")
    assert "compute-sanitizer memcheck: it is not on PATH" in capsys.readouterr().out


def test_a_sanitizer_that_does_not_work_is_a_reason(
    on_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sanitizer(on_path, "echo '========= Device not supported'; exit 1")
    assert run_sanitizer("racecheck")
    assert "it does not work here: Device not supported" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "passes"), [(0, True), (86, False)])
def test_what_a_sanitizer_finds_is_a_failure(on_path: Path, status: int, passes: bool) -> None:
    is_smoke = 'case "$*" in *"-m tests.bench.kernel_smoke --few") exit '
    fake_sanitizer(on_path, f"{is_smoke}{status};; esac")
    assert run_sanitizer("memcheck") == passes


# ---- Without pytest -----------------------------------------------------------------------------


def test_smoke_cases_are_all_different() -> None:
    assert len({case.label for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.label)
def test_smoke_passes(case: kernel_smoke.Case) -> None:
    kernel_smoke.run(ReferenceBackend(), case)


def test_smoke_fails_on_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ReferenceBackend.int8_paged_decode_attention

    def wrong(*arguments: object, return_lse: bool) -> DecodeOutput:
        output = right(*arguments, return_lse=return_lse)  # type: ignore[arg-type]
        return output._replace(out=output.out * 1.01)

    monkeypatch.setattr(ReferenceBackend, "int8_paged_decode_attention", wrong)
    assert kernel_smoke.main(["--backend", "reference", "--few"]) == len(FEW)
    assert capsys.readouterr().out.count("FAILED") == len(FEW)
