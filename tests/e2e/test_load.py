"""The load test against real servers: one that is right, one that is wrong, one that is too small, and with chaos."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from octavo_client import Client
from octavo_client.load.cli import main
from octavo_server import server as server_module
from octavo_server.backends.base import Backend, StepOutput
from octavo_server.backends.registry import create_backend
from octavo_server.config_keys import ModelConfig, ServerConfig
from octavo_server.model import ModelSpec
from octavo_server.server import Server
from tests.rpc.certificates import Authority
from tests.rpc.tenants import TenantsFile

NUM_BLOCKS = 256


class LyingBackend:
    """A real backend that answers one entry in sixteen with 1% too much; nobody who only counts would see it."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self._num_answers = 0

    def step(self, *args: Any, **kwargs: Any) -> StepOutput:
        """Run a step, and lie now and then."""
        output = self._inner.step(*args, **kwargs)
        if output.out is not None:
            rows = (self._num_answers + np.arange(len(output.out))) % 16 == 0
            self._num_answers += len(output.out)
            output.out[rows] = (output.out[rows] * 1.01).astype(output.out.dtype)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def model_config(name: str, num_blocks: int) -> ModelConfig:
    spec = ModelSpec(
        name=name,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        block_size=16,
        max_context=512,
        sm_scale=(0.25, 0.25),
        window=(0, 40),
        soft_cap=(0.0, 0.0),
    )
    return ModelConfig(spec, num_blocks=num_blocks)


@contextmanager
def serving(
    *, backend: Backend | None = None, num_blocks: int = NUM_BLOCKS, **settings: Any
) -> Iterator[str]:
    """Run a server and give its address."""
    found = backend or create_backend("cpu", 1, pin_threads=False)
    models = (model_config("tiny", num_blocks), model_config("other", num_blocks))
    config = ServerConfig(port=0, models=models, **({"max_sessions": 200} | settings))
    with mock.patch.object(server_module, "create_backend", return_value=found):
        server = Server(config)
    server.start()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        server.stop()


def run_load(target: str, path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the load test for a moment; return its exit status and its JSON."""
    json_path = path / "load.json"
    short = ("--prompt-tokens", "1-40:0.9,300", "--output-tokens", "1-12", "--warm-up", "0.1")
    status = main(["--target", target, "--json", str(json_path), *short, *arguments])
    record: dict[str, Any] = json.loads(json_path.read_text(encoding="utf-8"))
    return status, record


def assert_empty(target: str) -> None:
    with Client(target) as client:
        info = client.server_info()
        assert info.num_sessions == 0
        assert {m.num_free_blocks for m in info.models.values()} == {info.models["tiny"].num_blocks}


def test_a_sweep_of_two_models_is_checked_and_reported(tmp_path: Path) -> None:
    html, table, plot = tmp_path / "a" / "load.html", tmp_path / "load.csv", tmp_path / "load.svg"
    with serving() as target:
        status, record = run_load(
            target,
            tmp_path,
            *("--concurrency", "1,3", "--steps", "60", "--sessions-per-step", "1:1,3:1"),
            *("--model", "tiny=2", "--model", "other", "--check", "0.5", "--dtype", "bfloat16"),
            *("--html", str(html), "--csv", str(table), "--plot", str(plot)),
        )
        assert_empty(target)
    assert status == 0
    assert [point["counts"]["num_steps"] for point in record["points"]] == [60, 60]
    for point in record["points"]:
        assert point["counts"]["num_layer_steps"] >= 60
        assert point["checks"]["num_checked"] == point["counts"]["num_sampled"] > 0
        assert point["checks"]["num_wrong"] == 0
    assert record["was_restored"]
    assert record["faults"] == []
    assert len(list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))) == 2
    assert html.read_text(encoding="utf-8").count("<svg") == 3
    assert plot.read_text(encoding="utf-8").startswith("<svg")


def test_an_open_loop_in_two_processes(tmp_path: Path) -> None:
    with serving() as target:
        status, record = run_load(
            target,
            tmp_path,
            *("--rate", "150", "--steps", "80", "--processes", "2", "--max-in-flight", "8"),
            *("--model", "tiny", "--layers", "1", "--check", "1", "--check-when", "during"),
        )
        assert_empty(target)
    (point,) = record["points"]
    assert status == 0
    assert point["counts"]["num_steps"] == 80
    assert point["counts"]["num_tokens"] == 80, "a token of one layer is one step"
    assert point["checks"]["num_checked"] >= 80
    waited = sum(count for _, _, count in point["lateness_ns"])
    assert waited + point["counts"]["num_without_lane"] == 80


def test_processes_prove_themselves_by_the_files_that_flags_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority, tenants = Authority(tmp_path), TenantsFile(tmp_path / "tenants.yaml")
    token = tmp_path / "token"
    token.write_text(tenants.add("load") + "\n")
    server, client = (authority.issue(tmp_path / name) for name in ("server", "client"))
    ca = str(authority.path)
    tls = ("--tls-ca", ca, "--tls-cert", str(client.cert), "--tls-key", str(client.key))
    load = ("--concurrency", "2", "--steps", "40", "--model", "tiny", "--check", "1")
    with serving(**server.settings, **tenants.settings, tls_client_ca=ca) as target:
        chaos = ("--processes", "2", "--chaos", "cancel,rival,slow", "--chaos-rate", "0.2")
        status, record = run_load(target, tmp_path, *load, *chaos, *tls, "--token-file", str(token))
        assert status == 0, record["faults"]
        assert record["points"][0]["checks"]["num_wrong"] == 0
        assert main(["--target", target, *load, *tls]) == 1
        assert "UNAUTHENTICATED" in capsys.readouterr().err
    assert main(["--target", target, *load, "--token-file", str(tmp_path / "none")]) == 2
    assert f"the token file {tmp_path / 'none'} cannot be read" in capsys.readouterr().err


def test_wrong_answers_fail_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lying: Any = LyingBackend(create_backend("cpu", 1, pin_threads=False))
    with serving(backend=lying) as target:
        status, record = run_load(
            target, tmp_path, "--concurrency", "2", "--steps", "100", "--check", "1"
        )
    assert status == 1
    assert 0 < record["num_wrong"] < record["points"][0]["checks"]["num_checked"]
    assert "times the error that it may have" in record["faults"][0]
    assert "answers are wrong" in capsys.readouterr().err


def test_a_server_that_is_too_small_is_survived_when_expected(tmp_path: Path) -> None:
    load = ("--concurrency", "6", "--steps", "150", "--model", "tiny", "--check", "0.5")
    with serving(num_blocks=24, max_sessions=5) as target:
        status, record = run_load(target, tmp_path, *load)
        assert status == 0, record["faults"]
        assert {"SESSION_LIMIT"} <= set(record["points"][0]["counts"]["refusals"])
        assert_empty(target)
        status, record = run_load(target, tmp_path, *load, "--expect", "none")
        assert status == 1
        assert any("SESSION_LIMIT" in fault for fault in record["faults"])
        assert_empty(target)


def test_chaos_leaves_nothing_behind_and_no_answer_wrong(tmp_path: Path) -> None:
    with serving(num_blocks=200) as target:
        status, record = run_load(
            target,
            tmp_path,
            *(
                "--concurrency",
                "6",
                "--sessions",
                "30",
                "--steps-per-stream",
                "2",
                "--processes",
                "2",
            ),
            *("--duration", "2.5", "--chaos", "all", "--chaos-rate", "0.3", "--kill-every", "60"),
            *("--check", "1", "--check-when", "during"),
        )
        assert_empty(target)
    counts = record["points"][0]["counts"]
    assert status == 0, record["faults"]
    assert {"kill", "cancel", "cancel upload", "deadline", "slow", "rival"} <= set(counts["chaos"])
    assert record["points"][0]["checks"]["num_checked"] > 20
    assert record["was_restored"]


def test_a_session_that_the_server_loses_is_an_unexpected_error(tmp_path: Path) -> None:
    """Whatever is not named as expected fails the run; here every token ends the session under the lane."""

    class Forgetful(LyingBackend):
        def step(self, *args: Any, **kwargs: Any) -> StepOutput:
            raise RuntimeError("planted device failure")

    forgetful: Any = Forgetful(create_backend("cpu", 1, pin_threads=False))
    with serving(backend=forgetful) as target:
        status, record = run_load(target, tmp_path, "--steps", "5", "--duration", "1", "--shared")
    assert status == 1
    assert any("DEVICE_FAILURE" in fault for fault in record["faults"])


def test_a_run_that_is_told_to_end_closes_its_sessions_and_reports() -> None:
    with serving() as target:
        command = [sys.executable, "-m", "octavo_client.load", "--target", target]
        with subprocess.Popen(
            [*command, "--concurrency", "2", "--duration", "300", "--warm-up", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            while "measuring" not in (line := process.stdout.readline()):
                assert line, "the load test ended early"
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "interrupted" in err
        assert "the server holds what it held before" in out
        assert_empty(target)


def test_mistakes_and_absent_servers_have_their_exit_codes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--target", "127.0.0.1:1"]) == 1
    assert "127.0.0.1:1" in capsys.readouterr().err
    with serving() as target:
        assert main(["--target", target, "--check", "2"]) == 2
    assert "--check" in capsys.readouterr().err


def test_the_command_starts_a_server_of_its_own() -> None:
    flags = (
        "--backend reference --model name=own,num_layers=1,num_q_heads=2,num_kv_heads=1,head_dim=8,"
        "max_context=64,num_blocks=16"
    )
    command = [sys.executable, "-m", "octavo_client.load", "--start-server", flags]
    done = subprocess.run(
        [*command, "--steps", "20", "--prompt-tokens", "4", "--check", "1", "--warm-up", "0"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
    assert "the server holds what it held before" in done.stdout
