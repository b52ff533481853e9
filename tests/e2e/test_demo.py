"""The command `octavo-demo` from its arguments to its exit code, against real servers."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo_client import BatchResult, Client
from octavo_client.demo.cli import main
from octavo_client.demo.local_server import ServerStartError, local_server, model_flag
from octavo_client.demo.model import FloatArray, TinyLlama
from octavo_client.demo.orchestrator import MODEL_NAME, RemoteAttention

COMMAND = [sys.executable, "-m", "octavo_client.demo"]
NUMBER = r"([\d.,]+)"
ROWS = {
    "tokens/s": NUMBER,
    "layer step p50": rf"{NUMBER} ms",
    "layer step p99": rf"{NUMBER} ms",
    "cache bytes, INT8": NUMBER,
    "cache bytes, FP16": NUMBER,
    "perplexity, exact": NUMBER,
    "perplexity, Octavo": NUMBER,
    "top-1 agreement": rf"{NUMBER}%",
    "mean KL": r"(\d\.\d+e[-+]\d+)",
    "tokens compared": NUMBER,
    "... one by one": NUMBER,
}
"""The rows of the table, and what their values look like."""

Capture = pytest.CaptureFixture[str]


def serve(options: str = "", name: str = MODEL_NAME) -> Iterator[str]:
    keys = dict(
        key.split("=") for key in model_flag(name, TinyLlama.load().config, num_seqs=4).split(",")
    )
    keys |= dict(key.split("=") for key in options.split(",") if key)
    flag = ",".join(f"{key}={value}" for key, value in keys.items())
    with local_server(["--model", flag], lambda _news: None) as address:
        yield address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    yield from serve()


def values_of(output: str) -> dict[str, float]:
    """Read the table's values by row."""
    found = {
        row: re.search(rf"{re.escape(row)} +│ +{value} ", output) for row, value in ROWS.items()
    }
    assert all(found.values()), (found, output)
    return {row: float(match[1].replace(",", "")) for row, match in found.items() if match}


def test_demo_starts_a_server_and_prints_text_speed_and_quality() -> None:
    prompts = ["In the beginning", "And Moses said"]
    flags = [f"--prompt={prompt}" for prompt in prompts]
    command = [*COMMAND, *flags, "--tokens=24", "--quality-tokens=800"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    values = values_of(done.stdout)
    # Each session holds its prompt and all new tokens but the last, which nothing was computed for.
    num_held = sum(map(len, prompts)) + 2 * 23
    assert values["cache bytes, INT8"] == num_held * 4 * 2 * 2 * 66
    assert values["cache bytes, FP16"] == num_held * 4 * 2 * 2 * 128
    assert 0 < values["layer step p50"] <= values["layer step p99"]
    assert (values["tokens compared"], values["... one by one"]) == (800, 200)
    for text in (*prompts, "starting octavo-server", "decoding 2 at once", "scoring it"):
        assert text in done.stdout


def test_target_is_used_and_left_running(address: str, capsys: Capture) -> None:
    for _ in range(2):
        assert main([f"--target={address}", "--tokens=4", "--quality-tokens=0"]) == 0
        output = capsys.readouterr().out
        assert f"at {address}" in output
        assert "starting octavo-server" not in output
        assert "perplexity" not in output


def test_same_seed_gives_the_same_text(address: str, capsys: Capture) -> None:
    def text(seed: int) -> str:
        flags = [f"--target={address}", "--prompt=And", f"--seed={seed}", "--quality-tokens=0"]
        assert main([*flags, "--tokens=24"]) == 0
        found = re.search(r"╭.*╯", capsys.readouterr().out, re.DOTALL)
        assert found
        return found[0]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_steps_are_timed(address: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Client.decode_batch

    def slow(*args: Any, **kwargs: Any) -> BatchResult:
        time.sleep(0.03)
        return decode(*args, **kwargs)

    monkeypatch.setattr(Client, "decode_batch", slow)
    assert main([f"--target={address}", "--tokens=4", "--quality-tokens=4"]) == 0
    values = values_of(capsys.readouterr().out)
    assert 30 <= values["layer step p50"] <= values["layer step p99"]
    # 4 sessions, one token of each per 4 layers of 30 ms.
    assert values["tokens/s"] <= 4 / (4 * 0.03)


def test_bad_quality_fails(address: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = RemoteAttention.__call__

    def attend_to_the_wrong_heads(
        attention: RemoteAttention, layer: int, q: FloatArray, k: FloatArray, v: FloatArray
    ) -> FloatArray:
        return attend(attention, layer, q, k[:, ::-1], v)

    monkeypatch.setattr(RemoteAttention, "__call__", attend_to_the_wrong_heads)
    assert main([f"--target={address}", "--tokens=2", "--quality-tokens=200"]) == 1
    output = capsys.readouterr()
    values = values_of(output.out)
    assert values["perplexity, Octavo"] > 1.005 * values["perplexity, exact"]
    assert "octavo-demo: the quality is not what it must be: perplexity rises by" in output.err
    assert "less than the 99% that it must be" in output.err


def test_another_model_is_refused(capsys: Capture) -> None:
    for address in serve(name="other"):
        assert main([f"--target={address}"]) == 1
    error = capsys.readouterr().err
    assert f"must serve {MODEL_NAME}, it serves other; run: octavo-server serve --model" in error


def test_another_shape_is_refused(capsys: Capture) -> None:
    flag = f"name={MODEL_NAME},num_layers=2,num_q_heads=4,num_kv_heads=2,head_dim=64,max_context=64"
    flags = ["--model", f"{flag},num_blocks=8"]
    with local_server(flags, lambda _news: None) as address:
        assert main([f"--target={address}"]) == 1
    assert "must have num_layers 4, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (",window=512", "must have window 0 in every layer, got 512; run: "),
        (",sm_scale=0.12", "must have sm_scale 0.125 in every layer, got 0.12; run: "),
        (",soft_cap=0.5", "must have soft_cap 0 in every layer, got 0.5; run: "),
        (",max_context=512", "must have max_context 1024 or more, got 512; run: "),
        (",num_blocks=100", "must have 128 free blocks or more, got 100; run: "),
    ],
)
def test_other_options_are_refused(options: str, text: str, capsys: Capture) -> None:
    for address in serve(options):
        assert main([f"--target={address}"]) == 1
    output = capsys.readouterr()
    assert f"octavo-demo: {MODEL_NAME} at {address} {text}octavo-server serve" in output.err
    assert output.out == ""


def test_nobody_at_the_target(capsys: Capture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else gets it
        target = f"127.0.0.1:{unused.getsockname()[1]}"
        assert main([f"--target={target}"]) == 1
    assert f"no octavo-server answers at {target}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tokens=1"], "--tokens must be from 2 to 1023, got 1"),
        (["--tokens=1024"], "--tokens must be from 2 to 1023, got 1024"),
        (["--temperature=-1"], "--seed and --temperature must be 0 or more"),
        (["--temperature=nan"], "--seed and --temperature must be 0 or more"),
        (["--seed=-1"], "--seed and --temperature must be 0 or more"),
        (["--quality-tokens=4097"], "--quality-tokens must be from 0 to 4096, got 4097"),
        (["--prompt="], "a prompt must have from 1 to 784 bytes"),
        (["--prompt=" + "a" * 785], "got 785 bytes"),
        (["--prompt=\udcff"], r"a prompt must be UTF-8, got '\udcff'"),
        (["--target=\udcff"], r"--target must be UTF-8, got '\udcff'"),
        (["--target=localhost:1", "--backend=cpu"], "leave out one of --target and --backend"),
    ],
)
def test_arguments_that_cannot_be(flags: list[str], text: str, capsys: Capture) -> None:
    assert main(flags) == 2
    assert text in capsys.readouterr().err


def test_weights_that_cannot_be_read(tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors here")
    for path in (broken, tmp_path / "nowhere.safetensors"):
        assert main([f"--weights={path}"]) == 1
        assert f"cannot load the weights {path}: " in capsys.readouterr().err


def test_server_that_cannot_start_says_why(capsys: Capture) -> None:
    assert main(["--backend=abacus"]) == 1
    assert (
        "--backend: got 'abacus'; expected auto, cpu, cuda or reference" in capsys.readouterr().err
    )


def test_server_without_its_packages_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A package in the way that fails like one that is not installed.
    (tmp_path / "octavo_server").mkdir()
    (tmp_path / "octavo_server" / "__init__.py").write_text("import yaml_that_is_not_there\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with (
        pytest.raises(ServerStartError, match=r'pip install "octavo\[server\]"'),
        local_server([], lambda _news: None),
    ):
        pass


@pytest.fixture
def heeding_sigint() -> Iterator[None]:
    """Let children heed SIGINT, also when the tests run in the background of a shell, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("heeding_sigint")
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_demo_ends_its_server(signal_number: int, code: int) -> None:
    with subprocess.Popen([*COMMAND, "--tokens=900"], stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        lines = iter(demo.stdout.readline, "")
        address = next(found[1] for line in lines if (found := re.search(r" at (\S+):", line)))
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()
        next(line for line in lines if "decoding" in line)
        demo.send_signal(signal_number)
        assert demo.wait(30) == code
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
