"""The configuration: values, defaults, and every mistake at once with its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from octavo_server.backends.registry import BACKEND_NAMES
from octavo_server.cli import example_config
from octavo_server.config import ConfigError, load_config
from octavo_server.config_keys import DEFAULT_MEMORY, MemorySize, ModelKeys, ServerConfig
from octavo_server.config_schema import keys_of
from octavo_server.model import ModelSpec

TINY = "name=tiny,num_layers=2,num_q_heads=4,num_kv_heads=2,head_dim=64,max_context=512"
TINY_YAML = "models: [{" + TINY.replace("=", ": ").replace(",", ", ") + "}]\n"

WriteYaml = Callable[[str], Path]


@pytest.fixture
def write_yaml(tmp_path: Path) -> WriteYaml:
    def write(text: str) -> Path:
        path = tmp_path / "octavo.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def mistakes_of(path: Path | None, *models: str, **flags: str) -> tuple[str, ...]:
    """Return the mistakes of a configuration that must have some, without the file's folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags, models)
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    folder = f"{path.parent}/" if path else ""
    return tuple(mistake.replace(folder, "") for mistake in caught.value.mistakes)


def model_of(options: str = "") -> ModelSpec:
    return load_config(None, {}, [TINY + options]).models[0].spec


def test_flags_alone_serve_with_defaults() -> None:
    config = load_config(None, {}, [TINY])
    assert config == ServerConfig(models=config.models)
    assert (config.host, config.port, config.backend) == ("127.0.0.1", 50051, "auto")
    assert config.max_message_bytes == 64 * 2**20
    (model,) = config.models
    assert (model.num_blocks, model.memory) == (None, DEFAULT_MEMORY)
    assert (model.spec.block_size, model.spec.deterministic) == (32, False)
    assert model.spec.sm_scale == (0.125, 0.125)
    assert (model.spec.window, model.spec.soft_cap) == ((0, 0), (0.0, 0.0))
    assert model.spec.sinks is None


def test_models_without_a_size_share_the_default() -> None:
    texts = [TINY, TINY.replace("name=tiny", "name=other"), TINY.replace("name=tiny", "name=sized")]
    models = load_config(None, {}, [*texts[:2], texts[2] + ",memory=1GiB"]).models
    assert [model.memory for model in models[:2]] == [MemorySize(fraction=0.25)] * 2
    assert models[2].memory == MemorySize(bytes=2**30)


def test_file_and_flags_say_the_same(write_yaml: WriteYaml) -> None:
    from_file = load_config(write_yaml("max_sessions: 5\nlog_level: debug\n" + TINY_YAML))
    from_flags = load_config(None, {"max_sessions": "5", "log_level": "debug"}, [TINY])
    assert [dataclasses.astuple(from_file.models[0].spec)] == [
        dataclasses.astuple(from_flags.models[0].spec)
    ]
    without_models = dataclasses.replace(from_flags, models=())
    assert dataclasses.replace(from_file, models=()) == without_models
    assert (from_file.max_sessions, from_file.log_level) == (5, "debug")


def test_flags_override_the_file(write_yaml: WriteYaml) -> None:
    path = write_yaml("port: 1\nmax_sessions: 5\n" + TINY_YAML)
    config = load_config(path, {"port": "0"}, [TINY.replace("tiny", "other")])
    assert (config.port, config.max_sessions) == (0, 5)
    assert [model.spec.name for model in config.models] == ["other"]


def test_every_key_of_the_server_is_read(write_yaml: WriteYaml) -> None:
    written = {
        "host": "::1",
        "port": 7,
        "unix_socket": "/run/octavo.sock",
        "backend": "reference",
        "num_threads": 3,
        "pin_threads": True,
        "max_sessions": 4,
        "max_streams": 5,
        "max_steps_in_flight": 6,
        "max_queued_steps": 7,
        "max_unary_calls": 8,
        "max_message_bytes": "1MiB",
        "shared_memory": True,
        "shared_memory_bytes": "2MiB",
        "lease_s": 1.5,
        "max_lease_s": 3.5,
        "tenant_max_sessions": 9,
        "tenant_max_tokens": 10,
        "tenant_max_bytes": "3MiB",
        "tls_cert": "/etc/octavo/tls.crt",
        "tls_key": "/etc/octavo/tls.key",
        "tls_client_ca": "/etc/octavo/ca.crt",
        "tenants": "/etc/octavo/tenants.yaml",
        "allow_plaintext": True,
        "metrics_address": "127.0.0.1:9464",
        "health_address": "[::1]:50052",
        "allow_plaintext_monitoring": True,
        "otlp_endpoint": "http://127.0.0.1:4317",
        "trace_sample_ratio": 0.5,
        "snapshot_dir": "/var/lib/octavo",
        "drain_timeout_s": 2.5,
        "log_level": "error",
        "log_format": "json",
    }
    assert written.keys() == {key.name for key in keys_of(ServerConfig)}
    lines = [f"{key}: {value!r}\n" for key, value in written.items()]
    config = load_config(write_yaml("".join(lines) + TINY_YAML))
    read = {name: getattr(config, name) for name in written}
    sizes = {
        "max_message_bytes": 2**20,
        "shared_memory_bytes": 2**21,
        "tenant_max_bytes": 3 * 2**20,
    }
    assert read == written | sizes


def test_attention_options_are_given_per_layer() -> None:
    spec = model_of(
        ",sm_scale=1e-1,window=[0, 128],soft_cap=[30,0],deterministic=true,block_size=64"
    )
    assert spec.sm_scale == (0.1, 0.1)
    assert spec.window == (0, 128)
    assert spec.soft_cap == (30.0, 0.0)
    assert (spec.deterministic, spec.block_size) == (True, 64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", MemorySize(bytes=4 * 2**30)),
        ("512 MiB", MemorySize(bytes=512 * 2**20)),
        ("1.5KiB", MemorySize(bytes=1536)),
        ("50%", MemorySize(fraction=0.5)),
        ("12.5%", MemorySize(fraction=0.125)),
        ("0.25", MemorySize(fraction=0.25)),
        ("1", MemorySize(fraction=1.0)),
    ],
)
def test_memory_is_a_size_or_a_share(text: str, expected: MemorySize) -> None:
    (model,) = load_config(None, {}, [f"{TINY},memory={text}"]).models
    assert (model.memory, model.num_blocks) == (expected, None)


def test_num_blocks_stands_instead_of_memory() -> None:
    (model,) = load_config(None, {}, [f"{TINY},num_blocks=12"]).models
    assert (model.memory, model.num_blocks) == (None, 12)


def test_memory_resolves_against_what_is_free() -> None:
    assert MemorySize(bytes=100).resolve(1000) == 100
    assert MemorySize(fraction=0.25).resolve(1000) == 250


@pytest.mark.parametrize(
    ("option", "got"),
    [
        ("num_layers=0", "0"),
        ("num_layers=true", "True"),
        ("num_layers=4.0", "4.0"),
        ("num_layers=four", "'four'"),
        ("num_layers=", "''"),
        ("num_q_heads=1025", "1025"),
        ("num_kv_heads=-1", "-1"),
        ("head_dim=60", "60"),
        ("head_dim=264", "264"),
        ("max_context=0", "0"),
        ("block_size=48", "48"),
        ("block_size=true", "True"),
        ("num_blocks=0", "0"),
        ("memory=0%", "'0%'"),
        ("memory=101%", "'101%'"),
        ("memory=nan%", "'nan%'"),
        ("memory=4GB", "'4GB'"),
        ("memory=0GiB", "'0GiB'"),
        ("memory=4096", "4096"),
        ("memory=true", "True"),
        ("sm_scale=0", "0"),
        ("sm_scale=.inf", "inf"),
        ("sm_scale=.nan", "nan"),
        ("sm_scale=true", "True"),
        ("sm_scale=[1, x]", "[1, 'x']"),
        ("window=-1", "-1"),
        ("window=[1, 2.5]", "[1, 2.5]"),
        ("window=[[1]]", "'[[1]]'"),
        ("window=[1", "'[1'"),
        ("window={a: 1}", "'{a: 1}'"),
        ("soft_cap=-30", "-30"),
        ("soft_cap=1e-9", "1e-09"),
        ("deterministic=1", "1"),
        ("name=a b", "'a b'"),
    ],
)
def test_value_out_of_range_is_quoted(option: str, got: str) -> None:
    key = option.partition("=")[0]
    others = [part for part in TINY.split(",") if not part.startswith(f"{key}=")]
    (mistake,) = mistakes_of(None, ",".join([*others, option]))
    assert mistake.startswith(f"--model #1: {key}: got {got}; expected ")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("port", "65536"),
        ("port", "http"),
        ("host", "two words"),
        ("backend", "gpu"),
        ("num_threads", "-1"),
        ("pin_threads", "1"),
        ("max_message_bytes", "1KiB"),
        ("max_message_bytes", "64MB"),
        ("max_message_bytes", "2GiB"),
        ("max_message_bytes", "true"),
        ("drain_timeout_s", "soon"),
        ("log_level", "loud"),
    ],
)
def test_mistake_in_a_flag_names_the_flag(key: str, text: str) -> None:
    (mistake,) = mistakes_of(None, TINY, **{key: text})
    assert mistake.startswith(f"--{key.replace('_', '-')}: got ")


def test_all_mistakes_come_at_once_with_their_lines(write_yaml: WriteYaml) -> None:
    path = write_yaml(
        """\
prt: 1
max_sesions: 4
host: ::1
host: b
models:
  - name: llama
    num_layers: 2
    num_q_heads: 7
    num_kv_heads: 2
    head_dim: 64
    max_context: 4096
    window:
      - 0
      - 1
      - 2
    memory: 50%
    num_blocks: 12
    sinks: {path: x}
  - name: llama
    num_layers: 2
    num_kv_heads: 2
    head_dim: 64
    max_context: 16
  - 5
  - name: [1]
    ? [complex]
    : 1
""",
    )
    assert mistakes_of(path, port="x") == (
        "--port: got 'x'; expected a whole number from 0 to 65535",
        "octavo.yaml:1: prt: unknown key; did you mean port?",
        "octavo.yaml:2: max_sesions: unknown key; did you mean max_sessions?",
        "octavo.yaml:4: host: given again after line 3; expected once",
        "octavo.yaml:8: num_q_heads: got 7; expected a multiple of num_kv_heads 2",
        "octavo.yaml:12: window: got a list of 3; expected one value a layer, 2",
        "octavo.yaml:16: memory: given beside num_blocks; expected one of the two",
        "octavo.yaml:18: sinks: got a mapping; expected a plain value or a list of them",
        "octavo.yaml:19: name: got 'llama', as at octavo.yaml:6; expected a name of its own",
        "octavo.yaml:19: num_q_heads: missing; expected a whole number from 1 to 1024",
        "octavo.yaml:24: models: got the value '5'; expected keys such as `name: llama`",
        "octavo.yaml:25: head_dim: missing; expected a multiple of 8 from 8 to 256",
        "octavo.yaml:25: max_context: missing; expected a whole number from 1 to 1073741824",
        "octavo.yaml:25: name: got [1]; expected a name of letters, digits and . _ : / -",
        "octavo.yaml:25: num_kv_heads: missing; expected a whole number from 1 to 1024",
        "octavo.yaml:25: num_layers: missing; expected a whole number from 1 to 1024",
        "octavo.yaml:25: num_q_heads: missing; expected a whole number from 1 to 1024",
        "octavo.yaml:26: a key is a list; expected a name",
    )


def test_unknown_key_without_a_likeness_lists_the_keys() -> None:
    (mistake,) = mistakes_of(None, f"{TINY},zzz=1")
    assert mistake.startswith("--model #1: zzz: unknown key; expected one of name, num_layers, ")


def test_malformed_model_flag_is_named() -> None:
    assert mistakes_of(None, TINY, f"{TINY.replace('tiny', 'b')},window,num_layers=2") == (
        "--model #2: 'window' is no key=value; expected name=...,num_layers=...",
        "--model #2: num_layers: given twice; expected once",
    )


def test_two_models_of_one_name_are_refused() -> None:
    assert mistakes_of(None, TINY, TINY) == (
        "--model #2: name: got 'tiny', as at --model #1; expected a name of its own",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "octavo.yaml: models: missing; expected at least one model"),
        ("port: 1\n", "octavo.yaml: models: missing; expected at least one model"),
        ("models: []\n", "octavo.yaml: models: missing; expected at least one model"),
        ("models: 3\n", "octavo.yaml:1: models: got the value '3'; expected a list of models"),
        ("models: {a: 1}\n", "octavo.yaml:1: models: got a mapping; expected a list of models"),
        ("- 1\n", "octavo.yaml:1: holds a list; expected keys such as `port: 50051`"),
        ("port:\n" + TINY_YAML, "octavo.yaml:1: port: got nothing; expected a whole number"),
        ("port: !!int x\n" + TINY_YAML, "octavo.yaml:1: port: got the value 'x' as int; expected"),
        (
            "host: !!bool x\n" + TINY_YAML,
            "octavo.yaml:1: host: got the value 'x' as bool; expected",
        ),
        ("port: *a\n", "octavo.yaml:1: is not YAML: found undefined alias 'a'"),
        ("port: 1\n  host: b\n", "octavo.yaml:2: is not YAML: mapping values are not allowed"),
        ("a: 1\n---\nb: 2\n", "octavo.yaml:2: is not YAML: but found another document"),
        ("a: \x01\n", "octavo.yaml: is not YAML: unacceptable character"),
    ],
)
def test_file_of_the_wrong_form_is_one_mistake(
    write_yaml: WriteYaml, text: str, expected: str
) -> None:
    (mistake,) = mistakes_of(write_yaml(text))
    assert mistake.startswith(expected)


def test_self_referring_yaml_is_refused(write_yaml: WriteYaml) -> None:
    (mistake,) = mistakes_of(write_yaml("port: &a [*a]\n" + TINY_YAML))
    assert mistake.startswith("octavo.yaml:1: port: got a list; expected a plain value")


def test_absent_file_is_one_mistake(tmp_path: Path) -> None:
    (mistake,) = mistakes_of(tmp_path / "none.yaml")
    assert mistake == "none.yaml: cannot be read: No such file or directory; expected a file"


def test_no_file_and_no_flags_miss_models() -> None:
    assert mistakes_of(None) == ("flags: models: missing; expected at least one model",)


SINKS = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


@pytest.mark.parametrize("name", ["sinks", "anything"])
def test_sinks_are_read_beside_the_file(write_yaml: WriteYaml, tmp_path: Path, name: str) -> None:
    (tmp_path / "weights").mkdir()
    save_file({name: SINKS}, tmp_path / "weights" / "s.safetensors")
    path = write_yaml(TINY_YAML.replace("}", ", sinks: weights/s.safetensors}"))
    sinks = load_config(path).models[0].spec.sinks
    assert sinks is not None
    np.testing.assert_array_equal(sinks, SINKS)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({}, "holds the tensors none; expected one, or one called sinks"),
        ({"a": SINKS, "b": SINKS}, "holds the tensors a, b; expected one, or one called sinks"),
        ({"sinks": SINKS[:1]}, "holds [1, 4] float32; expected [2, 4] float32"),
        ({"sinks": SINKS.astype(np.float16)}, "holds [2, 4] float16; expected [2, 4] float32"),
        ({"sinks": np.full_like(SINKS, np.inf)}, "holds NaN or infinity; expected finite logits"),
    ],
)
def test_unusable_sinks_say_what_they_are(
    tmp_path: Path, tensors: dict[str, np.ndarray], expected: str
) -> None:
    file = tmp_path / "s.safetensors"
    save_file(tensors, file)
    with pytest.raises(ConfigError) as caught:
        load_config(None, {}, [f"{TINY},sinks={file}"])
    assert caught.value.mistakes == (f"--model #1: sinks: {file} {expected}",)


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_unreadable_sinks_are_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "s.safetensors"
    if content:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--model #1: sinks: .* cannot be read: "):
        load_config(None, {}, [f"{TINY},sinks={file}"])


def test_sinks_wait_for_the_shape(tmp_path: Path) -> None:
    broken = TINY.replace("num_layers=2", "num_layers=x")
    (mistake,) = mistakes_of(None, f"{broken},sinks={tmp_path / 'none'}")
    assert mistake.startswith("--model #1: num_layers: got 'x'")


def test_backends_are_those_of_the_registry() -> None:
    (backend,) = (key for key in keys_of(ServerConfig) if key.name == "backend")
    assert backend.kind.expected == "auto, cpu, cuda or reference"
    for name in BACKEND_NAMES:
        assert load_config(None, {"backend": name}, [TINY]).backend == name


def test_no_port_takes_a_unix_socket(write_yaml: WriteYaml) -> None:
    assert load_config(None, {"host": "none", "unix_socket": "octavo.sock"}, [TINY]).host == "none"
    (mistake,) = mistakes_of(write_yaml("port: 1\nhost: none\n" + TINY_YAML))
    assert mistake == ("octavo.yaml:2: host: got 'none' without a unix_socket; expected an address")


def test_example_is_valid_and_names_every_key(write_yaml: WriteYaml) -> None:
    text = example_config()
    config = load_config(write_yaml(text))
    assert [model.spec.name for model in config.models] == ["llama-3.1-8b", "tiny"]
    assert config.models[0].spec.int8_token_bytes == 66560
    assert config.models[0].spec.fp16_token_bytes == 131072
    for key in (*keys_of(ServerConfig), *keys_of(ModelKeys)):
        assert f"{key.name}:" in text


def test_example_states_the_defaults(write_yaml: WriteYaml) -> None:
    server, models = example_config().split("\nmodels:\n")
    keys = {key.name for key in keys_of(ServerConfig)}
    lines = [line.removeprefix("# ") for line in server.splitlines()]
    settings = [line for line in lines if line.partition(":")[0] in keys]
    assert len(settings) == len(keys)
    stated = load_config(write_yaml("\n".join(settings) + "\nmodels:\n" + models))
    assert dataclasses.replace(stated, models=()) == ServerConfig()
