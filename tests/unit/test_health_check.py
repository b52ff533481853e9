"""The command `octavo-server health` against a gRPC server that answers health as it is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from octavo_server.cli import main

STATUS = health_pb2.HealthCheckResponse


@pytest.fixture
def servicer() -> health.HealthServicer:
    """What the server says."""
    return health.HealthServicer()


@pytest.fixture
def target(servicer: health.HealthServicer) -> Iterator[str]:
    """A server that speaks plain text."""
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_serving_is_0(
    target: str, servicer: health.HealthServicer, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer.set("ready", STATUS.SERVING)
    assert main(["health", "--target", target]) == 0
    assert capsys.readouterr().out == f"{target} ready: SERVING\n"


def test_not_serving_is_1(
    target: str, servicer: health.HealthServicer, capsys: pytest.CaptureFixture[str]
) -> None:
    servicer.set("ready", STATUS.NOT_SERVING)
    servicer.set("live", STATUS.SERVING)
    assert main(["health", "--target", target]) == 1
    assert capsys.readouterr().err == f"{target} ready: NOT_SERVING\n"
    assert main(["health", "--target", target, "--service", "live"]) == 0


def test_an_unknown_service_is_1(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--target", target, "--service", "other"]) == 1
    assert capsys.readouterr().err.startswith(f"{target} other: NOT_FOUND")


def test_nobody_there_is_1_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--target", "127.0.0.1:1", "--timeout", "5"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("127.0.0.1:1 ready: UNAVAILABLE: ")


def test_tls(
    tmp_path: Path, servicer: health.HealthServicer, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    key, cert = certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes()
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_secure_port("localhost:0", grpc.ssl_server_credentials([(key, cert)]))
    server.start()
    servicer.set("ready", STATUS.SERVING)
    arguments = ["health", "--target", f"localhost:{port}"]
    assert main([*arguments, "--tls-ca", str(tmp_path / "ca.pem")]) == 0
    assert main(arguments) == 1
    server.stop(None).wait()


def test_an_unreadable_authority_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "ca.pem"
    assert main(["health", "--target", "127.0.0.1:1", "--tls-ca", str(missing)]) == 1
    assert f"--tls-ca {missing} cannot be read" in capsys.readouterr().err


def test_a_probe_loads_no_torch() -> None:
    """A container's health check runs every few seconds, and must be light."""
    script = (
        "import sys; from octavo_server.cli import main; "
        "main(['health', '--target', '127.0.0.1:1', '--timeout', '0.1']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, timeout=60)
    assert done.returncode == 0
