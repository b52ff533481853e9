"""What the README promises is what the code and the checks do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from octavo_server.config_keys import ModelKeys
from octavo_server.config_schema import keys_of
from octavo_server.errors import REASONS, ReasonSpec
from octavo_server.model import ModelSpec

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ERROR_ROW = re.compile(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \|([a-z_, ]*)\|( yes)? \|$", re.MULTILINE)


def blocks(language: str) -> list[str]:
    """Return the README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_error_table_is_the_server_s() -> None:
    rows = {
        reason: ReasonSpec(code, tuple(metadata.replace(",", "").split()), bool(retry))
        for reason, code, metadata, retry in ERROR_ROW.findall(README)
    }
    assert rows == {str(reason): spec for reason, spec in REASONS.items()}


def test_checks_run_the_readme_s_test_command_and_what_takes_longer() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    commands = [line for line in script.splitlines() if line.startswith("make ")]
    (test_command,) = (block.strip() for block in blocks("sh") if block == "make test\n")
    assert commands == ["make lint", test_command, "make test-asan", "make test-long"]


def test_client_example_is_short() -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line]) <= 15


def test_every_key_of_a_model_is_in_its_table() -> None:
    table = README[README.index("| key of a model |") :].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines()))
    assert sorted(named) == sorted(key.name for key in keys_of(ModelKeys))


def test_byte_arithmetic_holds() -> None:
    llama = ModelSpec("l", 1, 32, 8, 128, 32, 8192, (1.0,), (0,), (0.0,))
    sent_bytes = 2 * (llama.num_q_heads + 2 * llama.num_kv_heads) * llama.head_dim
    received_bytes = 2 * llama.num_q_heads * llama.head_dim
    read_bytes = llama.int8_token_bytes * 8192
    token_bytes = llama.int8_token_bytes // llama.num_kv_heads
    fp16_bytes = llama.fp16_token_bytes // llama.num_kv_heads
    stated = " ".join(README.split())
    assert f"{token_bytes} bytes where FP16 takes {fp16_bytes}" in stated
    assert f"{fp16_bytes / token_bytes:.2f} times the context" in stated
    assert f"{read_bytes / 1e6:.1f} MB of cache" in stated
    assert f"{sent_bytes:,} bytes of Q, K and V there and {received_bytes:,} bytes back" in stated
    (fraction,) = re.findall(r"KB, 1/(\d+) of it", stated)
    assert int(fraction) == pytest.approx(read_bytes / (sent_bytes + received_bytes), rel=0.01)


def test_sizes_are_what_pools_hold() -> None:
    table = README[README.index("| model | layers / kv heads") :].partition("\n\n")[0]
    head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    assert len(rows) >= 4
    for _, shape, *cells in rows:
        num_layers, num_kv_heads, head_dim = map(int, shape.split("/"))
        options = (1.0,) * num_layers, (0,) * num_layers, (0.0,) * num_layers
        spec = ModelSpec("m", num_layers, num_kv_heads, num_kv_heads, head_dim, 32, 8192, *options)
        sizes = [int(size.removesuffix(" GiB")) * 2**30 for size in head[3:]]
        held = [size // spec.block_bytes * spec.block_size for size in sizes]
        assert [int(cell.replace(",", "")) for cell in cells] == [spec.int8_token_bytes, *held]


def test_threat_model_names_tests_that_are_there() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:unit|rpc|e2e|kernels)/test_\w+\.py", page))
    assert len(named) > 10
    assert {name for name in named if not (ROOT / "tests" / name).is_file()} == set()
