"""The command line: what it hands on, and how it ends when it cannot."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from octavo_server import cuda_build, kernel_build, server
from octavo_server.backends.base import UnsupportedError
from octavo_server.cli import example_config, main
from octavo_server.config_keys import ModelKeys, ServerConfig
from octavo_server.config_schema import keys_of
from octavo_server.logs import setup_logs
from octavo_server.tenants_file import parse_tenants
from octavo_server.tokens import hash_token
from octavo_server.version import software_version

VERBOSITY = "GRPC_VERBOSITY"
TINY = "name=tiny,num_layers=2,num_q_heads=4,num_kv_heads=2,head_dim=64,max_context=512"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """Stand in for the server, which ends with 7; return the configurations that it was given."""
    configs: list[ServerConfig] = []

    def run(config: ServerConfig) -> int:
        configs.append(config)
        return 7

    monkeypatch.setattr(server, "run", run)
    return configs


def test_serve_hands_file_and_flags_to_the_server(
    served: list[ServerConfig], tmp_path: Path
) -> None:
    path = tmp_path / "octavo.yaml"
    path.write_text(example_config())
    code = main(["serve", "--config", str(path), "--port", "0", "--max-message-bytes", "1MiB"])
    assert code == 7
    (config,) = served
    assert (config.port, config.max_message_bytes, len(config.models)) == (0, 2**20, 2)


def test_serve_takes_models_from_flags(served: list[ServerConfig]) -> None:
    assert main(["serve", "--model", TINY, "--model", TINY.replace("tiny", "other")]) == 7
    assert [model.spec.name for model in served[0].models] == ["tiny", "other"]


def test_mistakes_are_listed_and_end_with_2(
    served: list[ServerConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", TINY, "--port", "x", "--num-threads", "-1"]) == 2
    assert not served
    assert capsys.readouterr().err == (
        "octavo-server: 2 mistakes in the configuration:\n"
        "--num-threads: got -1; expected a whole number from 0 to 1024\n"
        "--port: got 'x'; expected a whole number from 0 to 65535\n"
    )


def test_what_this_machine_cannot_do_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_config: ServerConfig) -> int:
        raise UnsupportedError("this machine has no AVX-512; choose another instruction set")

    monkeypatch.setattr(server, "run", refuse)
    assert main(["serve", "--model", TINY]) == 1
    expected = "octavo-server: this machine has no AVX-512; choose another instruction set\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "arguments", [["serve", "--prt", "1"], ["serve", "--por", "0", "--model", TINY], ["srv"], []]
)
def test_unknown_arguments_end_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for key in keys_of(ServerConfig):
        assert f"{key.flag} VALUE" in text
    for key in keys_of(ModelKeys):
        assert re.search(rf"^  {key.name} ", text, re.MULTILINE)
    assert "default 64MiB" in text
    assert '"50%"' in text


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"octavo {software_version()}\n"


def test_build_prints_where_the_kernels_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[bool] = []

    def build(verbose: bool = False) -> Path:
        asked.append(verbose)
        return Path("cache", "kernels.so")

    monkeypatch.setattr(kernel_build, "build_cpu_kernels", build)
    assert (main(["build"]), main(["build", "--verbose"])) == (0, 0)
    assert asked == [False, True]
    assert capsys.readouterr().out == "cache/kernels.so\n" * 2


@pytest.mark.parametrize(
    ("given", "archs"), [("90", (90,)), ("80,90", (80, 90)), ("all", (80, 86, 89, 90, 100, 120))]
)
def test_build_makes_the_cuda_kernels_on_request(
    given: str,
    archs: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[tuple[Sequence[int], bool]] = []

    def build(archs: Sequence[int], verbose: bool = False) -> Path:
        asked.append((archs, verbose))
        return Path("cuda.so")

    monkeypatch.setattr(kernel_build, "build_cpu_kernels", lambda verbose: "cpu.so")
    monkeypatch.setattr(cuda_build, "build_cuda_kernels", build)
    assert main(["build", "--verbose", "--cuda-arch", given]) == 0
    assert asked == [(archs, True)]
    assert capsys.readouterr().out == "cpu.so\ncuda.so\n"


@pytest.mark.parametrize("given", ["", "8.0", "75", "90,", "sm_90"])
def test_unknown_cuda_archs_are_refused_before_anything_is_built(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_build, "build_cpu_kernels", None)
    assert main(["build", "--cuda-arch", given]) == 1
    assert f'80 or more, such as 80,90, or "all"; got {given!r}' in capsys.readouterr().err


def test_example_config_is_printed_as_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["example-config"]) == 0
    assert capsys.readouterr().out == example_config()


def test_mistakes_are_told_without_loading_torch_or_grpc() -> None:
    program = (
        "import sys; from octavo_server.cli import main; code = main(['serve'])\n"
        "print(code, sorted({'torch', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout == "2 []\n"


@pytest.fixture
def restored_logs() -> object:
    root, package = logging.getLogger(), logging.getLogger("octavo_server")
    handlers, levels = list(root.handlers), (root.level, package.level)
    verbosity = os.environ.pop(VERBOSITY, None)
    yield
    os.environ.pop(VERBOSITY, None)
    if verbosity is not None:
        os.environ[VERBOSITY] = verbosity
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    package.setLevel(levels[1])


@pytest.mark.usefixtures("restored_logs")
def test_logs_are_one_line_with_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs("info")
    setup_logs("info")
    logging.getLogger("octavo_server.engine").info("holds %d tokens", 8192)
    logging.getLogger("octavo_server.engine").debug("not asked for")
    logging.getLogger("a_library").info("not ours")
    logging.getLogger("a_library").warning("worth knowing")
    first, second = capsys.readouterr().err.splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
    assert re.fullmatch(time + r" INFO    octavo_server\.engine: holds 8192 tokens", first)
    assert re.fullmatch(time + r" WARNING a_library: worth knowing", second)


@pytest.mark.usefixtures("restored_logs")
def test_what_grpc_says_by_itself_is_limited_unless_asked_for() -> None:
    for log_format, expected in (("text", "ERROR"), ("json", "NONE")):
        os.environ.pop(VERBOSITY, None)
        setup_logs("info", log_format)
        assert os.environ[VERBOSITY] == expected
    os.environ[VERBOSITY] = "DEBUG"
    setup_logs("info", "json")
    assert os.environ[VERBOSITY] == "DEBUG"


def test_grpc_is_not_there_before_the_logs_are_set_up() -> None:
    code = "import sys, octavo_server.cli; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_token_is_drawn_and_printed_with_its_line_of_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn = set()
    for _ in range(2):
        assert main(["token"]) == 0
        token, line = capsys.readouterr().out.splitlines()
        token = token.removeprefix("token: ")
        drawn.add(token)
        (tenant,) = parse_tenants(Path("x"), f"tenants: [{{name: a, {line}}}]".encode())
        assert tenant.token_sha256 == (hash_token(token),)
    assert len(drawn) == 2


@pytest.mark.usefixtures("restored_logs")
def test_logs_in_json_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logs("info", "json")
    log = logging.getLogger("octavo_server.engine")
    log.info('holds "%d"\ntokens', 8192, extra={"step_key": "00ff", "limit": 3, "path": Path("x")})
    try:
        raise ValueError("a defect")
    except ValueError:
        log.exception("it failed", extra={"level": "spoofed"})
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "octavo_server.engine",
        "message": 'holds "8192"\ntokens',
        "step_key": "00ff",
        "limit": 3,
        "path": "x",
    }
    assert (second["level"], second["message"]) == ("error", "it failed")
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("ValueError: a defect")


@pytest.mark.usefixtures("restored_logs")
def test_the_format_of_logs_is_the_configs(
    served: list[ServerConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", TINY, "--log-format", "json"]) == 7
    logging.getLogger("octavo_server").warning("as asked")
    assert json.loads(capsys.readouterr().err)["message"] == "as asked"
